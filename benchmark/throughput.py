"""Measures training steps a second after learning has started: this project, Stable-Baselines3, SBX, and the floor.

Example:
    python benchmark/throughput.py --threads 1 2 --out throughput.json
    python benchmark/throughput.py --sb3-python ~/sb3/bin/python --sbx-python ~/sbx/bin/python --out throughput.json
    python benchmark/throughput.py --scaling batch-size=64,256 num-critics --threads 1 --out scaling.json

All programs take turns, so that a machine whose speed drifts is as fast for each; medians and ratios count. Each
process may run on as many cores as it has threads and no more. Every program trains on the same environment with
batches of 256, two hidden layers of 256, two critics and one update a step. This project is compiled, as its runs of
the default length are (on a GPU: captured as a CUDA graph), and measured once more without. Where there is more than
one thread, it is also measured as a sweep runs it: one process of one thread on each core, their speeds added up. The
floor is the time of the matrix products that such an update consists of, alone. --scaling measures this project's speed
and peak memory instead, one setting varied at a time; the replay buffer is full when it is measured.

The JSON file is written after every measurement.
"""

import contextlib
import csv
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import training_process
from errors import Parser, UserError, run_main
from grid import ROOT, to_arguments

SCRIPT = ROOT / "sac_continuous.py"
MEASURE = Path(__file__).with_name("measure.py")
OURS, PLAIN, SWEEP = "this project", "this project, as plain PyTorch", "this project, a process a core"
FLOOR = "matrix products alone"
PEERS = {"Stable-Baselines3": "stable_baselines3", "SBX": "sbx"}
WARM_UP = 500  # updates before the clock starts: compilers and caches
POLL_S = 0.1
SCALING = {
    "buffer-size": (10_000, 100_000, 1_000_000),
    "batch-size": (64, 256, 1024),
    "hidden-size": (64, 256, 1024),
    "num-critics": (1, 2, 5, 10),
}


class Missing(Exception):
    """A package that is not installed."""


class Record:
    """What has been measured: on stderr, and in the JSON file as soon as it is known."""

    def __init__(self, path: Path, content: dict):
        """content: what the file holds besides the results. Raises UserError if the file could not be written."""
        self.path, self.content, self.results = path, content, []
        if path.exists() and not path.is_file():
            raise UserError(f"--out {path}: is no file")
        self.write_beside("").unlink()  # hours of measuring are not lost to a wrong path

    def write_beside(self, text: str) -> Path:
        """Returns the file that is to replace the one of the results: a whole one stands there at any time."""
        path = self.path.with_name(f"{self.path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be written ({error.strerror})") from None
        return path

    def add(self, result: dict) -> None:
        print(", ".join(f"{name} {value}" for name, value in result.items()), file=sys.stderr)
        self.results.append(result)
        os.replace(self.write_beside(json.dumps(self.content | {"results": self.results}, indent=1)), self.path)


