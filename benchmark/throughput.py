"""Measures training steps a second after learning has started: this project, Stable-Baselines3, SBX, and the floor.

Example:
    python benchmark/throughput.py --threads 1 2 --out throughput.json
    python benchmark/throughput.py --sb3-python ~/sb3/bin/python --sbx-python ~/sbx/bin/python --out throughput.json
    python benchmark/throughput.py --scaling --threads 1 --out scaling.json

All programs take turns, so that a machine whose speed drifts is as fast for each; medians and ratios count. Each
process may run on as many cores as it has threads and no more. Every program trains on the same environment with
batches of 256, two hidden layers of 256, two critics and one update a step. The floor is the time of the matrix
products that such an update consists of, alone. --scaling measures this project's speed and peak memory instead, one
setting varied at a time; the replay buffer is full when it is measured.
"""

import csv
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import training_process
from errors import Parser, UserError, run_main
from grid import ROOT, to_arguments

SCRIPT = ROOT / "sac_continuous.py"
MEASURE = Path(__file__).with_name("measure.py")
OURS, FLOOR = "this project", "matrix products alone"
PEERS = {"Stable-Baselines3": "stable_baselines3", "SBX": "sbx"}
WARM_UP = 500  # updates before the clock starts: compilers and caches
SCALING = {
    "buffer-size": (10_000, 100_000, 1_000_000),
    "batch-size": (64, 256, 1024),
    "hidden-size": (64, 256, 1024),
    "num-critics": (1, 2, 5, 10),
}


class Missing(Exception):
    """A package that is not installed."""


