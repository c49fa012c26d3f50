"""What a sweep shows while it works: a line of counts and a table of the runs at work, lines for what happened."""

import csv
import time
from collections import deque
from datetime import timedelta

from grid import Run
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

REFRESH_S = 1.0


def last_row(run: Run) -> dict[str, str]:
    """The newest evaluation of a run, {} before the first."""
    try:
        with open(run.folder / "progress.csv", newline="") as file:
            return next(iter(deque(csv.DictReader(file), maxlen=1)), {})
    except OSError:
        return {}


class Display:
    """On a terminal a live table; elsewhere, as in a batch job's log, the lines alone."""

    def __init__(self, total: int):
        self.total = total
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.live = Live(
            console=self.console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self.started = self.refreshed = time.monotonic()
        self.work_before: dict[Run, float] = {}

    def __enter__(self):
        self.live.start()
        return self

    def __exit__(self, *error):
        self.live.stop()

    def line(self, text: str) -> None:
        self.console.print(text, markup=False)

    def is_due(self) -> bool:
        return self.console.is_terminal and time.monotonic() - self.refreshed >= REFRESH_S

    def update(self, counts: dict[str, int], finished_before: int, running: dict[Run, float]) -> None:
        self.refreshed = time.monotonic()
        for run, fraction in running.items():
            self.work_before.setdefault(run, fraction)  # a resumed run does not start from zero
        # In runs: all that was worked off since the start of this sweep, and all that is still to be done.
        worked = counts["finished"] - finished_before - sum(self.work_before.values())
        worked += sum(running.values())
        left = len(running) - sum(running.values()) + counts["waiting"]
        elapsed = self.refreshed - self.started
        time_left = timedelta(seconds=round(elapsed / worked * left)) if worked > 0 else "unknown yet"
        text = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "finished")
        table = Table("run", "done", "step", "return", box=None, padding=(0, 2))
        room = max(1, self.console.height - 6)
        for run, fraction in list(running.items())[:room]:
            row = last_row(run)
            table.add_row(run.name, f"{fraction:.0%}", row.get("step"), (row.get("eval_return_mean") or "")[:8])
        more = [Text(f"and {len(running) - room} more at work")] if len(running) > room else []
        head = Text(f"{self.total} runs: {text}\n{timedelta(seconds=round(elapsed))} so far, time left: {time_left}")
        self.live.update(Group(head, table, *more), refresh=True)
