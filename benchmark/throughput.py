"""Measures training steps a second after learning has started: this project, Stable-Baselines3, SBX, and the floor.

Example:
    python benchmark/throughput.py --threads 1 2 --out throughput.json
    python benchmark/throughput.py --sb3-python ~/sb3/bin/python --sbx-python ~/sbx/bin/python --out throughput.json

All programs take turns, so that a machine whose speed drifts is as fast for each; medians and ratios count. Each
process may run on as many cores as it has threads and no more. Every program trains on the same environment with
batches of 256, two hidden layers of 256, two critics and one update a step. This project is measured compiled, as its
runs of the default length are, as plain PyTorch, and, on a processor with AMX, compiled with --matmul-precision
medium. The floor is the time of the matrix products that such an update consists of, alone.

The JSON file is written after every measurement.
"""

import csv
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import training_process
from errors import Parser, UserError, run_main
from grid import ROOT, to_arguments, write_json
from origin import find_machine, find_origin, num_cores

SCRIPT = ROOT / "sac_continuous.py"
MEASURE = Path(__file__).with_name("measure.py")
OURS = {
    "this project, compiled": {"compile": "always"},
    "this project, --matmul-precision medium": {"compile": "always", "matmul-precision": "medium"},
    "this project, plain": {"compile": "never"},
}
MEDIUM = list(OURS)[1]
PEERS = {"Stable-Baselines3": "stable_baselines3", "SBX": "sbx"}
FLOOR = "matrix products alone"
WARM_UP = 500  # updates before the clock starts: compilers and caches


class Missing(Exception):
    """A package that is not installed."""


def has_amx() -> bool:
    import torch  # heavy, and not needed to refuse a wrong flag

    return torch.cpu.get_capabilities().get("amx_bf16", False)


def run(command: list[str], log: Path, threads: int, device: str) -> None:
    """Runs a process to its end, with `threads` threads on as many cores. Raises UserError if it fails."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = dict.fromkeys(names, str(threads)) | {"JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda"}
    cpus = set(sorted(os.sched_getaffinity(0))[:threads])
    try:
        process = training_process.start(command, log, env, cpus=cpus)
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from None
    try:
        process.wait()
    finally:
        training_process.kill(process)
    if process.returncode:
        reason = " / ".join(training_process.last_lines(log)[-2:])
        raise UserError(f"{' '.join(command[:3])}: ended with {process.returncode}: {reason}")


def measure_ours(args, settings: dict, threads: int, folder: Path) -> dict:
    """The second of two windows of `--steps`; learning starts in the first."""
    settings = {
        "env-id": args.env_id,
        "total-steps": 2 * args.steps,
        "learning-starts": args.steps - WARM_UP,
        "random-steps": args.steps - WARM_UP,
        "eval-every": args.steps,  # each row of progress.csv has the speed since the one before
        "eval-episodes": 1,
        "checkpoint-every": 2 * args.steps,
        "torch-threads": threads,
        "device": args.device,
        "run-dir": folder / "run",
    } | settings
    run([sys.executable, str(SCRIPT), *to_arguments(settings)], folder / "log", threads, args.device)
    with open(folder / "run/progress.csv", newline="") as file:
        return {"steps_per_s": float(list(csv.DictReader(file))[-1]["steps_per_s"])}


def measure(args, program: str, threads: int, folder: Path) -> dict:
    """One measurement. Raises Missing if its package is not there."""
    if program in OURS:
        return measure_ours(args, OURS[program], threads, folder)
    python = {"Stable-Baselines3": args.sb3_python, "SBX": args.sbx_python}.get(program, sys.executable)
    settings = {
        "env-id": args.env_id,
        "threads": threads,
        "device": args.device,
        "steps": [args.steps - WARM_UP, args.steps, 2 * args.steps],
    }
    command = [python, str(MEASURE), PEERS.get(program, "floor"), *to_arguments(settings)]
    run(command, folder / "log", threads, args.device)
    result = json.loads(training_process.last_lines(folder / "log")[-1])
    if "missing" in result:
        raise Missing(f"{result['missing']} is not installed for {python}")
    return result


def compare(args, content: dict) -> None:
    """Appends every measurement to the content's results, and writes it."""
    programs = [*OURS, *PEERS, FLOOR]
    if args.device != "cpu" or not has_amx():
        programs.remove(MEDIUM)
    for repeat in range(args.repeats):
        for threads in args.threads:
            for program in programs.copy():
                try:
                    with tempfile.TemporaryDirectory() as folder:
                        result = measure(args, program, threads, Path(folder))
                except Missing as missing:
                    print(f"{program}: {missing}; the others are measured without it", file=sys.stderr)
                    programs.remove(program)
                    continue
                result = {"program": program, "threads": threads, "repeat": repeat, **result}
                print(", ".join(f"{name} {value}" for name, value in result.items()), file=sys.stderr)
                content["results"].append(result)
                try:
                    write_json(args.out, content)
                except OSError as error:
                    raise UserError(f"--out {args.out}: cannot be written ({error.strerror})") from None


