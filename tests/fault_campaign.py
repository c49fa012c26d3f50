"""Kills runs of sac_continuous.py at random moments, resumes them, and compares their ends with an undisturbed run's.

    python tests/fault_campaign.py --kills 40
    python tests/fault_campaign.py --kills 10 --settings=--compile=always

Each run is killed (SIGKILL) and resumed until it finishes, or begun anew where it had no checkpoint yet; runs follow
each other, a variant of the algorithm each, until there were enough kills. Ends with 0 if every run's progress.csv
(times aside), policy.pt and last checkpoint are those of the same variant left alone.
"""

import argparse
import csv
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PROCESSES = multiprocessing.get_context("forkserver")  # imports once, so that a kill falls into the run, not before it
PROCESSES.set_forkserver_preload(["sac_continuous", "torch._dynamo"])  # the latter comes with Adam
SETTINGS = "--env-id Pendulum-v1 --total-steps 600 --learning-starts 50 --random-steps 100 --batch-size 16"
SETTINGS += " --buffer-size 300 --hidden-size 16 --max-episode-steps 60 --eval-every 70 --eval-episodes 1"
SETTINGS += " --checkpoint-every 23 --log-every 10 --torch-threads 1"
VARIANTS = [
    "--lr-schedule linear",
    "--critic-backup redq --num-critics 4 --num-critic-updates 2 --target-update-period 3",
    "--critic-backup value --temperature 0.2 --actor-gradient reinforce --num-actor-samples 3",
    "--critic-backup double-q --actor-std shared --no-squash --tau 1 --target-update-period 20",
]
TIMED = ("wall_time_s", "steps_per_s")


def rows(run_dir: Path) -> list[dict]:
    with open(run_dir / "progress.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)]


def same(a, b) -> bool:
    """Equality of nested plain values and tensors, wall times aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in TIMED)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)  # NaN is NaN


def content(path: Path) -> dict:
    """What a file holds, without the folder's name and the time taken."""
    found = torch.load(path, weights_only=True)
    found.pop("run_dir", None)
    if "progress" in found:
        step, _, *rest = found["progress"]
        found["progress"] = step, *rest
    return found


def differences(run_dir: Path, reference: Path) -> list[str]:
    found = [] if rows(run_dir) == rows(reference) else ["progress.csv"]
    names = ("policy.pt", "checkpoint.pt")
    return found + [name for name in names if not same(content(run_dir / name), content(reference / name))]


def run_script(arguments: list[str], log: Path) -> None:
    """In a process of its own."""
    sys.path.insert(0, str(ROOT))
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import sac_continuous

    sys.exit(sac_continuous.main(arguments))


def start(arguments: str, log: Path):
    os.environ["PYTHONPATH"] = str(ROOT)  # where the server of forks, which the first start starts, finds the script
    process = PROCESSES.Process(target=run_script, args=(arguments.split(), log))
    process.start()
    return process


def campaign(kills_wanted: int, folder: Path, seed: int = 0, more: str = "") -> tuple[int, int, int]:
    """more: settings for all. Returns the numbers of kills, of finished runs, of runs whose end differs."""
    draw, log, times = random.Random(seed), folder / "log.txt", {}
    kills = runs = differing = 0
    while kills < kills_wanted:
        number = runs % len(VARIANTS)
        settings, reference = f"{SETTINGS} {VARIANTS[number]} {more}", folder / f"reference{number}"
        if not reference.exists():
            began = time.time()
            process = start(f"{settings} --run-dir {reference}", log)
            while not (reference / "progress.csv").exists() and process.is_alive():
                time.sleep(0.01)
            startup = time.time() - began
            process.join()
            if process.exitcode != 0:
                raise SystemExit(f"the run left alone failed: {log.read_text()[-2000:]}")
            times[number] = startup, time.time() - began - startup
        startup, length = times[number]
        run_dir = folder / f"run{runs}"
        while True:
            if (run_dir / "checkpoint.pt").exists():
                process = start(f"--resume {run_dir}", log)
            else:
                shutil.rmtree(run_dir, ignore_errors=True)
                process = start(f"{settings} --run-dir {run_dir}", log)
            process.join(draw.uniform(startup * 0.8, startup * 1.1 + length * 0.4))
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
        if process.exitcode != 0:
            raise SystemExit(f"{run_dir} ended with {process.exitcode}: {log.read_text()[-2000:]}")
        found = differences(run_dir, reference)
        differing += bool(found)
        runs += 1
        print(f"  {kills} kills, {runs} runs, the last {'differs in ' + ', '.join(found) if found else 'equal'}")
    return kills, runs, differing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", default="", help="more of them, for the script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills, runs, differing = campaign(options.kills, Path(folder), options.seed, options.settings)
    print(f"{kills} kills over {runs} runs: {differing} runs differ from the one left alone")
    sys.exit(differing > 0)
