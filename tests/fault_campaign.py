"""Kills runs at random moments, resumes them, and compares the end with that of a run that never stopped.

    python tests/fault_campaign.py --script sac_continuous.py --kills 50
    python tests/fault_campaign.py --script sac_continuous.py --kills 50 --settings=--compile=always

Each run is killed (SIGKILL) and resumed until it finishes; runs follow each other until there were enough kills. Ends
with 0 if every run's progress.csv (times aside), policy.pt and last checkpoint are those of the run left alone.
"""

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "sac_continuous.py": "--env-id Pendulum-v1 --total-steps 1500 --learning-starts 50 --random-steps 100"
    " --batch-size 16 --buffer-size 300 --hidden-size 16 --max-episode-steps 60 --eval-every 70 --eval-episodes 1"
    " --checkpoint-every 23",
    "dagger.py": "--env-id Hopper-v4 --num-iterations 8 --train-steps-per-iteration 60 --rollout-steps 100"
    " --eval-episodes 1 --max-episode-steps 100 --hidden-size 16",
}
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
    return a == b


def differences(run_dir: Path, reference: Path) -> list[str]:
    found = [] if rows(run_dir) == rows(reference) else ["progress.csv"]
    for name in ("policy.pt", "checkpoint.pt"):
        a, b = (torch.load(x / name, weights_only=True) for x in (run_dir, reference))
        if not same(a, b):
            found.append(name)
    return found


def start(script: str, arguments: str, log: Path) -> subprocess.Popen:
    with open(log, "a") as file:
        command = [sys.executable, str(ROOT / script), *arguments.split()]
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)


def campaign(script: str, kills_wanted: int, folder: Path, seed: int = 0, more: str = "") -> tuple[int, int, int]:
    """more: settings besides its own. Returns the numbers of kills, of finished runs, of runs whose end differs."""
    draw = random.Random(seed)
    settings = f"{SETTINGS[script]} --torch-threads 1 {more}"
    reference, log = folder / "reference", folder / "log.txt"
    began = time.time()
    process = start(script, f"{settings} --run-dir {reference}", log)
    while not (reference / "progress.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    startup = time.time() - began
    if process.wait() != 0:
        raise SystemExit(f"the run left alone failed: {log.read_text()[-2000:]}")
    length = time.time() - began - startup
    print(f"{script}: a run takes {startup:.1f} s to start and {length:.1f} s")

    kills = runs = differing = 0
    while kills < kills_wanted:
        run_dir = folder / f"run{runs}"
        while True:
            fresh = not (run_dir / "args.json").exists()
            arguments = f"{settings} --run-dir {run_dir}" if fresh else f"--resume {run_dir}"
            process = start(script, arguments, log)
            try:
                code = process.wait(timeout=startup * 0.8 + draw.uniform(0, startup * 0.3 + length * 0.4))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                continue
            if code != 0:
                raise SystemExit(f"{run_dir} ended with {code}: {log.read_text()[-2000:]}")
            break
        found = differences(run_dir, reference)
        differing += bool(found)
        runs += 1
        print(
            f"  {kills} kills, {runs} runs finished, the last {'differs in ' + ', '.join(found) if found else 'equal'}"
        )
    return kills, runs, differing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=SETTINGS, default="sac_continuous.py")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", default="", help="more of them, for the script")
    options = parser.parse_args()
    os.environ["PYTHONUNBUFFERED"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        kills, runs, differing = campaign(options.script, options.kills, Path(folder), options.seed, options.settings)
    print(f"{kills} kills over {runs} runs: {differing} runs differ from the one left alone")
    sys.exit(differing > 0)
