"""Runs a grid of script x environments x variants x seeds, on this machine or on a Ray cluster.

Example:
    python benchmark/sweep.py benchmark/experiments/sac_mujoco.yaml
    python benchmark/sweep.py benchmark/experiments/sac_mujoco.yaml --seeds 42 --total-steps 200000 --dry-run

Writes OUT/EXPERIMENT[/VARIANT]/ENV__SEED, the run folder of each run, and a log beside it. The same command again
skips what is finished and goes on with what was cut off. OUT/EXPERIMENT/sweep.json says what the runs were made with.
"""

import os
import secrets
import shlex
import shutil
import signal
import sys
from collections import Counter, deque
from pathlib import Path

import training_process
from display import Display
from errors import Parser, UserError, run_main
from grid import Run, has_run, make_runs, parse_overrides
from local_engine import LOCKED, NOT_BEGUN, REFUSED, Ended, LocalEngine
from origin import num_cores, record_origin

MAX_ATTEMPTS = 2
MAX_LOSSES = 10  # a run that so many machines died under is perhaps what kills them


class Sweep:
    """Gives runs to an engine, judges how they end, and tries again what may succeed."""

    def __init__(self, runs: list[Run], engine, display: Display):
        self.engine, self.display = engine, display
        self.finished_before = sum(run.is_finished() for run in runs)
        self.waiting = deque(run for run in runs if not run.is_finished())
        self.counts = Counter(finished=self.finished_before)
        self.attempts, self.losses = Counter(), Counter()
        self.fresh: set[Run] = set()
        self.refused_variants: set[str] = set()
        self.stop_signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, number: int, frame) -> None:
        self.stop_signal = number
        for again in (signal.SIGINT, signal.SIGTERM):  # which end us, and the kernel the runs
            signal.signal(again, signal.SIG_DFL)

    def go(self) -> int:
        """Returns the exit code: 0 if all finished, 1 if one failed, 2 if one was refused, 128 + a signal's number."""
        try:
            while (self.waiting or self.engine.is_busy()) and not self.stop_signal:
                while self.waiting and self.engine.has_room() and not self.stop_signal:
                    self.start(self.waiting.popleft())
                for ended in self.engine.poll():
                    self.judge(ended)
                if self.display.is_due():
                    running = self.engine.running()
                    self.display.update(self.counts_with(running), self.finished_before, running)
            if self.stop_signal:
                self.display.line("stopping; once more to end at once")
        finally:
            self.engine.close()
        return self.summary()

    def start(self, run: Run) -> None:
        if run.variant in self.refused_variants:
            self.counts["not started"] += 1
            return
        if has_run(run.folder):
            self.fresh.discard(run)
        else:
            self.fresh.add(run)
        self.engine.start(run)

    def judge(self, ended: Ended) -> None:
        run, code = ended.run, ended.exit_code
        if code == 0:
            self.counts["finished"] += 1
            self.display.line(f"finished  {run.name} ({self.counts['finished']} of {self.display.total})")
        elif code == NOT_BEGUN:
            self.counts["not started"] += 1
        elif code == LOCKED:
            self.counts["refused"] += 1
            self.display.line(f"refused   {run.name}: another sweep is working on it; wait for it or stop it")
        elif code is None and self.losses[run] < MAX_LOSSES:
            self.losses[run] += 1
            self.waiting.appendleft(run)
            self.display.line(f"lost      {run.name}: {ended.note}; it goes on elsewhere")
        elif code == REFUSED:
            self.counts["refused"] += 1
            self.report("refused", ended, "its script does not take these settings")
            if run in self.fresh:  # a resumed one was refused for what is in its folder
                self.refused_variants.add(run.variant)
        else:
            self.attempts[run] += 1
            if code is not None and self.attempts[run] < MAX_ATTEMPTS:
                self.waiting.appendleft(run)
                self.display.line(f"retried   {run.name}: {describe(ended)}")
            else:
                self.counts["failed"] += 1
                self.report("failed", ended, describe(ended))

    def report(self, what: str, ended: Ended, why: str) -> None:
        log = ended.run.log()
        self.display.line(f"{what:<9} {ended.run.name}: {why}; log {log}")
        for line in training_process.last_lines(log):
            self.display.line(f"    {line}")

    def counts_with(self, running: dict[Run, float]) -> dict[str, int]:
        names = ("finished", "failed", "refused", "not started")
        counts = {name: self.counts[name] for name in names} | {"running": len(running)}
        return counts | {"waiting": self.display.total - sum(counts.values())}

    def summary(self) -> int:
        left = self.display.total - self.counts.total()
        counts = [f"{count} {name}" for name, count in {**self.counts, "left": left}.items() if count]
        before = f" ({self.finished_before} of them before)" if self.finished_before else ""
        self.display.line(f"{self.display.total} runs: {', '.join(counts)}{before}")
        if self.stop_signal:
            self.display.line("the same command goes on from the last checkpoints")
            return 128 + self.stop_signal
        if self.counts["failed"]:
            return 1
        return REFUSED if self.counts["refused"] else 0


