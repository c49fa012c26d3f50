"""Runs on this machine: as many processes at a time as asked for."""

import signal
import subprocess
import time
from dataclasses import dataclass

import training_process
from grid import Run, is_locked

REFUSED = 2  # the scripts' exit code for settings that they do not take
# No process ends with these:
NOT_BEGUN = -1000  # the run's variant was refused before its turn came
LOCKED = -1001  # another process, of another sweep say, is working on the run


@dataclass(frozen=True)
class Ended:
    run: Run
    exit_code: int | None
    """None: lost with its machine, through no fault of its own"""
    note: str = ""


class LocalEngine:
    def __init__(self, jobs: int):
        self.jobs = jobs
        self.processes: dict[Run, subprocess.Popen] = {}
        self.locked: list[Run] = []

    def has_room(self) -> bool:
        return len(self.processes) < self.jobs

    def start(self, run: Run) -> None:
        if is_locked(run.folder):  # the script would refuse it too, in the log of the one at work
            self.locked.append(run)
            return
        # Should the sweep be killed, SIGTERM lets its runs save what they have.
        self.processes[run] = training_process.start(run.command(), run.log(), signal.SIGTERM)

    def is_busy(self) -> bool:
        return bool(self.processes or self.locked)

    def poll(self) -> list[Ended]:
        """Those that ended since the last call; waits a moment if none has."""
        if self.locked:
            locked, self.locked = self.locked, []
            return [Ended(run, LOCKED) for run in locked]
        ended = [run for run, process in self.processes.items() if process.poll() is not None]
        if not ended:
            time.sleep(0.05)
        return [Ended(run, self.processes.pop(run).returncode) for run in ended]

    def running(self) -> dict[Run, float]:
        """The runs at work and the fraction that each has done."""
        return {run: training_process.fraction_done(run.log()) for run in self.processes}

    def withdraw(self, variant: str | None = None) -> list[Run]:
        """Takes back what was given to start but has not begun, of one variant or all: nothing waits here."""
        return []

    def stop(self) -> None:
        """Asks every run to save and end."""
        for process in self.processes.values():
            training_process.send_signal(process, signal.SIGTERM)

    def close(self) -> None:
        for process in self.processes.values():
            training_process.kill(process)
