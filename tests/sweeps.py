"""Sweeps for tests: a script that takes no time in place of training, and what looks at the sweep's processes."""

import contextlib
import importlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmark"
sys.path.insert(0, str(BENCHMARK))
# The command line, the files, the exit codes and the bar of a training script, without learning.
STAND_IN = """\
import argparse, json, os, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--env-id")
parser.add_argument("--seed", type=int)
for name in ("--exp-name", "--run-dir", "--resume", "--crash"):
    parser.add_argument(name)
parser.add_argument("--torch-threads", type=int)
parser.add_argument("--total-steps", type=int, default=20)
parser.add_argument("--step-s", type=float, default=0.0)
parser.add_argument("--checkpoints", action=argparse.BooleanOptionalAction, default=True)
args = parser.parse_args()
folder = pathlib.Path(args.resume or args.run_dir)
state = {"step": 0, "value": args.seed, "rows": "step,wall_time_s,eval_return_mean\\n"}
if args.resume:
    state = json.loads((folder / "checkpoint.pt").read_text())
elif (folder / "args.json").exists():
    sys.exit(print(f"{folder} holds a run") or 2)
folder.mkdir(parents=True, exist_ok=True)
def save(name, text):
    (folder / f"{name}.tmp").write_text(text)
    os.replace(folder / f"{name}.tmp", folder / name)
save("args.json", json.dumps({"env_id": args.env_id, "seed": args.seed, "exp_name": args.exp_name}))
print("pid", os.getpid(), "from step", state["step"], flush=True)
while state["step"] < args.total_steps:
    time.sleep(args.step_s)
    state["step"] += 1
    state["value"] = (state["value"] * 31 + args.seed + state["step"]) % 1000003
    if state["step"] % 5 == 0:
        state["rows"] += f"{state['step']},{state['step'] / 10},{state['value']}\\n"
        save("progress.csv", state["rows"])
        if args.checkpoints:
            save("checkpoint.pt", json.dumps(state))
        print(f"\\r{100 * state['step'] // args.total_steps}%|##|", end="", flush=True)
    if state["step"] == 12 and args.crash:
        log = folder.with_name(folder.name + ".log").read_text()
        if args.crash == "always" or log.count("from step") == 1:
            sys.exit("\\nthe dog ate my gradients")
save("policy.pt", str(state["value"]))
"""


def write_experiment(folder: Path, name: str = "grid", **content) -> Path:
    """An experiment of the stand-in. Returns the file."""
    script = folder / "stand_in.py"
    script.write_text(STAND_IN)
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"script": str(script), "environments": ["A-v0"], "seeds": [1, 2]} | content))
    return path


def command(program: str, *arguments) -> list[str]:
    return [sys.executable, str(BENCHMARK / f"{program}.py"), *map(str, arguments)]


def run_process(program: str, *arguments, code: int = 0) -> subprocess.CompletedProcess:
    result = subprocess.run(command(program, *arguments), capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def run(program: str, *arguments, code: int = 0) -> SimpleNamespace:
    """In this process, which saves the start of another."""
    from errors import run_main

    main = importlib.import_module(program).main
    result = SimpleNamespace(stdout=io.StringIO(), stderr=io.StringIO())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        streams = contextlib.redirect_stdout(result.stdout), contextlib.redirect_stderr(result.stderr)
        with streams[0], streams[1], pytest.raises(SystemExit) as ended:
            run_main(main)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    result.stdout, result.stderr = result.stdout.getvalue(), result.stderr.getvalue()
    assert ended.value.code == code, result.stdout + result.stderr
    return result


def wait_until(condition, seconds: float = 300):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return result


def policies(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("policy.pt"))}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(log: Path) -> list[int]:
    """Of the training processes that have written it, attempt by attempt."""
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("pid ")]


def last_start(log: Path) -> int:
    """The step from which the last attempt went on."""
    return int(log.read_text().rpartition("from step ")[2].split()[0])
