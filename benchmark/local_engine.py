"""Runs on this machine: as many processes at a time as asked for."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import training_process
from grid import Run
from origin import record_origin

REFUSED = 2  # the scripts' exit code for settings that they do not take
# No process ends with these:
NOT_BEGUN = -1000  # the run's variant was refused before its turn came
LOCKED = -1001  # another sweep is working on the run


@dataclass(frozen=True)
class Ended:
    run: Run
    exit_code: int | None
    """None: lost with its machine, through no fault of its own"""
    note: str = ""


class LocalEngine:
    def __init__(self, jobs: int, sweep_json: Path):
        self.jobs, self.sweep_json = jobs, sweep_json
        self.processes = {}  # run -> its process and its lock
        self.not_begun: list[Ended] = []
        self.scratch = tempfile.TemporaryDirectory(prefix="sweep-")  # for what compilers leave when they are killed

    def has_room(self) -> bool:
        return len(self.processes) < self.jobs

    def start(self, run: Run) -> None:
        lock = training_process.lock(run.log())
        if lock is None or run.is_finished():  # by another sweep, meanwhile
            self.not_begun.append(Ended(run, LOCKED if lock is None else 0))
            return
        record_origin(self.sweep_json, run.script)  # as it is now, which a long sweep can outlive
        run.clear()
        process = training_process.start(run.command(), run.log(), {"TMPDIR": self.scratch.name})
        self.processes[run] = process, lock

    def is_busy(self) -> bool:
        return bool(self.processes or self.not_begun)

    def poll(self) -> list[Ended]:
        """Those that ended since the last call; waits a moment if none has."""
        ended, self.not_begun = self.not_begun, []
        for run, (process, lock) in list(self.processes.items()):
            if process.poll() is not None:
                if process.returncode == 0:
                    run.mark_finished()  # while no other sweep can begin it
                lock.close()
                del self.processes[run]
                ended.append(Ended(run, process.returncode))
        if not ended:
            time.sleep(0.05)
        return ended

    def running(self) -> dict[Run, float]:
        """The runs at work and the fraction that each has done."""
        return {run: training_process.fraction_done(run.log()) for run in self.processes}

    def close(self) -> None:
        """Ends every run."""
        for process, _ in self.processes.values():
            training_process.kill(process)
        self.scratch.cleanup()
