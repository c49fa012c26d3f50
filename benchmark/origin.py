"""What results were made with: the code's revision, Python and the libraries, the machine."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

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


def find_machine() -> dict:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "system": system}
