# ruff: noqa: E402 - benchmark/ must be on the path before its modules are imported
"""Sweeps on one machine, experiment files, curves and tables. What learns here is a stand-in that takes no time."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tyro
from sweeps import BENCHMARK, command, is_alive, last_start, pids, policies, run, wait_until, write_experiment

for package in ("yaml", "rich", "scipy"):
    pytest.importorskip(package, reason="pip install -r benchmark/requirements.txt")

import curves
import display
import grid
import local_engine
import measure
import plot
import throughput
import training_process
import transfer
from errors import UserError
from scipy import stats

import sac_continuous

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
        ("script: sac_continuous.py\nenvironments: [a/B-v0, a_B-v0]\nseeds: [1]", [], "would share a folder"),
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
            else:
                tyro.cli(importlib.import_module(one.script.stem).Args, args=one.command()[2:])


# ------------------------------------------------------------------------------------------------- local sweeps


def test_a_sweep_skips_what_is_finished_and_extends_what_is_longer(tmp_path):
    experiment = write_experiment(tmp_path, environments=["A-v0", "B-v0"])
    first = run("sweep", experiment, "--out", tmp_path / "out")
    assert "4 runs: 4 finished" in first.stderr and len(policies(tmp_path)) == 4
    again = run("sweep", experiment, "--out", tmp_path / "out")
    assert "4 finished (4 of them before)" in again.stderr
    log = tmp_path / "out/grid/A-v0__1.log"
    assert len(pids(log)) == 1
    run("sweep", experiment, "--out", tmp_path / "out", "--seeds", 1, "--total-steps", 30)
    assert last_start(log) == 20


def test_a_crash_is_resumed_once_and_then_reported_while_others_go_on(tmp_path):
    variants = {"good": {}, "once": {"crash": "once"}, "always": {"crash": "always"}}
    variants["anew"] = {"crash": "once", "checkpoints": False}
    experiment = write_experiment(tmp_path, variants=variants, seeds=[1])
    result = run("sweep", experiment, "--out", tmp_path / "out", "--jobs", 1, code=1)
    for name in ("good", "once", "anew"):
        assert f"finished  {name}/A-v0__1" in result.stderr
    assert "retried   once/A-v0__1: ended with exit code 1" in result.stderr
    assert "failed    always/A-v0__1" in result.stderr and "    the dog ate my gradients" in result.stderr
    out = tmp_path / "out/grid"
    assert last_start(out / "once/A-v0__1.log") == 10
    assert last_start(out / "anew/A-v0__1.log") == 0 and len(pids(out / "anew/A-v0__1.log")) == 2
    assert len(pids(out / "always/A-v0__1.log")) == 2
    assert len({(out / f"{name}/A-v0__1/policy.pt").read_bytes() for name in ("good", "once", "anew")}) == 1


def test_only_what_a_sweep_has_begun_and_not_finished_is_removed(tmp_path):
    experiment = write_experiment(tmp_path, settings={"checkpoints": False})
    by_hand = tmp_path / "out/grid/A-v0__1"
    by_hand.mkdir(parents=True)
    (by_hand / "args.json").write_text("{}")
    result = run("sweep", experiment, "--out", tmp_path / "out", code=2)
    assert "refused   A-v0__1" in result.stderr and "holds a run" in result.stderr
    assert [path.name for path in by_hand.iterdir()] == ["args.json"]
    finished = policies(tmp_path)
    other = run("sweep", experiment, "--out", tmp_path / "out", "--seeds", 2, "--total-steps", 30, code=2)
    assert "refused   A-v0__2" in other.stderr and policies(tmp_path) == finished != {}


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
    env = os.environ | {"TMPDIR": str(tmp_path)}  # where a killed sweep leaves an empty folder
    sweep = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env)
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
    assert last_start(logs[0]) > 0


def test_a_run_that_another_sweep_works_on_is_left_to_it(tmp_path):
    experiment = write_experiment(tmp_path)
    with training_process.lock(tmp_path / "out/grid/A-v0__1.log"):
        result = run("sweep", experiment, "--out", tmp_path / "out", "--jobs", 1, code=2)
    lines = result.stderr.splitlines()
    assert lines[0] == "refused   A-v0__1: another sweep is working on it; wait for it or stop it"
    assert lines[1:] == ["finished  A-v0__2 (1 of 2)", "2 runs: 1 finished, 1 refused"]
    assert [path.name for path in (tmp_path / "out/grid").glob("A-v0__1*")] == ["A-v0__1.log"]
    assert "2 runs: 2 finished" in run("sweep", experiment, "--out", tmp_path / "out").stderr


def test_a_run_that_another_sweep_has_finished_meanwhile_is_finished(tmp_path):
    experiment = write_experiment(tmp_path, seeds=[1], settings={"checkpoints": False})
    (one,) = grid.make_runs(experiment, tmp_path / "out")
    engines = [local_engine.LocalEngine(1, tmp_path / "sweep.json") for _ in range(2)]
    engines[0].start(one)
    while not (ended := engines[0].poll()):
        pass
    engines[1].start(one)  # which did not see it end
    assert ended == engines[1].poll() == [local_engine.Ended(one, 0)]
    assert len(pids(one.log())) == 1
    for engine in engines:
        engine.close()


def test_a_resumed_run_that_is_refused_does_not_stop_its_variant(tmp_path):
    experiment = write_experiment(tmp_path, seeds=[1, 2])
    script = tmp_path / "stand_in.py"
    refusal = "if args.resume and args.seed == 1:\n    sys.exit(print('damaged') or 2)\n"
    script.write_text(script.read_text().replace("folder = pathlib", refusal + "folder = pathlib", 1))
    experiment.write_text(json.dumps(json.loads(experiment.read_text()) | {"settings": {"crash": "once"}}))
    result = run("sweep", experiment, "--out", tmp_path / "out", "--jobs", 1, code=2)
    assert "refused   A-v0__1" in result.stderr and "2 runs: 1 finished, 1 refused" in result.stderr


def test_a_sweep_records_every_origin_of_its_runs(tmp_path):
    experiment = write_experiment(tmp_path, seeds=[1])

    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        done = subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)
        return done.stdout.decode().strip()

    def records(total_steps):
        run("sweep", experiment, "--out", tmp_path / "out", "--jobs", 1, "--total-steps", total_steps)
        content = json.loads((tmp_path / "out/grid/sweep.json").read_text())
        return [(record["revision"], record["uncommitted_changes"]) for record in content], content

    git("init", "-q")
    git("add", "stand_in.py")
    git("commit", "-q", "-m", "x")
    revision = git("rev-parse", "HEAD")
    found, content = records(10)
    assert found == [(revision, False)] == records(15)[0]
    assert content[0]["versions"]["torch"] and content[0]["started"].startswith("20")
    (tmp_path / "stand_in.py").write_text((tmp_path / "stand_in.py").read_text() + "# changed")
    assert records(15)[0] == [(revision, False)], "nothing was left to do"
    assert records(20)[0] == [(revision, False), (revision, True)]
    write_experiment(tmp_path, seeds=[1, 2])
    commit = f"git -C {tmp_path} -c user.name=x -c user.email=x@x commit -qam y"
    with open(tmp_path / "stand_in.py", "a") as file:  # the first run's own last act changes the revision
        file.write(f"if args.seed == 1:\n    os.system({commit!r})\n")
    assert records(25)[0] == [(revision, False), (revision, True), (git("rev-parse", "HEAD"), False)]
    assert git("rev-parse", "HEAD") != revision


def test_a_sweep_of_the_real_script(tmp_path):
    settings = {"total-steps": 250, "learning-starts": 100, "random-steps": 50, "batch-size": 16, "hidden-size": 16}
    settings |= {"eval-every": 100, "eval-episodes": 1, "checkpoint-every": 100, "buffer-size": 1000}
    content = {"script": "sac_continuous.py", "environments": ["Pendulum-v1"], "seeds": [1], "settings": settings}
    experiment = tmp_path / "real.yaml"
    experiment.write_text(json.dumps(content))
    folder = tmp_path / "real/Pendulum-v1__1"
    folder.mkdir(parents=True)
    (folder / "args.json").touch()  # of an attempt that was cut off
    folder.with_name("Pendulum-v1__1.log").write_text("$ python sac_continuous.py\n")
    run("sweep", experiment, "--out", tmp_path)
    assert curves.read_run(folder)["step"].tolist() == [100, 200, 250]
    assert float(display.last_row(SimpleNamespace(folder=folder))["step"]) == 250
    assert training_process.fraction_done(folder.with_name("Pendulum-v1__1.log")) == 1
    changed = run("sweep", experiment, "--out", tmp_path, "--tau", 0.5, code=2)
    assert "refused   Pendulum-v1__1" in changed.stderr and "tau" in changed.stderr
    run("plot", folder, "--out", tmp_path / "run.png")
    run("temperature", tmp_path / "real", "--out", tmp_path / "temperature.png")
    assert run("overestimation", tmp_path / "real").stdout.splitlines()[2].startswith("| Pendulum-v1 | real | 1 | ")


def test_a_progress_bar_is_read_from_the_last_attempt_alone(tmp_path):
    log = tmp_path / "log"
    assert training_process.fraction_done(log) == 0
    log.write_text("$ one\n 90%|#\n$ two\nwarning: x\n  5%|#\r 10%|#")
    assert training_process.fraction_done(log) == 0.1
    assert training_process.last_lines(log) == ["warning: x"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_live_table_shows_the_newest_row(tmp_path, end):
    one = SimpleNamespace(folder=tmp_path)
    assert display.last_row(one) == {}
    for rows, newest in (([], {}), (["5,1.5", "10,2.5"], {"step": "10", "eval_return_mean": "2.5"})):
        text = "".join(line + end for line in ("step,eval_return_mean", *rows))
        (tmp_path / "progress.csv").write_bytes(text.encode())
        assert display.last_row(one) == newest


# ------------------------------------------------------------------------------------------------------- transfer


def make_run(folder: Path, step: int) -> None:
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for name in ("checkpoint.pt", "progress.csv", "videos/a.mp4"):
        (folder / name).write_text(f"{name} {step}")
    (folder / "policy.pt.tmp").touch()  # half-written: stays, as the sweep's mark does
    (folder / "finished.json").touch()
    folder.with_name(folder.name + ".log").write_text(f"log {step}")


def test_a_run_folder_travels_in_pieces_and_only_what_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4)
    there, here, sent = tmp_path / "there/run", tmp_path / "here/run", {}
    make_run(there, 1)
    receiver = transfer.Receiver(here)
    for piece in transfer.pieces(there, sent):
        assert len(piece[1]) <= 4
        receiver.accept(piece)
    names = {"run/checkpoint.pt", "run/progress.csv", "run/videos/a.mp4", "run.log"}
    assert {str(path.relative_to(here.parent)) for path in here.parent.rglob("*") if path.is_file()} == names
    assert all((here.parent / name).read_bytes() == (there.parent / name).read_bytes() for name in names)
    assert list(transfer.pieces(there, sent)) == []
    (there / "progress.csv").write_text("longer than before")
    assert {name for name, _, _ in transfer.pieces(there, sent)} == {"run/progress.csv"}


@pytest.mark.parametrize("received", range(11))
def test_a_transfer_that_breaks_off_leaves_whole_files(tmp_path, monkeypatch, received):
    there, here = tmp_path / "there/run", tmp_path / "here/run"
    monkeypatch.setattr(transfer, "PIECE_BYTES", 6)
    for state in (1, 2):
        make_run(there, state)
        receiver, pieces = transfer.Receiver(here), list(transfer.pieces(there, {}))
        assert len(pieces) == 10
        for piece in pieces if state == 1 else pieces[:received]:
            receiver.accept(piece)
    texts = {name: (here / name).read_text() for name in ("checkpoint.pt", "progress.csv", "videos/a.mp4")}
    assert all(text in (f"{name} 1", f"{name} 2") for name, text in texts.items())
    assert (texts["checkpoint.pt"][-1] == "2") == (received >= 3)
    receiver = transfer.Receiver(here)  # of the next attempt
    for piece in transfer.pieces(there, {}):
        receiver.accept(piece)
    assert (here / "checkpoint.pt").read_text() == "checkpoint.pt 2"


def test_the_log_arrives_in_the_file_that_is_locked(tmp_path):
    there, here = tmp_path / "there/run", tmp_path / "here/run"
    make_run(there, 1)
    with training_process.lock(here.with_name("run.log")):
        receiver = transfer.Receiver(here)
        for piece in transfer.pieces(there, {}):
            receiver.accept(piece)
        assert here.with_name("run.log").read_text() == "log 1"
        assert training_process.lock(here.with_name("run.log")) is None


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
    write_run(tmp_path / "odd/Hopper-v4__1", 3, "one", [1.0])
    with pytest.raises(UserError, match="cannot be read"):
        curves.read_curves([str(tmp_path / "odd")])


def test_every_result_of_the_repository_can_be_read():
    found = curves.read_curves([str(BENCHMARK / "results")])
    assert len(found) > 100 and all(np.isfinite(curve["eval_return_mean"]).all() for curve in found)
    for path in BENCHMARK.glob("results/**/args.json"):
        assert not any(str(value).startswith("/") for value in json.loads(path.read_text()).values()), path


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
        "| Hopper-v4 | x | 2 | 3,000 | 28.0 ± 2.8 | 33.0 ± 9.9 | 32.5 | 25.2 ± 2.1 "
        "| 115 | 0:00:30 | deterministic evaluation return |"
    )
    tianshou = next(line for line in lines if "Tianshou SAC]" in line)
    assert "[Tianshou SAC](https://github.com/" in tianshou and "|  |  | 3542.2 ± 51.5 |  |" in tianshou
    assert "max average evaluation return within 1M steps" in tianshou
    assert not any("Ant" in line for line in lines)
    assert lines[0].count("|") == lines[2].count("|") == tianshou.count("|")
    folder = tmp_path / "tau=0.1"  # a folder, not a label; without times and args.json
    (folder / "Ant-v4__1").mkdir(parents=True)
    (folder / "Ant-v4__1/progress.csv").write_text("step,eval_return_mean\n5,1.5\n")
    lines = run("table", folder).stdout.splitlines()
    assert lines[2] == "| Ant-v4 | tau=0.1 | 1 | 5 | 1.5 | 1.5 | 1.5 | 1.5 |  |  | deterministic evaluation return |"


def test_the_table_up_to_steps_by_hand(tmp_path):
    write_run(tmp_path / "x/Hopper-v4__1", "Hopper-v4", 1, [float(10 * i) for i in range(12)])
    write_run(tmp_path / "x/Hopper-v4__2", "Hopper-v4", 2, [4.0] * 11)
    lines = run("table", tmp_path / "x", "--at", 999, 2000, 11500).stdout.splitlines()
    assert lines[0] == "| Environment | Program | Seeds | 999 | 2,000 | 11,500 |"
    assert lines[2] == "| Hopper-v4 | x | 2 |  | 4.5 ± 0.7 |  |"  # both begin at step 1,000, seed 2 ends at 11,000
    lines = run("table", tmp_path / "x/Hopper-v4__1", "--at", 11500).stdout.splitlines()
    assert lines[2:] == ["| Hopper-v4 | x | 1 | 55.0 |"]  # 10 to 100
    lines = run("table", tmp_path / "x").stdout.splitlines()
    assert "| 57.0 ± 75.0 | 57.0 ± 75.0 | 52.0 | 34.5 ± 43.1 |" in lines[2]  # best of the mean: (100 + 4) / 2


def test_the_comparison_by_hand(tmp_path):
    for label, finals in (("a", (100, 200, 300)), ("b", (200, 400, 600))):
        for seed, final in enumerate(finals):
            write_run(tmp_path / f"{label}/Hopper-v4__{seed}", "Hopper-v4", seed, [9.0, final])
    lines = run("compare", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}").stdout.splitlines()
    error = 100 * np.sqrt(1 / 3 + 4 / 3)
    freedom = (1 / 3 + 4 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (4 / 3) ** 2 / 2)  # Welch 1947
    p, half = stats.t.cdf(-200 / error, freedom), stats.t.ppf(0.975, freedom) * error
    assert lines[2:] == [
        f"| Hopper-v4 | a | 3 | 200 ± 100 | {p:.2f} | {-200 - half:.0f} to {-200 + half:.0f} |",
        "| Hopper-v4 | b | 3 | 400 ± 200 |  |  |",
    ]
    lines = run("compare", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", "--last", 2).stdout.splitlines()
    assert "| a | 3 | 104 ± 50 |" in lines[2] and "| b | 3 | 204 ± 100 |" in lines[3]
    assert "at least 1" in run("compare", tmp_path / "a", tmp_path / "b", "--last", 0, code=2).stderr
    nothing = run("compare", *(f"a={tmp_path}/a/Hopper-v4__{seed}" for seed in range(2)), code=2)
    assert "no environment has runs of both groups" in nothing.stderr and nothing.stdout == ""
    write_run(tmp_path / "x/c/Ant-v4__1", "Ant-v4", 1, [9.0])
    third = run("compare", f"a={tmp_path / 'a'}", tmp_path / "x", code=2)
    assert "no environment has runs of both groups" in third.stderr
    write_run(tmp_path / "b/Hopper-v4__7", "Hopper-v4", 7, [9.0, 8.0, 7.0])
    longer = run("compare", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", code=2)
    assert "Hopper-v4: the runs end at different steps, [2000, 3000]" in longer.stderr and longer.stdout == ""


def test_statistics_by_hand():
    sample = np.array([[0.0], [1.0], [2.0], [3.0], [100.0], [4.0], [5.0], [-90.0]])
    assert plot.interquartile_mean(sample, axis=0) == pytest.approx([2.5])  # of 1, 2, 3, 4
    assert plot.mean(sample, axis=0) == pytest.approx([25 / 8])
    for count in range(1, 14):
        values = np.random.default_rng(count).normal(size=(3, count))
        assert plot.interquartile_mean(values, axis=1) == pytest.approx(stats.trim_mean(values, 0.25, axis=1))
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
    run("plot", results / "plain/Hopper-v4__1", "--out", tmp_path / "one.svg", "--column", "wall_time_s")
    text = (tmp_path / "one.svg").read_text()
    assert ">wall time s<" in text and ">eval return mean<" not in text
    (results / "plain/Hopper-v4__1/progress.csv").write_text("step,wall_time_s\n1000,nan\n")
    result = run("plot", results / "plain/Hopper-v4__1", "--out", tmp_path / "two.svg", code=2)
    assert "nothing to draw" in result.stderr


def test_the_command_that_a_run_prints_needs_the_scripts_requirements_alone(results, tmp_path):
    gone = dict.fromkeys(("h5py", "minari", "ray", "rich", "scipy", "yaml"))
    argv = command("plot", results / "plain/Hopper-v4__1", "--out", tmp_path / "curves.png")[1:]
    program = f"import runpy, sys; sys.path[0] = {str(BENCHMARK)!r}; sys.argv = {argv}; sys.modules |= {gone}"
    program += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "curves.png").exists()


def test_scores_are_zero_for_random_and_one_for_the_published(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / f"x/Hopper-v4__{seed}", "Hopper-v4", seed, [18.77, 3542.2])
        write_run(tmp_path / f"x/Ant-v4__{seed}", "Ant-v4", seed, [-49.53, 5850.2])
    found = curves.read_curves([str(tmp_path / "x")])
    line = plot.plot_normalised(found, "eval_return_mean", plot.mean, "Tianshou SAC").axes[0].lines[0]
    assert line.get_ydata() == pytest.approx([0, 1])


def test_levels_are_the_means_of_last_values_of_each_environment(tmp_path):
    for seed, last in ((1, 10.0), (2, 30.0)):
        write_run(tmp_path / f"bc/Hopper-v4__{seed}", "Hopper-v4", seed, [5.0, last], expert=[0, 7 * last])
        write_run(tmp_path / f"bc/Ant-v4__{seed}", "Ant-v4", seed, [5.0, 2 * last], expert=[0, 9 * last])
    levels = plot.levels_of_runs(f"clone={tmp_path / 'bc'}", "eval_return_mean")
    levels += plot.levels_of_runs(f"best={tmp_path / 'bc'}:expert", "eval_return_mean")
    assert levels == [("Ant", "clone", 40), ("Hopper", "clone", 20), ("Ant", "best", 180), ("Hopper", "best", 140)]
    found = curves.read_curves([str(tmp_path / "bc")])
    figure = plot.plot_environments(found, "eval_return_mean", plot.mean, levels)
    assert [set(line.get_ydata()) for line in figure.axes[1].lines[1:]] == [{20}, {140}]


def test_a_level_has_the_same_marker_in_every_panel(tmp_path):
    for env_id in ("Ant-v4", "Hopper-v4"):
        write_run(tmp_path / f"x/{env_id}__1", env_id, 1, [5.0, 10.0])
    levels = [("Hopper", "a", 1.0), ("Ant", "b", 2.0), ("Hopper", "b", 3.0)]
    figure = plot.plot_environments(curves.read_curves([str(tmp_path / "x")]), "eval_return_mean", plot.mean, levels)
    ant, hopper = ({line.get_label(): line.get_marker() for line in panel.lines[1:]} for panel in figure.axes)
    assert ant["b"] == hopper["b"] != hopper["a"]


@pytest.mark.parametrize(
    ("program", "arguments", "complaint"),
    [
        ("plot", ["nowhere", "--out", "x"], "no such file"),
        ("plot", [".", "--out", "x"], "no run"),
        ("plot", ["X", "--out", "x.tif.doc"], "not supported"),
        ("plot", ["X", "--out", "."], "--out .: "),
        ("plot", ["X", "--out", "x", "--column", "gold"], "has no column gold"),
        ("plot", ["X", "--out", "x", "--normalise", "God"], "not a source"),
        ("plot", ["X", "--out", "x", "--normalise", "CleanRL SAC", "--published", "y"], "contradict"),
        ("plot", ["X", "--out", "x", "--normalise", "CleanRL SAC", "--level", "y=X"], "contradict"),
        ("plot", ["X", "--out", "x", "--level", "y=X/plain:gold"], "has no column gold"),
        ("plot", ["X"], "--out"),
        ("table", ["X", "--published", "X/plain/Hopper-v4__1/progress.csv"], "not a table of published results"),
        ("throughput", ["--out", "x", "--threads", "999"], "--threads 999"),
        ("throughput", ["--out", "x", "--steps", "10"], "--steps 10"),
        ("throughput", ["--out", "x", "--steps", "501", "--env-id", "None-v0"], "None-v0"),
        ("throughput", ["--out", "."], "must be a file"),
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
    shapes = measure.products_of_update(17, 6, batch=256, hidden=256)
    assert shapes.count((256, 256, 256)) == 16 and len(shapes) == 45


def test_throughput_measures_what_is_there(tmp_path, monkeypatch):
    without = tmp_path / "python"  # an interpreter that has neither package, and no other either
    without.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    without.chmod(0o755)
    plain = "this project, plain"  # compiled, it takes too long here
    monkeypatch.setattr(throughput, "OURS", {plain: throughput.OURS[plain], throughput.MEDIUM: {}})
    monkeypatch.setattr(throughput, "has_amx", lambda: False)
    monkeypatch.setattr(throughput, "WARM_UP", 50)
    result = run(
        *("throughput", "--out", tmp_path / "a.json", "--env-id", "Pendulum-v1", "--steps", 100, "--repeats", 1),
        *("--sb3-python", without, "--sbx-python", without),
    )
    assert "Stable-Baselines3: " in result.stderr and result.stderr.count("is not installed") == 2
    assert "| SBX | not measured" in result.stdout and "at most" in result.stdout
    text = (tmp_path / "a.json").read_text()
    assert str(tmp_path) not in text and sys.executable not in text
    ours, floor = json.loads(text)["results"]
    assert (ours["program"], floor["program"]) == (plain, "matrix products alone")
    assert 10 < ours["steps_per_s"] < 5000
    assert 0.05 < floor["products_ms"] < floor["all_ms"] * 1.5


def test_medians_and_ratios_of_all_programs(tmp_path, monkeypatch):
    speeds = dict(zip((*throughput.OURS, *throughput.PEERS), (300, 400, 200, 100, 250), strict=True))
    floor = {"all_ms": 2.0, "products_ms": 1.5, "products": 16}
    turns = []

    def measure(args, program, threads, folder):
        turns.append((program, threads))
        noise = (0, 1000, -10)[(len(turns) - 1) // 12]  # round by round
        return {"steps_per_s": speeds[program] * threads + noise} if program in speeds else floor

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(throughput, "has_amx", lambda: True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    result = run("throughput", "--out", tmp_path / "a.json", "--threads", 1, 2, "--repeats", 3)
    assert turns[:6] == [(name, 1) for name in (*speeds, throughput.FLOOR)] and len(turns) == 36
    one, two = result.stdout.split("| 2 threads |")
    assert "| this project, compiled | 300 | 3.00 | 1.20 |" in one
    assert "| this project, --matmul-precision medium | 800 | 4.00 | 1.60 |" in two
    assert "| SBX | 250 | 2.50 | 1.00 |" in one and "at most 500 updates a second" in two


@pytest.mark.parametrize("error", [UserError("the third failed"), KeyboardInterrupt()])
def test_what_was_measured_outlives_what_fails(tmp_path, monkeypatch, error):
    results = iter([{"steps_per_s": 1.0}, {"steps_per_s": 2.0}])

    def measure(*args):
        result = next(results, None)
        if result is None:
            raise error
        return result

    monkeypatch.setattr(throughput, "measure", measure)
    out = tmp_path / "a.json"
    out.write_text("an earlier one")
    code = 2 if isinstance(error, UserError) else 130
    assert f"what was measured until then is in {out}" in run("throughput", "--out", out, code=code).stderr
    assert [one["steps_per_s"] for one in json.loads(out.read_text())["results"]] == [1, 2]
    run("throughput", "--out", out, code=code)
    assert len(json.loads(out.read_text())["results"]) == 2, "lost for nothing"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
