"""What results were made with: the code's revision, Python and the libraries, the machine."""

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

from errors import UserError
from grid import write_json

PACKAGES = ("gymnasium", "mujoco", "numpy", "torch")


def git(folder: Path, *arguments: str) -> str | None:
    """What it prints; None outside of a repository."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def find_origin(script: Path) -> dict:
    """uncommitted_changes: to files that git knows, anywhere in the script's repository."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "revision": git(script.parent, "rev-parse", "HEAD"),
        "uncommitted_changes": bool(git(script.parent, "status", "--porcelain", "--untracked-files=no")),
        "versions": versions,
    }


def record_origin(path: Path, script: Path) -> None:
    """Adds what a run is made with to a sweep.json, unless it stands there: a sweep may go on at another revision."""
    try:
        records = json.loads(path.read_text()) if path.exists() else []
        origin = find_origin(script)
        if origin not in [{key: record[key] for key in origin} for record in records]:
            records.append({"started": time.strftime("%Y-%m-%d %H:%M:%S %z"), **origin})
            write_json(path, records)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read or written ({error})") from None


def num_cores() -> int:
    """That we may run on, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def find_machine() -> dict:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": cpu, "cores": num_cores(), "system": system}