def run(command: list[str], log: Path, threads: int, device: str) -> int:
    """Runs a process to its end on `threads` cores. Returns its peak memory in bytes. Raises UserError if it fails."""
    cpus = set(sorted(os.sched_getaffinity(0))[:threads])
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = dict.fromkeys(names, str(threads)) | {"JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda"}
    try:
        process = training_process.start(command, log, signal.SIGKILL, env, cpus=cpus)
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from None
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            training_process.kill(process)
    if process.returncode:
        reason = " / ".join(training_process.last_lines(log)[-2:])
        raise UserError(f"{' '.join(command[:3])}: ended with {process.returncode}: {reason}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_ours(args, threads: int, folder: Path, settings: dict, learning_starts: int) -> dict:
    first = args.steps * math.ceil((learning_starts + WARM_UP) / args.steps)
    settings = {
        "env-id": args.env_id,
        "total-steps": first + args.steps,
        "learning-starts": learning_starts,
        "random-steps": learning_starts,
        "eval-every": args.steps,  # each row of progress.csv has the speed since the one before
        "eval-episodes": 1,
        "checkpoint-every": first + args.steps,
        "torch-threads": threads,
        "device": args.device,
        "run-dir": folder / "run",
    } | settings
    memory = run([sys.executable, str(SCRIPT), *to_arguments(settings)], folder / "log", threads, args.device)
    with open(folder / "run" / "progress.csv", newline="") as file:
        return {"steps_per_s": float(list(csv.DictReader(file))[-1]["steps_per_s"]), "peak_memory_bytes": memory}


def measure(args, program: str, threads: int, folder: Path) -> dict:
    """One measurement. Raises Missing if its package is not there."""
    learning_starts = args.steps - WARM_UP
    if program == OURS:
        return measure_ours(args, threads, folder, {}, learning_starts)
    python = {"Stable-Baselines3": args.sb3_python, "SBX": args.sbx_python}.get(program, sys.executable)
    settings = {
        "env-id": args.env_id,
        "threads": threads,
        "device": args.device,
        "steps": [learning_starts, args.steps, 2 * args.steps],
    }
    command = [python, str(MEASURE), PEERS.get(program, "floor"), *to_arguments(settings)]
    memory = run(command, folder / "log", threads, args.device)
    result = json.loads(training_process.last_lines(folder / "log")[-1])
    if "missing" in result:
        raise Missing(f"{result['missing']} is not installed for {python}")
    return result | {"peak_memory_bytes": memory}


def compare(args) -> list[dict]:
    programs = [OURS, *PEERS, FLOOR]
    results = []
    for repeat in range(args.repeats):
        for threads in args.threads:
            for program in list(programs):
                try:
                    with tempfile.TemporaryDirectory() as folder:
                        result = measure(args, program, threads, Path(folder))
                except Missing as missing:
                    print(f"{program}: {missing}; the others are measured without it", file=sys.stderr)
                    programs.remove(program)
                    continue
                results.append({"program": program, "threads": threads, "repeat": repeat, **result})
                report(results[-1])
    return results


def scale(args) -> list[dict]:
    results = []
    for repeat in range(args.repeats):
        for threads in args.threads:
            for name, values in SCALING.items():
                for value in values:
                    settings = {name: value} | ({"critic-backup": "mean"} if name == "num-critics" else {})
                    learning_starts = value if name == "buffer-size" else args.steps - WARM_UP
                    with tempfile.TemporaryDirectory() as folder:
                        result = measure_ours(args, threads, Path(folder), settings, learning_starts)
                    results.append({"setting": name, "value": value, "threads": threads, "repeat": repeat, **result})
                    report(results[-1])
    return results


def report(result: dict) -> None:
    print(", ".join(f"{name} {value}" for name, value in result.items()), file=sys.stderr)


def median_of(results: list[dict], quantity: str, **where) -> float | None:
    """Over the repeats; None if there are none."""
    values = [result[quantity] for result in results if where.items() <= result.items()]
    return statistics.median(values) if values else None


def print_comparison(results: list[dict], threads: list[int]) -> None:
    """A Markdown table; the ratio is this project's speed over the program's."""
    print("| Program |", " | ".join(f"{n} thread{'s' * (n > 1)}, steps/s | ratio" for n in threads), "|")
    print("| --- |", " | ".join("---: | ---:" for _ in threads), "|")
    for program in (OURS, *PEERS):
        cells = []
        for n in threads:
            ours, value = (median_of(results, "steps_per_s", program=name, threads=n) for name in (OURS, program))
            cells.append(f"{value:.0f} | {ours / value:.2f}" if value else "not measured | ")
        print(f"| {program} |", " | ".join(cells), "|")
    for n in threads:
        all_ms, hidden_ms = (median_of(results, q, program=FLOOR, threads=n) for q in ("all_ms", "products_ms"))
        count = median_of(results, "products", program=FLOOR, threads=n)
        print(
            f"\nThe floor at {n} thread{'s' * (n > 1)}: an update's matrix products alone take {all_ms:.2f} ms (the"
            f" {count:.0f} between hidden layers {hidden_ms:.2f} ms), at most {1000 / all_ms:.0f} updates a second."
        )


def print_scaling(results: list[dict], threads: list[int]) -> None:
    print("| Setting | Threads | steps/s | Peak memory, MB |\n| --- | ---: | ---: | ---: |")
    for name, values in SCALING.items():
        for value in values:
            for n in threads:
                where = {"setting": name, "value": value, "threads": n}
                memory = median_of(results, "peak_memory_bytes", **where) / 1e6
                print(f"| {name} {value:,} | {n} | {median_of(results, 'steps_per_s', **where):.0f} | {memory:.0f} |")


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = Parser("Measure training steps a second against Stable-Baselines3 and SBX, or how speed and memory scale.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with every single measurement")
    parser.add_argument("--env-id", default="HalfCheetah-v4", help="environment")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="CPU threads, each count in turn")
    parser.add_argument("--repeats", type=int, default=5, help="of everything")
    parser.add_argument("--steps", type=int, default=3000, help="steps that are timed")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sb3-python", default=sys.executable, help="interpreter that has Stable-Baselines3")
    parser.add_argument("--sbx-python", default=sys.executable, help="interpreter that has SBX")
    parser.add_argument("--scaling", action="store_true", help="vary this project's settings instead")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        raise UserError(f"--steps {args.steps}: must be above {WARM_UP}, the steps before the clock starts")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be at least 1")
    cores = len(os.sched_getaffinity(0))
    for threads in args.threads:
        if not 1 <= threads <= cores:
            raise UserError(f"--threads {threads}: must be between 1 and {cores}, the cores of this machine")
    machine = {"cpu": cpu_model(), "cores": cores, "python": platform.python_version(), "system": platform.platform()}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w") as file:  # opened first: hours of measuring are not lost to a wrong path
            results = scale(args) if args.scaling else compare(args)
            json.dump({"machine": machine, "settings": settings, "results": results}, file, indent=1)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    (print_scaling if args.scaling else print_comparison)(results, args.threads)


if __name__ == "__main__":
    run_main(main)