def describe(ended: Ended) -> str:
    if ended.note:
        return ended.note
    if ended.exit_code < 0:
        return f"ended by {signal.Signals(-ended.exit_code).name}"
    return f"ended with exit code {ended.exit_code}"


def print_commands(runs: list[Run]) -> None:
    """Each as the sweep would start it, with `python` where that is the same interpreter."""
    is_python = os.path.realpath(shutil.which("python") or "") == os.path.realpath(sys.executable)
    for run in runs:
        command = run.command(script=Path(os.path.relpath(run.script)))
        line = shlex.join(["python" if is_python else command[0], *command[1:]])
        print(f"# finished: {line}" if run.is_finished() else line)


def parse_args() -> tuple:
    parser = Parser(
        "Run a grid of script x environments x variants x seeds. Settings that are not listed here, as --total-steps"
        " 1000, go to the script and win over the experiment file."
    )
    parser.add_argument("experiment", type=Path, help="YAML file, see benchmark/experiments")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--environments", nargs="+", help="instead of the file's")
    parser.add_argument("--variants", nargs="+", help="only these of the file's")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="print every command line and end")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="this machine, or Ray")
    parser.add_argument("--jobs", type=int, help="local: processes at a time (default: the number of cores)")
    parser.add_argument("--address", help="ray: the cluster's address, or auto (default: start Ray on this machine)")
    parser.add_argument("--cpus-per-run", type=float, help="ray: processors that each run needs (default: 1)")
    parser.add_argument("--gpus-per-run", type=float, help="ray: GPUs that each run needs, a fraction if shared")
    parser.add_argument(
        "--shared-out", action="store_true", help="ray: every node sees --out and writes there; nothing is brought back"
    )
    parser.add_argument("--bring-back-every", type=float, help="ray: seconds between two transfers (default: 60)")
    args, rest = parser.parse_known_args()
    ray_alone = ("address", "cpus_per_run", "gpus_per_run", "shared_out", "bring_back_every")
    for name in ray_alone if args.engine == "local" else ("jobs",):
        if getattr(args, name) not in (None, False):
            raise UserError(
                f"--{name.replace('_', '-')} and --engine {args.engine} contradict each other: leave one out"
            )
    if args.shared_out and args.bring_back_every is not None:
        raise UserError("--shared-out and --bring-back-every contradict each other: leave one out")
    for name in ("jobs", "cpus_per_run", "bring_back_every"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    if args.gpus_per_run is not None and not args.gpus_per_run >= 0:
        raise UserError(f"--gpus-per-run {args.gpus_per_run}: must be 0 or more")
    return args, parse_overrides(rest)


def make_engine(args, runs: list[Run], folder: Path):
    if args.engine == "local":
        return LocalEngine(args.jobs or num_cores(), folder / "sweep.json")
    # Ray reads these when it is imported.
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    if not args.address:  # a token for this session alone; else Ray would leave one in the home folder
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.update(environment | os.environ)
    try:
        from ray_engine import RayEngine  # Ray is heavy, and only this engine needs it
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError("--engine ray: Ray is not installed; pip install -r benchmark/requirements.txt") from None
    if not all(run.is_finished() for run in runs):
        record_origin(folder / "sweep.json", runs[0].script)  # which Ray gets a copy of now
    return RayEngine(
        runs[0].script,
        log=folder / "ray.log",
        address=args.address,
        cpus_per_run=args.cpus_per_run or 1,
        gpus_per_run=args.gpus_per_run or 0,
        shared_out=args.shared_out,
        bring_back_every=args.bring_back_every or 60,
    )


def main() -> int:
    args, overrides = parse_args()
    if args.engine == "ray":  # whose actors have working folders of their own
        args.out = args.out.resolve()
    runs = make_runs(args.experiment, args.out, args.seeds, args.environments, args.variants, overrides)
    if args.dry_run:
        print_commands(runs)
        return 0
    folder = args.out / args.experiment.stem
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    engine = make_engine(args, runs, folder)
    with Display(len(runs)) as display:
        return Sweep(runs, engine, display).go()


if __name__ == "__main__":
    run_main(main)