def median_of(results: list[dict], quantity: str, **where) -> float | None:
    """Over the repeats; None if there are none."""
    values = [result[quantity] for result in results if where.items() <= result.items()]
    return statistics.median(values) if values else None


def print_comparison(results: list[dict], threads: int) -> None:
    """A Markdown table of speeds and of their ratios to the peers'."""
    measured = {name: median_of(results, "steps_per_s", program=name, threads=threads) for name in (*OURS, *PEERS)}
    print(f"| {threads} thread{'s' * (threads > 1)} | steps/s |", " | ".join(f"times {peer}" for peer in PEERS), "|")
    print("| --- | ---: |", " | ".join("---:" for _ in PEERS), "|")
    for program, speed in measured.items():
        if speed:
            ratios = [f"{speed / measured[peer]:.2f}" if measured[peer] else "" for peer in PEERS]
            print(f"| {program} | {speed:.0f} |", " | ".join(ratios), "|")
        elif program != MEDIUM:
            print(f"| {program} | not measured |", " | ".join("" for _ in PEERS), "|")
    all_ms, hidden_ms, count = (
        median_of(results, quantity, program=FLOOR, threads=threads)
        for quantity in ("all_ms", "products_ms", "products")
    )
    print(
        f"\nThe floor: an update's matrix products alone take {all_ms:.2f} ms (the {count:.0f} between hidden layers"
        f" {hidden_ms:.2f} ms), at most {1000 / all_ms:.0f} updates a second.\n"
    )


def main() -> None:
    parser = Parser("Measure training steps a second against Stable-Baselines3 and SBX.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with every single measurement")
    parser.add_argument("--env-id", default="HalfCheetah-v4", help="environment")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="CPU threads, each count in turn")
    parser.add_argument("--repeats", type=int, default=5, help="of everything")
    parser.add_argument("--steps", type=int, default=3000, help="steps that are timed")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sb3-python", default=sys.executable, help="interpreter that has Stable-Baselines3")
    parser.add_argument("--sbx-python", default=sys.executable, help="interpreter that has SBX")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        raise UserError(f"--steps {args.steps}: must be above {WARM_UP}, the steps before the clock starts")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be at least 1")
    available = num_cores()
    for threads in args.threads:
        if not 1 <= threads <= available:
            raise UserError(f"--threads {threads}: must be between 1 and {available}, the cores of this machine")
    if not args.out.parent.is_dir() or args.out.is_dir():
        raise UserError(f"--out {args.out}: must be a file in a folder that exists")
    paths = ("out", "sb3_python", "sbx_python")  # mean nothing elsewhere; the peers' versions are in the results
    settings = {name: value for name, value in vars(args).items() if name not in paths}
    content = {"machine": find_machine(), **find_origin(SCRIPT), "settings": settings, "results": []}
    try:
        compare(args, content)
    except (UserError, KeyboardInterrupt):
        if content["results"]:
            print(f"what was measured until then is in {args.out}", file=sys.stderr)
        raise
    for threads in args.threads:
        print_comparison(content["results"], threads)


if __name__ == "__main__":
    run_main(main)
