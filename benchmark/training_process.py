"""Training processes: each ends when the process that started it ends, however that ends."""

import ctypes
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1
TAIL_BYTES = 65536
BAR = re.compile(r"(\d+)%\|")


def lock(log: Path) -> BinaryIO | None:
    """Keeps other sweeps off the run of this log until the file is closed or we end; None if another has it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = open(log, "ab")  # noqa: SIM115 - stays open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def start(
    command: list[str],
    log: Path,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    cpus: set[int] | None = None,
) -> subprocess.Popen:
    """Starts it in a session of its own, so that a Ctrl-C in the terminal reaches only us, with output to the log.

    Should the calling thread end first, even by SIGKILL, the kernel kills it (Linux alone).
    env: set besides our own variables. cpus: the only ones it may run on.
    """
    parent = os.getpid()

    def tie():
        if LIBC:
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it ended before the line above
                os._exit(1)
        if cpus:
            os.sched_setaffinity(0, cpus)

    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        # On a line of its own: an attempt that was killed leaves a bar without an end of line.
        newline = "\n" if output.tell() else ""
        output.write(f"{newline}$ {shlex.join(command)}\n".encode())
        output.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=tie,
            env=os.environ | (env or {}),
            cwd=cwd,
        )


def kill(process: subprocess.Popen) -> None:
    """It and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_attempt(log: Path) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").replace("\r", "\n").rpartition("\n$ ")[2]
    except OSError:
        return ""


def last_lines(log: Path, count: int = 20) -> list[str]:
    """The end of what the last attempt wrote, without its command line and its progress bar."""
    lines = last_attempt(log).splitlines()[1:]
    return [line for line in lines if line.strip() and not BAR.search(line)][-count:]


def fraction_done(log: Path) -> float:
    """0 to 1, from the progress bar that every script prints; 0 if there is none yet."""
    found = BAR.findall(last_attempt(log))
    return int(found[-1]) / 100 if found else 0.0
