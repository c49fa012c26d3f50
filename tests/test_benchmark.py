# ruff: noqa: E402 - benchmark/ must be on the path before its modules are imported
"""Sweeps on one machine, experiment files, curves and tables. What learns here is a stand-in that takes no time."""

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = ROOT / "benchmark"
sys.path.insert(0, str(BENCHMARK))
for package in ("yaml", "rich", "scipy", "matplotlib"):
    pytest.importorskip(package, reason="pip install -r benchmark/requirements.txt")

import ablation
import curves
import driver_cost
import grid
import plot
import profile_update
import rounded_products
import throughput
import training_process
import transfer
from errors import UserError

import sac_continuous

CORES = len(os.sched_getaffinity(0))
# The command line, the files, the exit codes and the bar of a training script, without learning.
STAND_IN = """\
import argparse, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--env-id")
parser.add_argument("--seed", type=int)
for name in ("--exp-name", "--run-dir", "--resume", "--crash"):
    parser.add_argument(name)
parser.add_argument("--torch-threads", type=int)
parser.add_argument("--total-steps", type=int, default=20)
parser.add_argument("--step-s", type=float, default=0.0)
args = parser.parse_args()
folder = pathlib.Path(args.resume or args.run_dir)
folder.mkdir(parents=True, exist_ok=True)
state = {"step": 0, "value": args.seed}
if args.resume and (folder / "checkpoint.pt").exists():
    state = json.loads((folder / "checkpoint.pt").read_text())
settings = {"env_id": args.env_id, "seed": args.seed, "exp_name": args.exp_name, "total_steps": args.total_steps}
(folder / "args.json").write_text(json.dumps(settings | {"git_revision": None}))
def save():
    (folder / "checkpoint.tmp").write_text(json.dumps(state))
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")
stop = []
signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
print("pid", os.getpid(), "from step", state["step"], flush=True)
while state["step"] < args.total_steps:
    time.sleep(args.step_s)
    state["step"] += 1
    state["value"] = (state["value"] * 31 + args.seed + state["step"]) % 1000003
    if state["step"] % 5 == 0:
        with open(folder / "progress.csv", "a") as file:
            if not file.tell():
                file.write("step,wall_time_s,eval_return_mean\\n")
            file.write(f"{state['step']},{state['step'] / 10},{state['value']}\\n")
        save()
        print(f"\\r{100 * state['step'] // args.total_steps}%|##|", end="", flush=True)
    first_time = not (folder / "crashed").exists()
    if state["step"] == 12 and (args.crash == "always" or args.crash == "once" and first_time):
        (folder / "crashed").touch()
        sys.exit("\\nthe dog ate my gradients")
    if stop:
        save()
        sys.exit(128 + stop[0])
(folder / "policy.pt").write_text(str(state["value"]))
"""