def start(command: list[str], log: Path, cpus: set[int], device: str) -> subprocess.Popen:
    """Starts a process with a thread for each of its cores. Raises UserError if it can't."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = dict.fromkeys(names, str(len(cpus))) | {"JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda"}
    try:
        return training_process.start(command, log, signal.SIGKILL, env, cpus=cpus)
    except OSError as error:
        raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from None


def peak_memory(process: subprocess.Popen, options: int = 0) -> int | None:
    """In bytes, of a process that has ended. options: those of wait4; with os.WNOHANG, None while it is running."""
    pid, status, usage = os.wait4(process.pid, options)
    if not pid:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def failure(process: subprocess.Popen, log: Path) -> UserError:
    reason = " / ".join(training_process.last_lines(log)[-2:])
    return UserError(f"{' '.join(process.args[:3])}: ended with {process.returncode}: {reason}")


def run(command: list[str], log: Path, threads: int, device: str) -> int:
    """Runs a process to its end on `threads` cores. Returns its peak memory in bytes. Raises UserError if it fails."""
    process = start(command, log, cores(threads), device)
    try:
        memory = peak_memory(process)
    finally:
        if process.returncode is None:
            training_process.kill(process)
    if process.returncode:
        raise failure(process, log)
    return memory


def cores(count: int) -> set[int]:
    return set(sorted(os.sched_getaffinity(0))[:count])


def our_command(args, threads: int, run_dir: Path, settings: dict, windows: int = 1) -> tuple[list[str], int]:
    """Trains for the warm-up and then `windows` times `--steps`. Returns it and the step at which the first begins."""
    learning_starts = settings.get("learning-starts", args.steps - WARM_UP)
    first = args.steps * math.ceil((learning_starts + WARM_UP) / args.steps)
    total = first + windows * args.steps
    settings = {
        "env-id": args.env_id,
        "total-steps": total,
        "learning-starts": learning_starts,
        "random-steps": learning_starts,
        "eval-every": args.steps,  # each row of progress.csv has the speed since the one before
        "eval-episodes": 1,
        "checkpoint-every": total,
        "torch-threads": threads,
        "device": args.device,
        "compile": "always" if args.device == "cpu" else "never",
        "run-dir": run_dir,
    } | settings
    return [sys.executable, str(SCRIPT), *to_arguments(settings)], first


def speeds(run_dir: Path, first: int) -> list[float]:
    """Steps a second of the rows that a run has written from step `first` on, each since the row before."""
    path = run_dir / "progress.csv"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))  # not one that is being written
    return [float(row["steps_per_s"]) for row in rows if int(row["step"]) >= first]


def measure_ours(args, threads: int, folder: Path, settings: dict) -> dict:
    command, first = our_command(args, threads, folder / "run", settings)
    memory = run(command, folder / "log", threads, args.device)
    return {"steps_per_s": speeds(folder / "run", first)[-1], "peak_memory_bytes": memory}


def measure_sweep(args, count: int, folder: Path) -> dict:
    """`count` processes at once, each with one thread on a core of its own: their speeds and peak memories, summed.

    None ends before all are measured, and of each counts the first window that begins after the last of them has
    passed its warm-up: whoever is measured, all the others are training, however much their speeds differ. (What they
    do between two windows, an episode's evaluation, keeps their cores busy too.)
    """
    with contextlib.ExitStack() as stack:
        processes = {}
        for core in sorted(cores(count)):
            run_dir, log = folder / f"run{core}", folder / f"log{core}"
            # Far more windows than it takes: how many depends on the slowest of them.
            command, first = our_command(args, 1, run_dir, {}, windows=1000)
            process = start(command, log, {core}, args.device)
            stack.callback(training_process.kill, process)
            processes[process] = run_dir, log

        def measured() -> list[list[float]]:
            for process, (_, log) in processes.items():
                if peak_memory(process, os.WNOHANG) is not None:
                    raise failure(process, log)
            time.sleep(POLL_S)
            return [speeds(run_dir, first) for run_dir, _ in processes.values()]

        while not all(measured()):  # the row at step `first` is the warm-up's
            pass
        begun = [len(one) for one in measured()]  # windows; the next one of each is under way
        rates = measured()
        while not all(len(one) > n + 1 for one, n in zip(rates, begun, strict=True)):
            rates = measured()
        for process in processes:
            training_process.send_signal(process, signal.SIGKILL)
        memory = sum(peak_memory(process) for process in processes)
    total = sum(one[n + 1] for one, n in zip(rates, begun, strict=True))
    return {"processes": count, "steps_per_s": total, "peak_memory_bytes": memory}


def measure(args, program: str, threads: int, folder: Path) -> dict:
    """One measurement. Raises Missing if its package is not there."""
    if program == OURS:
        return measure_ours(args, threads, folder, {})
    if program == PLAIN:
        return measure_ours(args, threads, folder, {"compile": "never", "cuda-graph": False})
    if program == SWEEP:
        return measure_sweep(args, threads, folder)
    python = {"Stable-Baselines3": args.sb3_python, "SBX": args.sbx_python}.get(program, sys.executable)
    settings = {
        "env-id": args.env_id,
        "threads": threads,
        "device": args.device,
        "steps": [args.steps - WARM_UP, args.steps, 2 * args.steps],
    }
    command = [python, str(MEASURE), PEERS.get(program, "floor"), *to_arguments(settings)]
    memory = run(command, folder / "log", threads, args.device)
    result = json.loads(training_process.last_lines(folder / "log")[-1])
    if "missing" in result:
        raise Missing(f"{result['missing']} is not installed for {python}")
    return result | {"peak_memory_bytes": memory}


def compare(args, record: Record) -> None:
    programs = [OURS, PLAIN, SWEEP, *PEERS, FLOOR]
    for repeat in range(args.repeats):
        for threads in args.threads:
            for program in [name for name in programs if threads > 1 or name != SWEEP]:
                try:
                    with tempfile.TemporaryDirectory() as folder:
                        result = measure(args, program, threads, Path(folder))
                except Missing as missing:
                    print(f"{program}: {missing}; the others are measured without it", file=sys.stderr)
                    programs.remove(program)
                    continue
                record.add({"program": program, "threads": threads, "repeat": repeat, **result})


def scale(args, record: Record) -> None:
    for repeat in range(args.repeats):
        for threads in args.threads:
            for name, values in args.scaling.items():
                for value in values:
                    settings = {name: value} | ({"critic-backup": "mean"} if name == "num-critics" else {})
                    if name == "buffer-size":
                        settings |= {"learning-starts": value, "random-steps": value}  # it is full from then on
                    with tempfile.TemporaryDirectory() as folder:
                        result = measure_ours(args, threads, Path(folder), settings)
                    record.add({"setting": name, "value": value, "threads": threads, "repeat": repeat, **result})


def parse_scaling(arguments: list[str]) -> dict[str, tuple[int, ...]]:
    """["batch-size=64,256"] -> {"batch-size": (64, 256)}. A name alone has the values of SCALING, no name is all."""
    chosen = {}
    for argument in arguments:
        name, equals, values = argument.partition("=")
        if name not in SCALING:
            raise UserError(f"--scaling {argument}: no setting {name!r}; there are {', '.join(SCALING)}")
        if name in chosen:
            raise UserError(f"--scaling {argument}: {name} is given twice")
        if equals and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", values):
            raise UserError(f"--scaling {argument}: must be whole numbers above 0, as {name}=64,256")
        chosen[name] = tuple(dict.fromkeys(map(int, values.split(",")))) if equals else SCALING[name]
    return chosen or SCALING


def median_of(results: list[dict], quantity: str, **where) -> float | None:
    """Over the repeats; None if there are none."""
    values = [result[quantity] for result in results if where.items() <= result.items()]
    return statistics.median(values) if values else None


def print_comparison(results: list[dict], threads: list[int]) -> None:
    """A Markdown table; the ratio is this project's speed over the program's."""
    print("| Program |", " | ".join(f"{n} thread{'s' * (n > 1)}, steps/s | ratio" for n in threads), "|")
    print("| --- |", " | ".join("---: | ---:" for _ in threads), "|")
    for program in (OURS, PLAIN, SWEEP, *PEERS):
        cells = []
        for n in threads:
            ours, value = (median_of(results, "steps_per_s", program=name, threads=n) for name in (OURS, program))
            absent = " | " if program == SWEEP else "not measured | "  # with one core it is the row above
            cells.append(f"{value:.0f} | {ours / value:.2f}" if value else absent)
        print(f"| {program} |", " | ".join(cells), "|")
    for n in [n for n in threads if n > 1]:
        sweep = median_of(results, "steps_per_s", program=SWEEP, threads=n)
        others = {name: median_of(results, "steps_per_s", program=name, threads=n) for name in (OURS, *PEERS)}
        ratios = [f"{sweep / speed:.2f} times {name}" for name, speed in others.items() if speed]
        print(
            f"\nA sweep on {n} cores, {n} processes of one thread: {sweep:.0f} steps/s in all. Of one process of {n}"
            f" threads that is {', '.join(ratios)}."
        )
    for n in threads:
        all_ms, hidden_ms = (median_of(results, q, program=FLOOR, threads=n) for q in ("all_ms", "products_ms"))
        count = median_of(results, "products", program=FLOOR, threads=n)
        print(
            f"\nThe floor at {n} thread{'s' * (n > 1)}: an update's matrix products alone take {all_ms:.2f} ms (the"
            f" {count:.0f} between hidden layers {hidden_ms:.2f} ms), at most {1000 / all_ms:.0f} updates a second."
        )


def print_scaling(results: list[dict], threads: list[int], scaling: dict[str, tuple[int, ...]]) -> None:
    print("| Setting | Threads | steps/s | Peak memory, MB |\n| --- | ---: | ---: | ---: |")
    for name, values in scaling.items():
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


def machine() -> dict:
    cores = len(os.sched_getaffinity(0))
    versions = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    return {"cpu": cpu_model(), "cores": cores, **versions}


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
    parser.add_argument(
        "--scaling",
        nargs="*",
        metavar="NAME[=VALUE,...]",
        help=f"vary this project's settings instead, all of {', '.join(SCALING)} or those named",
    )
    args = parser.parse_args()
    args.scaling = None if args.scaling is None else parse_scaling(args.scaling)
    if args.steps <= WARM_UP:
        raise UserError(f"--steps {args.steps}: must be above {WARM_UP}, the steps before the clock starts")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: must be at least 1")
    available = len(os.sched_getaffinity(0))
    for threads in args.threads:
        if not 1 <= threads <= available:
            raise UserError(f"--threads {threads}: must be between 1 and {available}, the cores of this machine")
    paths = ("out", "sb3_python", "sbx_python")  # mean nothing elsewhere; the peers' versions are in the results
    settings = {name: value for name, value in vars(args).items() if name not in paths}
    record = Record(args.out, {"machine": machine(), "settings": settings})
    try:
        (compare if args.scaling is None else scale)(args, record)
    except (UserError, KeyboardInterrupt):
        if record.results:
            print(f"what was measured until then is in {args.out}", file=sys.stderr)
        raise
    if args.scaling is None:
        print_comparison(record.results, args.threads)
    else:
        print_scaling(record.results, args.threads, args.scaling)


if __name__ == "__main__":
    run_main(main)