# The rows and the pace of a training process: ten times as slow, and slow to begin, on one of its cores.
UNEQUAL = """\
import os, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(flags["--run-dir"])
folder.mkdir()
core, = os.sched_getaffinity(0)
slow = core == int(os.environ["SLOW_CORE"])
time.sleep(0.8 * slow)
steps = int(flags["--eval-every"])
for row in range(int(flags["--total-steps"]) // steps):
    time.sleep(0.5 if slow else 0.05)
    with open(folder / "progress.csv", "a") as file:
        file.write("" if row else "step,steps_per_s\\n")
        file.write(f"{steps * (row + 1)},{row * (1000 if slow else 1)}\\n")
    with open(folder / "times", "a") as file:
        file.write(f"{time.time()}\\n")
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


def run(program: str, *arguments, code: int = 0, timeout: float = 600) -> subprocess.CompletedProcess:
    result = subprocess.run(command(program, *arguments), capture_output=True, text=True, timeout=timeout)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def wait_until(condition, seconds: float = 300):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return result


def policies(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("policy.pt"))}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("pid ")]


# ---------------------------------------------------------------------------------------------- experiment files


def test_the_grid_merges_what_is_given(tmp_path):
    write_experiment(
        tmp_path,
        "base",
        environments={"A-v0": {"total-steps": 1}, "B-v0": None},
        settings={"total_steps": 2, "tau": 3, "gamma": 4, "squash": False},
        variants={"plain": None, "other": {"tau": 5, "env-kwargs": {"x": 1}}},
    )
    child = tmp_path / "child.yaml"
    child.write_text("base: base.yaml\nsettings: {gamma: null, lr: 6}\nseeds: [7]\n")
    runs = grid.make_runs(child, tmp_path / "out", overrides=grid.parse_overrides(["--lr", "8", "--no-render"]))
    assert [run.name for run in runs] == ["plain/A-v0__7", "plain/B-v0__7", "other/A-v0__7", "other/B-v0__7"]
    expected = "--env-id A-v0 --seed 7 --exp-name child-plain --torch-threads 1 --total-steps 1 --tau 3 --no-squash"
    assert " ".join(runs[0].settings) == f"{expected} --lr 8 --no-render"
    assert "--total-steps 2" in " ".join(runs[1].settings)
    assert '--env-kwargs {"x": 1}' in " ".join(runs[3].settings) and "--tau 5" in " ".join(runs[3].settings)
    assert runs[3].folder == tmp_path / "out/child/other/B-v0__7"


def test_dry_run_prints_commands_that_run_by_hand(tmp_path):
    experiment = write_experiment(tmp_path, seeds=[1], settings={"total-steps": 7})
    lines = run("sweep", experiment, "--out", tmp_path / "out", "--seeds", 42, "--dry-run").stdout.splitlines()
    assert len(lines) == 1 and "--seed 42" in lines[0] and not (tmp_path / "out").exists()
    subprocess.run(lines[0], shell=True, check=True, timeout=600, cwd=os.getcwd(), capture_output=True)
    assert (tmp_path / "out/grid/A-v0__42/policy.pt").exists()
    assert "--resume" in run("sweep", experiment, "--out", tmp_path / "out", "--seeds", 42, "--dry-run").stdout


@pytest.mark.parametrize(
    ("text", "arguments", "complaint"),
    [
        ("[1, 2]", [], "must be a mapping"),
        ("a: [", [], "not YAML"),
        ("sets: {}", [], "unknown key 'sets'"),
        ("base: x.yaml", [], "starts from itself"),
        ("base: gone.yaml", [], "cannot be read"),
        ("script: none.py\nenvironments: [A]\nseeds: [1]", [], "no script"),
        ("script: sac_continuous.py\nenvironments: [A]", [], "seeds is missing"),
        ("script: sac_continuous.py\nenvironments: [A]\nseeds: [1, 1]", [], "1 is given twice"),
        ("script: sac_continuous.py\nenvironments: [A]\nseeds: [one]", [], "whole number"),
        ("script: sac_continuous.py\nenvironments: [A]\nseeds: 3", [], "must be a list"),
        ("script: sac_continuous.py\nenvironments: ['../A']\nseeds: [1]", [], "is no name"),
        ("settings: {seed: 3}", [], "--seed is set by the sweep"),
        ("settings: [1]", [], "must map"),
        ("{}", ["--run_dir", "x"], "--run-dir is set by the sweep"),
        ("{}", ["7"], "unexpected argument '7'"),
        ("{}", ["--jobs", "0"], "must be above 0"),
        ("{}", ["--jobs", "many"], "invalid int"),
        ("{}", ["--address", "auto"], "--address and --engine local contradict"),
        ("{}", ["--engine", "ray", "--jobs", "2"], "--jobs and --engine ray contradict"),
        ("script: sac_continuous.py\nenvironments: [A]\nseeds: [1]", ["--variants", "b"], "has no variants"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, text, arguments, complaint):
    experiment = tmp_path / "x.yaml"
    experiment.write_text(text)
    result = run("sweep", experiment, "--out", tmp_path / "out", *arguments, code=2)
    assert complaint in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_script_takes_every_experiment_of_the_repository():
    experiments = sorted((BENCHMARK / "experiments").glob("*.yaml"))
    assert len(experiments) >= 16
    for experiment in experiments:
        for one in grid.make_runs(experiment, Path("runs")):
            if one.script.name == "sac_continuous.py":
                sac_continuous.parse_args(one.command()[2:])


# ------------------------------------------------------------------------------------------------- local sweeps


def test_a_sweep_skips_what_is_finished_and_extends_what_is_longer(tmp_path):
    experiment = write_experiment(tmp_path, environments=["A-v0", "B-v0"])
    first = run("sweep", experiment, "--out", tmp_path / "out")
    assert "4 runs: 4 finished" in first.stderr and len(policies(tmp_path)) == 4
    again = run("sweep", experiment, "--out", tmp_path / "out")
    assert "4 finished (4 of them before)" in again.stderr
    assert len(pids(tmp_path / "out/grid/A-v0__1.log")) == 1
    run("sweep", experiment, "--out", tmp_path / "out", "--seeds", 1, "--total-steps", 30)
    assert "from step 20" in (tmp_path / "out/grid/A-v0__1.log").read_text()


def test_a_crash_is_resumed_once_and_then_reported_while_others_go_on(tmp_path):
    experiment = write_experiment(
        tmp_path, variants={"good": {}, "once": {"crash": "once"}, "always": {"crash": "always"}}, seeds=[1]
    )
    result = run("sweep", experiment, "--out", tmp_path / "out", "--jobs", 1, code=1)
    assert "finished  good/A-v0__1" in result.stderr and "finished  once/A-v0__1" in result.stderr
    assert "retried   once/A-v0__1: ended with exit code 1" in result.stderr
    assert "failed    always/A-v0__1" in result.stderr and "    the dog ate my gradients" in result.stderr
    out = tmp_path / "out/grid"
    assert "from step 10" in (out / "once/A-v0__1.log").read_text()
    assert len(pids(out / "always/A-v0__1.log")) == 2
    assert (out / "once/A-v0__1/policy.pt").read_bytes() == (out / "good/A-v0__1/policy.pt").read_bytes()


def test_a_refused_setting_stops_its_variant_alone(tmp_path):
    experiment = write_experiment(tmp_path, variants={"wrong": {"sted-s": 1}, "right": {}}, seeds=[1, 2, 3])
    result = run("sweep", experiment, "--out", tmp_path / "out", "--jobs", 1, code=2)
    assert result.stderr.count("refused   wrong/") == 1 and "unrecognized arguments: --sted-s 1" in result.stderr
    assert "6 runs: 3 finished, 1 refused, 2 not started" in result.stderr
    assert len(pids(tmp_path / "out/grid/right/A-v0__3.log")) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_leaves_no_process_and_goes_on_to_the_same_policies(tmp_path, number):
    experiment = write_experiment(tmp_path, seeds=[1, 2, 3], settings={"total-steps": 100})
    run("sweep", experiment, "--out", tmp_path / "whole")

    out = tmp_path / "out"
    arguments = command("sweep", experiment, "--out", out, "--jobs", 2, "--step-s", 0.05)
    sweep = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    logs = [out / f"grid/A-v0__{seed}.log" for seed in (1, 2)]
    wait_until(lambda: all(log.exists() and "%|" in log.read_text() for log in logs))
    # As a terminal does: to the whole foreground group, in which the training processes are not.
    os.killpg(sweep.pid, number)
    stderr = sweep.communicate(timeout=600)[1]
    started = [pid for log in logs for pid in pids(log)]
    if number == signal.SIGKILL:
        wait_until(lambda: not any(map(is_alive, started)))
    else:
        assert sweep.returncode == 128 + number, stderr
        assert "3 runs: 3 left" in stderr and not any(map(is_alive, started))
    assert not policies(out) and all((out / f"grid/A-v0__{seed}/checkpoint.pt").exists() for seed in (1, 2))

    finished = run("sweep", experiment, "--out", out)
    assert "3 runs: 3 finished" in finished.stderr
    assert policies(out / "grid") == policies(tmp_path / "whole/grid")
    assert "from step 0" not in logs[0].read_text().rpartition("\n$ ")[2]


def test_a_run_that_another_process_works_on_is_left_to_it(tmp_path):
    experiment = write_experiment(tmp_path)
    lock = grid.take_lock(tmp_path / "out/grid/A-v0__1")
    result = run("sweep", experiment, "--out", tmp_path / "out", "--jobs", 1, code=2)
    lines = result.stderr.splitlines()
    assert lines[0] == "refused   A-v0__1: another process is working on it; wait for it or stop it"
    assert lines[1:] == ["finished  A-v0__2 (1 of 2)", "2 runs: 1 finished, 1 refused"]
    assert [path.name for path in (tmp_path / "out/grid").glob("A-v0__1*")] == ["A-v0__1"]  # not even a log
    lock.release()
    assert "2 runs: 2 finished" in run("sweep", experiment, "--out", tmp_path / "out").stderr


def test_a_sweep_of_the_real_script(tmp_path):
    settings = {"total-steps": 250, "learning-starts": 100, "random-steps": 50, "batch-size": 16, "hidden-size": 16}
    settings |= {"eval-every": 100, "eval-episodes": 1, "checkpoint-every": 100, "buffer-size": 1000}
    content = {"script": "sac_continuous.py", "environments": ["Pendulum-v1"], "seeds": [1], "settings": settings}
    experiment = tmp_path / "real.yaml"
    experiment.write_text(json.dumps(content))
    folder = tmp_path / "real/Pendulum-v1__1"
    folder.mkdir(parents=True)
    for name in (".lock", "args.json.tmp"):  # of an attempt that was cut off before its first file
        (folder / name).touch()
    run("sweep", experiment, "--out", tmp_path)
    assert curves.read_run(folder)["step"].tolist() == [100, 200, 250]
    changed = run("sweep", experiment, "--out", tmp_path, "--tau", 0.5, code=2)
    assert "refused   Pendulum-v1__1" in changed.stderr and "--tau 0.5" in changed.stderr
    run("plot", folder, "--out", tmp_path / "run.png")


def test_a_progress_bar_is_read_from_the_last_attempt_alone(tmp_path):
    log = tmp_path / "log"
    assert training_process.fraction_done(log) == 0
    log.write_text("$ one\n 90%|#\n$ two\nwarning: x\n  5%|#\r 10%|#")
    assert training_process.fraction_done(log) == 0.1
    assert training_process.last_lines(log) == ["warning: x"]


# ------------------------------------------------------------------------------------------------------- transfer


def make_run(folder: Path, step: int) -> None:
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for name in ("checkpoint.pt", "progress.csv", "videos/a.mp4"):
        (folder / name).write_text(f"{name} {step}")
    for i in range(3):
        (folder / f"{i}.tmp").touch()  # half-written: these stay, as the lock does
    (folder / ".lock").touch()
    folder.with_name(folder.name + ".log").write_text(f"log {step}")


def test_a_run_folder_travels_in_pieces_and_only_what_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4)
    there, here, sent = tmp_path / "there/run", tmp_path / "here/run", {}
    make_run(there, 1)
    receiver = transfer.Receiver(here)
    for piece in transfer.pieces(there, sent):
        assert len(piece[1]) <= 4
        receiver.accept(piece)
    for name in ("checkpoint.pt", "progress.csv", "videos/a.mp4", "../run.log"):
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert not (here / ".lock").exists()
    assert list(transfer.pieces(there, sent)) == []
    (there / "progress.csv").write_text("longer than before")
    assert {name for name, _ in transfer.pieces(there, sent)} == {"run/progress.csv", None}


def test_a_transfer_that_breaks_off_leaves_a_whole_older_state(tmp_path):
    there, here = tmp_path / "there/run", tmp_path / "here/run"
    for state in (1, 2):
        make_run(there, state)
        receiver, pieces = transfer.Receiver(here), list(transfer.pieces(there, {}))
        assert pieces[0][0] == "run/checkpoint.pt"  # opened first: the others are at least as new
        for piece in pieces if state == 1 else pieces[:-1]:
            receiver.accept(piece)
    assert (here / "checkpoint.pt").read_text() == "checkpoint.pt 1"
    assert (here / "progress.csv").read_text() == "progress.csv 1"


@pytest.mark.parametrize("replaced", range(5))
def test_the_checkpoint_is_never_ahead_of_the_rows(tmp_path, monkeypatch, replaced):
    there, here, replace = tmp_path / "there/run", tmp_path / "here/run", os.replace
    for state in (1, 2):
        make_run(there, state)
        allowed = iter(range(replaced if state == 2 else 99))

        def replace_some(source, target, allowed=allowed):
            if next(allowed, None) is None:
                raise OSError("the power is gone")
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_some)
        with contextlib.suppress(OSError):
            receiver = transfer.Receiver(here)
            for piece in transfer.pieces(there, {}):
                receiver.accept(piece)
    checkpoint, rows = ((here / name).read_text()[-1] for name in ("checkpoint.pt", "progress.csv"))
    assert checkpoint <= rows and (checkpoint == "2") == (replaced == 4)


# -------------------------------------------------------------------------------------------- curves and tables


def write_run(folder: Path, env_id: str, seed: int, returns: list[float], **columns) -> None:
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"env_id": env_id, "seed": seed, "exp_name": "mine"}))
    with open(folder / "progress.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "wall_time_s", "eval_return_mean", "eval_return_std", *columns])
        for i, value in enumerate(returns):
            writer.writerow([1000 * (i + 1), 10.0 * (i + 1), value, 1, *(column[i] for column in columns.values())])


@pytest.fixture
def results(tmp_path) -> Path:
    """Two environments, two variants, three seeds, and a file of another program."""
    rng = np.random.default_rng(0)
    for variant, bonus in (("plain", 0.0), ("better", 500.0)):
        for env_id in ("HalfCheetah-v4", "Hopper-v4"):
            for seed in (1, 2, 3):
                returns = (1000 * np.arange(1, 5) + bonus + rng.normal(0, 100, 4)).tolist()
                write_run(tmp_path / f"x/{variant}/{env_id}__{seed}", env_id, seed, returns)
    (tmp_path / "x/peer_Hopper-v4_1.csv").write_text("step,wall_time_s,eval_return_mean\n1000,5,100\n2000,10,300\n")
    return tmp_path / "x"


def test_runs_are_found_and_named(results, tmp_path):
    found = curves.read_curves([str(results)])
    assert {curve.label for curve in found} == {"plain", "better", "peer"} and len(found) == 13
    assert {curve.label for curve in curves.read_curves([str(results / "plain")])} == {"plain"}
    assert {curve.label for curve in curves.read_curves([f"us={results / 'plain'}"])} == {"us"}
    write_run(tmp_path / "runs/Hopper-v4__mine__3__20260101-120000", "Hopper-v4", 3, [1.0])
    assert curves.read_curves([str(tmp_path / "runs")])[0].label == "mine"
    bare = tmp_path / "bare/Hopper-v4__5"
    write_run(bare, "Hopper-v4", 5, [1.0])
    (bare / "args.json").unlink()
    one = curves.read_curves([str(tmp_path / "bare")])[0]
    assert (one.label, one.env_id, one.seed) == ("bare", "Hopper-v4", 5)
    with pytest.raises(UserError, match="both are seed 1"):
        curves.read_curves([f"us={results / 'plain'}", f"us={results / 'better'}"])


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    write_run(tmp_path / "A__1", "A", 1, [1.0, 2.0])
    with open(tmp_path / "A__1/progress.csv", "a") as file:
        file.write("3000,30")
    assert curves.read_run(tmp_path / "A__1")["step"].tolist() == [1000, 2000]


def test_the_table_by_hand(tmp_path):
    for seed, returns in ((1, [10.0, 40.0, 30.0]), (2, [20.0, 25.0, 26.0])):
        write_run(
            tmp_path / f"x/Hopper-v4__{seed}", "Hopper-v4", seed, returns, steps_per_s=[900, 100, 100 + 20 * seed]
        )
    lines = run("table", tmp_path / "x").stdout.splitlines()
    assert lines[2] == (
        "| Hopper-v4 | x | 2 | 3,000 | 28.0 ± 2.8 | 33.0 ± 9.9 | 115 | 0:00:30 | deterministic evaluation return |"
    )
    tianshou = next(line for line in lines if "Tianshou SAC]" in line)
    assert "[Tianshou SAC](https://github.com/" in tianshou and "|  | 3542.2 ± 51.5 |" in tianshou
    assert "max average evaluation return within 1M steps" in tianshou
    assert not any("Ant" in line for line in lines)
    assert lines[0].count("|") == lines[2].count("|") == tianshou.count("|")


def test_statistics_by_hand():
    sample = np.array([[0.0], [1.0], [2.0], [3.0], [100.0], [4.0], [5.0], [-90.0]])
    assert plot.interquartile_mean(sample, axis=0) == pytest.approx([2.5])  # of 1, 2, 3, 4
    assert plot.mean(sample, axis=0) == pytest.approx([25 / 8])
    value, low, high = plot.with_interval([sample], plot.mean)
    assert low < value < high
    assert all(bound == value for bound in plot.with_interval([sample[:1]], plot.mean)[1:] for value in sample[0])


def test_the_interval_covers_the_true_mean():
    rng = np.random.default_rng(1)
    samples = rng.normal(3.0, 1.0, (20, 200))  # 200 experiments of 20 seeds
    _, low, high = plot.with_interval([samples], plot.mean)
    assert 0.85 < np.mean((low < 3) & (high > 3)) < 0.99  # percentile intervals of 20 are a little narrow


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--statistic", "iqm", "--published", BENCHMARK / "published.csv"],
        ["--normalise", "Tianshou SAC", "--statistic", "iqm"],
        ["--column", "wall_time_s"],
    ],
)
def test_figures_are_written_as_png_and_svg(results, tmp_path, arguments):
    paths = [results / "plain", results / "better"]
    if "--normalise" not in arguments:
        paths.append(results / "peer_Hopper-v4_1.csv")
    run("plot", *paths, "--out", tmp_path / "fig/a", *arguments)
    assert (tmp_path / "fig/a.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "fig/a.svg").read_text()
    labels = ["plain", "better"] + (["2 environments"] if "--normalise" in arguments else ["HalfCheetah-v4", "peer"])
    labels += ["CleanRL SAC, at 1M steps"] if "--published" in arguments else []
    assert all(f">{label}<" in text for label in labels)


def test_a_single_run_has_a_page_of_its_own(results, tmp_path):
    run("plot", results / "plain/Hopper-v4__1", "--out", tmp_path / "one.svg")
    text = (tmp_path / "one.svg").read_text()
    assert ">eval return mean<" in text and ">wall time s<" in text and ">eval return std<" not in text


def test_scores_are_zero_for_random_and_one_for_the_published(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"x/Hopper-v4__{seed}", "Hopper-v4", seed, [18.77, 3542.2])
        write_run(tmp_path / f"x/Ant-v4__{seed}", "Ant-v4", seed, [-49.53, 5850.2])
    found = curves.read_curves([str(tmp_path / "x")])
    line = plot.plot_normalised(found, "eval_return_mean", plot.mean, "Tianshou SAC").axes[0].lines[0]
    assert line.get_ydata() == pytest.approx([0, 1])


@pytest.mark.parametrize(
    ("program", "arguments", "complaint"),
    [
        ("plot", ["nowhere", "--out", "x"], "no such file"),
        ("plot", [".", "--out", "x"], "no run"),
        ("plot", ["X", "--out", "x.tif.doc"], "not supported"),
        ("plot", ["X", "--out", "x", "--column", "gold"], "has no column gold"),
        ("plot", ["X", "--out", "x", "--normalise", "God"], "not a source"),
        ("plot", ["X", "--out", "x", "--normalise", "CleanRL SAC", "--published", "y"], "contradict"),
        ("plot", ["X"], "--out"),
        ("table", ["X", "--published", "X/plain/Hopper-v4__1/progress.csv"], "not a table of published results"),
        ("throughput", ["--out", "x", "--threads", "999"], "--threads 999"),
        ("throughput", ["--out", "x", "--steps", "10"], "--steps 10"),
        ("throughput", ["--out", "x", "--steps", "501", "--env-id", "None-v0"], "None-v0"),
        ("throughput", ["--out", "."], "is no file"),
        ("ablation", ["--out", "x", "--turns", "0"], "--turns 0"),
        ("profile_update", ["--out", "x", "--updates", "0"], "--updates 0"),
        ("throughput", ["--out", "x", "--scaling", "gamma=1"], "no setting 'gamma'"),
        ("throughput", ["--out", "x", "--scaling", "batch-size=64,many"], "whole numbers above 0"),
        ("throughput", ["--out", "x", "--scaling", "batch-size=0"], "whole numbers above 0"),
        ("throughput", ["--out", "x", "--scaling", "batch-size=64", "batch-size=32"], "given twice"),
    ],
)
def test_bad_input_to_the_others(results, tmp_path, monkeypatch, program, arguments, complaint):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    result = run(program, *(argument.replace("X", str(results), 1) for argument in arguments), code=2)
    assert complaint in result.stderr and result.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- throughput


def test_an_update_has_sixteen_square_products():
    import measure

    shapes = measure.products_of_update(17, 6, batch=256, hidden=256)
    assert shapes.count((256, 256, 256)) == 16 and len(shapes) == 45


@pytest.mark.parametrize("trick", sorted(ablation.UNDONE))
def test_a_trick_undone_changes_no_number(trick, monkeypatch, tmp_path):
    path = tmp_path / "undone.py"
    path.write_text(ablation.undo(trick))
    spec = importlib.util.spec_from_file_location("undone", path)
    undone = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "undone", undone)
    spec.loader.exec_module(undone)
    losses = []
    for sac in (sac_continuous, undone):
        torch.manual_seed(0)
        agent = sac.Agent(sac.Args(hidden_size=32), 3, 2, torch.device("cpu"))
        buffer = sac.ReplayBuffer(500, 3, 2, torch.device("cpu"))
        buffer.rows.normal_()
        buffer.num_added = len(buffer.rows)
        for _ in range(20):
            metrics = agent.update(buffer, 0.0)
        losses.append([metrics[name].item() for name in ("critic_loss", "actor_loss", "temperature")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_script_against_itself_takes_the_same_time():
    ours, other = ablation.compare([ablation.Trainer(ablation.SCRIPT, 1, compiled=False) for _ in range(2)], turns=3)
    assert len(ours) == len(other) == 3
    assert 0.3 < sum(ours) / sum(other) < 3


def test_the_profile_accounts_for_an_update(tmp_path):
    result = run("profile_update", "--out", tmp_path / "a.json", "--updates", 20)
    plain, compiled = json.loads((tmp_path / "a.json").read_text())["results"]
    for found in (plain, compiled):
        assert all(value >= 0 for value in found["by_kind_ms"].values())
        assert found["update_ms"] > 0
    assert max(plain["by_kind_ms"], key=plain["by_kind_ms"].get) == "matrix products"
    assert max(compiled["by_kind_ms"], key=compiled["by_kind_ms"].get) == profile_update.COMPILED
    assert compiled["by_kind_ms"]["matrix products"] < 0.1 < plain["by_kind_ms"]["matrix products"]
    assert result.stdout.count("\n| ") == len(compiled["by_kind_ms"]) + 2


def test_a_trick_that_is_not_there_is_not_measured(monkeypatch):
    monkeypatch.setitem(ablation.UNDONE, "magic", [("no such text", "")])
    with pytest.raises(UserError, match="magic"):
        ablation.undo("magic")


def test_throughput_measures_what_is_there(tmp_path):
    without = tmp_path / "python"  # an interpreter that has neither package, and no other either
    without.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    without.chmod(0o755)
    threads = min(2, CORES)
    result = run(
        *("throughput", "--out", tmp_path / "a.json", "--env-id", "Pendulum-v1", "--steps", 600, "--repeats", 1),
        *("--threads", threads, "--sb3-python", without, "--sbx-python", without),
    )
    assert "Stable-Baselines3: " in result.stderr and "is not installed" in result.stderr
    assert "| SBX | not measured" in result.stdout and "at most" in result.stdout
    text = (tmp_path / "a.json").read_text()
    assert str(tmp_path) not in text and sys.executable not in text
    ours, plain, *sweep, floor = json.loads(text)["results"]
    programs = [one["program"] for one in (ours, plain, floor)]
    assert programs == ["this project", "this project, as plain PyTorch", "matrix products alone"]
    assert 10 < ours["steps_per_s"] < 5000 and ours["peak_memory_bytes"] > 5e7
    assert 0.05 < floor["products_ms"] < floor["all_ms"] * 1.5
    assert [one["program"] for one in sweep] == ["this project, a process a core"] * (threads > 1)
    for one in sweep:
        assert one["processes"] == 2 and one["peak_memory_bytes"] > 1.5 * ours["peak_memory_bytes"]
        assert f"| this project, a process a core | {one['steps_per_s']:.0f} | " in result.stdout
        assert f"{one['steps_per_s'] / ours['steps_per_s']:.2f} times this project." in result.stdout


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_a_process_a_core_is_measured_while_the_others_train(tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(UNEQUAL)
    monkeypatch.setattr(throughput, "SCRIPT", script)
    first, second = sorted(throughput.cores(2))
    monkeypatch.setenv("SLOW_CORE", str(second))
    args = argparse.Namespace(env_id="A-v0", steps=600, device="cpu")
    result = throughput.measure_sweep(args, 2, tmp_path)

    def ends(core: int) -> list[float]:
        """Of each row's window; the next one begins there."""
        return [float(line) for line in (tmp_path / f"run{core}/times").read_text().split()]

    of_fast, of_slow = ends(first), ends(second)
    slow, fast = divmod(int(result["steps_per_s"]), 1000)  # a row's steps_per_s is its number, on the slow core x 1000
    assert of_fast[fast - 1] >= of_slow[0], "measured before the other had passed its warm-up"
    assert of_fast[-1] > of_slow[slow] - 0.3, "ended before the other was measured"
    assert slow >= 1 and fast > 10
    time.sleep(0.3)
    assert (ends(first), ends(second)) == (of_fast, of_slow), "left running"


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_a_process_that_fails_beside_others_ends_them(tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(
        UNEQUAL.replace("time.sleep(0.8 * slow)", "slow and (time.sleep(0.8), sys.exit('the dog ate my gradients'))")
    )
    monkeypatch.setattr(throughput, "SCRIPT", script)
    first, second = sorted(throughput.cores(2))
    monkeypatch.setenv("SLOW_CORE", str(second))
    with pytest.raises(UserError, match="ended with 1: the dog ate my gradients"):
        throughput.measure_sweep(argparse.Namespace(env_id="A-v0", steps=600, device="cpu"), 2, tmp_path)
    rows = (tmp_path / f"run{first}/progress.csv").read_text()
    time.sleep(0.3)
    assert (tmp_path / f"run{first}/progress.csv").read_text() == rows, "left running"


def test_scaling_varies_what_is_asked_for_with_a_full_buffer(tmp_path):
    arguments = ["--env-id", "Pendulum-v1", "--steps", 600, "--repeats", 1]
    result = run("throughput", "--out", tmp_path / "a.json", *arguments, "--scaling", "buffer-size=300,2000")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["settings"]["scaling"] == {"buffer-size": [300, 2000]}
    measured = [(one["setting"], one["value"], one["threads"], one["repeat"]) for one in content["results"]]
    assert measured == [("buffer-size", 300, 1, 0), ("buffer-size", 2000, 1, 0)]
    rows = result.stdout.splitlines()[2:]
    assert len(rows) == 2
    for one, row in zip(content["results"], rows, strict=True):
        assert 10 < one["steps_per_s"] < 5000 and one["peak_memory_bytes"] > 5e7
        cells = f"{one['value']:,} | 1 | {one['steps_per_s']:.0f} | {one['peak_memory_bytes'] / 1e6:.0f}"
        assert row == f"| buffer-size {cells} |"


def test_the_buffer_is_full_before_the_clock_starts(tmp_path, monkeypatch):
    args = argparse.Namespace(env_id="A-v0", steps=600, device="cpu", repeats=1, threads=[1])
    args.scaling = {"buffer-size": (64, 2000)}
    seen = []

    def run(command, log, threads, device):
        flags = dict(zip(command[2::2], command[3::2], strict=True))
        seen.append({name: int(flags[f"--{name}"]) for name in ("buffer-size", "learning-starts", "total-steps")})
        Path(flags["--run-dir"]).mkdir()
        last = f"{flags['--total-steps']},7\n"
        (Path(flags["--run-dir"]) / "progress.csv").write_text(f"step,steps_per_s\n600,1\n{last}")
        return 1

    monkeypatch.setattr(throughput, "run", run)
    throughput.scale(args, throughput.Record(tmp_path / "a.json", {}))
    assert [one["buffer-size"] for one in seen] == [one["learning-starts"] for one in seen] == [64, 2000]
    assert [one["total-steps"] for one in seen] == [1200, 3600]  # the last 600 are timed, at least 500 updates in
    assert [one["steps_per_s"] for one in json.loads((tmp_path / "a.json").read_text())["results"]] == [7, 7]


@pytest.mark.parametrize("error", [UserError("the third failed"), KeyboardInterrupt()])
@pytest.mark.parametrize("arguments", [[], ["--scaling", "num-critics"]])
def test_what_was_measured_outlives_what_fails(tmp_path, monkeypatch, capsys, arguments, error):
    results = iter([{"steps_per_s": 1.0}, {"steps_per_s": 2.0}])

    def measure(*args):
        result = next(results, None)
        if result is None:
            raise error
        return result

    for name in ("measure", "measure_ours"):
        monkeypatch.setattr(throughput, name, measure)
    out = tmp_path / "a.json"
    out.write_text("an earlier one")
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--out", str(out), *arguments])
    with pytest.raises(type(error)):
        throughput.main()
    assert [one["steps_per_s"] for one in json.loads(out.read_text())["results"]] == [1, 2]
    assert f"what was measured until then is in {out}" in capsys.readouterr().err
    with pytest.raises(type(error)):
        throughput.main()
    assert len(json.loads(out.read_text())["results"]) == 2, "lost for nothing"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_drivers_memory_is_its_own_and_not_that_of_a_row_before():
    allocate = "x = bytearray(100_000_000); import time; time.sleep(1)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {allocate!r}])"
    large, small, parent = (
        driver_cost.watch([sys.executable, "-c", code])[2] for code in (allocate, "import time; time.sleep(1)", child)
    )
    assert 95 < large - small < 120 and parent < small + 20


def test_products_and_their_gradients_are_those_of_rounded_operands():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 64, 32), (2, 32, 16), (2, 64, 16)
    x, y, gradient = (torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes)
    product = rounded_products.Product.apply(x, y)
    found = product, *torch.autograd.grad(product, (x, y), gradient)
    x, y, gradient = (operand.detach().bfloat16().double() for operand in (x, y, gradient))
    for ours, exact in zip(found, (x @ y, gradient @ y.mT, x.mT @ gradient), strict=True):
        assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_compiler_does_not_take_the_rounding_away():
    function = torch.compile(lambda x: 2 * rounded_products.rounded(x), options={"cpp_wrapper": True})
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(function(x), 2 * x.bfloat16().float())
