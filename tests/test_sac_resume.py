"""sac_continuous.py stopped, broken and resumed."""

import json
import os
import pickle
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from fault_campaign import campaign, differences
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_sac_run import SMALL, rows, run, same_policy, start, untimed

import sac_continuous as sac

LONG = f"--env-id envs:Tiny-v0 {SMALL} --buffer-size 70"


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Has the signal arrive while the environment makes its step `step`, counted from the start of this process."""
    original, count = sac.TrainingEnv.step, [0]

    def counting(self, action):
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), number)
        return original(self, action)

    monkeypatch.setattr(sac.TrainingEnv, "step", counting)


def stopped_run(tmp_path, monkeypatch, arguments, step, name="stopped"):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert run(tmp_path, arguments, name) == 143


def resume(tmp_path, name="stopped", *more):
    return sac.main(["--resume", str(tmp_path / name), *more])


def check_stop_and_resume(tmp_path, monkeypatch, arguments, step):
    run(tmp_path, arguments, "whole")
    stopped_run(tmp_path, monkeypatch, arguments, step)
    assert resume(tmp_path) == 0
    assert differences(tmp_path / "stopped", tmp_path / "whole") == []


VARIANTS = [
    "",
    "--lr-schedule linear --critic-backup value --temperature 0.1",
    "--critic-backup redq --num-critics 3 --num-critic-updates 2 --target-update-period 3 --actor-gradient reinforce",
    "--critic-backup double-q --actor-std shared --no-squash",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_anywhere_and_resumed_is_the_run_that_never_stopped(tmp_path, monkeypatch, variant):
    arguments = f"{LONG} {variant}"
    run(tmp_path, arguments, "whole")
    for step in (1, 33, 60, 61, 99):
        name = f"stopped{step}"
        stopped_run(tmp_path, monkeypatch, arguments, step, name)
        assert torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["step"] == step
        assert resume(tmp_path, name) == 0
        assert differences(tmp_path / name, tmp_path / "whole") == []


@pytest.mark.parametrize("env_id", ["Hopper-v4", "HalfCheetah-v4", "Ant-v4"])
def test_a_simulator_is_rebuilt_in_the_middle_of_an_episode(tmp_path, monkeypatch, env_id):
    check_stop_and_resume(tmp_path, monkeypatch, f"--env-id {env_id} {SMALL} --max-episode-steps 70", 55)


def test_killed_at_random_moments(tmp_path):
    kills, runs, differing = campaign("sac_continuous.py", 3, tmp_path)
    assert kills >= 3
    assert runs >= 1
    assert differing == 0


def test_killed_before_its_first_checkpoint_starts_anew(tmp_path, monkeypatch):
    run(tmp_path, LONG, "whole")
    stopped_run(tmp_path, monkeypatch, LONG, 55)
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "policy.pt"):
        (tmp_path / "stopped" / name).unlink(missing_ok=True)
    with open(tmp_path / "stopped" / "progress.csv", "a") as file:
        file.write("100,1.0,2")  # cut off in the middle of a row
    assert resume(tmp_path) == 0
    assert differences(tmp_path / "stopped", tmp_path / "whole") == []


def test_a_folder_left_by_a_run_killed_before_it_wrote_anything_is_free(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / "args.json.tmp").write_text("{")
    assert run(tmp_path, LONG) == 0


def test_a_finished_run_says_so_and_can_be_continued(tmp_path, capsys):
    run(tmp_path, LONG, "short")
    capsys.readouterr()
    assert resume(tmp_path, "short") == 0
    assert "is finished" in capsys.readouterr().out
    run(tmp_path, f"{LONG} --total-steps 180", "whole")
    assert resume(tmp_path, "short", "--total-steps", "180") == 0
    assert same_policy(tmp_path / "short", tmp_path / "whole")
    assert untimed(tmp_path / "short")[-1] == untimed(tmp_path / "whole")[-1] | {
        name: untimed(tmp_path / "short")[-1][name] for name in ("train_return_mean", "train_length_mean")
    }


def test_tensorboard_goes_on_where_the_checkpoint_was(tmp_path, monkeypatch):
    run(tmp_path, LONG, "whole")
    stopped_run(tmp_path, monkeypatch, LONG, 95)
    for name in ("checkpoint.pt",):  # so that points at 70, 80, 90 were written and are written again
        (tmp_path / "stopped" / name).unlink()
    resume(tmp_path)
    points = {}
    for name in ("whole", "stopped"):
        events = EventAccumulator(str(tmp_path / name)).Reload()
        points[name] = [(event.step, event.value) for event in events.Scalars("learning/critic_loss")]
    assert points["whole"] == points["stopped"]
    assert len(points["whole"]) == 8


def test_an_environment_that_cannot_be_replayed_gets_a_new_episode_and_a_warning(tmp_path, monkeypatch, capsys):
    arguments = LONG.replace("envs:Tiny-v0", 'envs:Tiny-v0 --env-kwargs {"noise":true}')
    stopped_run(tmp_path, monkeypatch, arguments, 55)
    assert resume(tmp_path) == 0
    assert "not deterministic" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- broken files


def spoil_cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def spoil_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def spoil_empty(path):
    path.write_bytes(b"")


def spoil_version(path):
    torch.save(torch.load(path, weights_only=True) | {"format": "sac-checkpoint/99"}, path)


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def spoil_hostile(path):
    torch.save({"format": sac.CHECKPOINT_FORMAT, "step": Hostile(path.parent / "executed")}, path)


def spoil_pickle(path):
    path.write_bytes(pickle.dumps(Hostile(path.parent / "executed")))


SPOILS = [spoil_cut, spoil_flip, spoil_empty, spoil_version, spoil_hostile, spoil_pickle]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_broken_checkpoint_is_noticed_and_the_one_before_used(tmp_path, monkeypatch, capsys, spoil):
    run(tmp_path, LONG, "whole")
    stopped_run(tmp_path, monkeypatch, LONG, 99)
    spoil(tmp_path / "stopped" / "checkpoint.pt")
    capsys.readouterr()
    assert resume(tmp_path) == 0
    warning = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warning) == 1
    assert "checkpoint.pt" in warning[0]
    assert not (tmp_path / "stopped" / "executed").exists()
    assert differences(tmp_path / "stopped", tmp_path / "whole") == []


def test_two_broken_checkpoints_are_an_error_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    stopped_run(tmp_path, monkeypatch, LONG, 99)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        spoil_flip(tmp_path / "stopped" / name)
    before = {path.name: path.read_bytes() for path in (tmp_path / "stopped").iterdir()}
    capsys.readouterr()
    assert resume(tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "stopped").iterdir()}


def test_a_checkpoint_of_another_run_does_not_fit(tmp_path, monkeypatch, capsys):
    stopped_run(tmp_path, monkeypatch, LONG, 99)
    run(tmp_path, f"{LONG} --hidden-size 8", "other")
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / "stopped" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    capsys.readouterr()
    assert resume(tmp_path) == 2
    err = capsys.readouterr().err
    assert "does not fit its args.json" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": 1}', None, "bad type"])
def test_broken_settings(tmp_path, monkeypatch, capsys, text):
    stopped_run(tmp_path, monkeypatch, LONG, 20)
    path = tmp_path / "stopped" / "args.json"
    if text is None:
        path.unlink()
    elif text == "bad type":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"batch_size": "many"}))
    else:
        path.write_text(text)
    capsys.readouterr()
    assert resume(tmp_path) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "args.json" in err


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX systems do")
def test_a_full_disk_while_saving_is_one_line_and_loses_nothing(tmp_path):
    """The limit lets the first checkpoints through and cuts a later, larger one off."""
    run(tmp_path, f"{LONG} --buffer-size 100000 --total-steps 1500", "whole")
    script = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
    script += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = f"{LONG} --buffer-size 100000 --total-steps 1500 --run-dir full".split()
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [os.sys.executable, "-c", script, sac.__file__, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "--resume full" in errors[0]
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "full").glob("*.tmp"))
    assert resume(tmp_path, "full") == 0
    assert differences(tmp_path / "full", tmp_path / "whole") == []


# --------------------------------------------------------------------------------------------- processes, signals


def wait_for(path, size=1, seconds=60):
    deadline = time.time() + seconds
    while not (path.exists() and path.stat().st_size >= size):
        assert time.time() < deadline
        time.sleep(0.02)


def test_a_second_process_is_refused_while_the_first_lives_and_not_after(tmp_path, capsys):
    first = start(f"{LONG} --total-steps 1000000 --run-dir run", tmp_path)
    wait_for(tmp_path / "run" / "checkpoint.pt")
    assert resume(tmp_path, "run") == 2
    assert "another process" in capsys.readouterr().err
    assert run(tmp_path, LONG, "run") == 2
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert resume(tmp_path, "run", "--total-steps", "60") == 0


def test_sigterm_saves_and_ends_with_143(tmp_path):
    process = start(f"{LONG} --total-steps 1000000 --checkpoint-every 1000000 --run-dir run", tmp_path)
    wait_for(tmp_path / "run" / "progress.csv")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "--resume run" in out
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert "Traceback" not in err


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    code = "import os, signal, sac_continuous as s; stop = s.StopSignal(); os.kill(os.getpid(), signal.SIGINT); "
    code += "print(stop.number, flush=True); os.kill(os.getpid(), signal.SIGINT); print('still here', flush=True)"
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(sac.__file__)}
    done = subprocess.run([os.sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "2\n", "")


# ------------------------------------------------------------------------------------------------------ settings


def test_settings_that_contradict_the_saved_ones_are_listed(tmp_path, monkeypatch, capsys):
    stopped_run(tmp_path, monkeypatch, f"{LONG} --gamma 0.9", 55)
    capsys.readouterr()
    assert resume(tmp_path, "stopped", "--gamma", "0.99", "--seed", "5", "--batch-size", "16") == 2
    err = capsys.readouterr().err
    assert "--gamma 0.99 (saved: 0.9)" in err
    assert "--seed 5 (saved: 1)" in err
    assert "batch" not in err
    assert err.count("\n") == 1


def test_evaluation_settings_may_change_and_threads_with_a_warning(tmp_path, monkeypatch, capsys):
    run(tmp_path, LONG, "whole")
    stopped_run(tmp_path, monkeypatch, LONG, 55)
    capsys.readouterr()
    assert resume(tmp_path, "stopped", "--eval-every", "10", "--eval-episodes", "1") == 0
    assert "warning" not in capsys.readouterr().err
    assert same_policy(tmp_path / "stopped", tmp_path / "whole")
    assert len(rows(tmp_path / "stopped")) > len(rows(tmp_path / "whole"))

    stopped_run(tmp_path, monkeypatch, LONG, 55, "threads")
    capsys.readouterr()
    assert resume(tmp_path, "threads", "--torch-threads", "2") == 0
    torch.set_num_threads(1)
    assert re.search(r"1 threads before, .* 2 threads now: results will differ", capsys.readouterr().err)


def test_total_steps_may_not_change_under_a_linear_schedule(tmp_path, monkeypatch, capsys):
    stopped_run(tmp_path, monkeypatch, f"{LONG} --lr-schedule linear", 55)
    assert resume(tmp_path, "stopped", "--total-steps", "200") == 2
    assert "--total-steps 200 (saved: 120)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "kwargs",
    [
        {"reward_scale": 1e6},
        {"reward_scale": 1e-6},
        {"obs_scale": 1e6},
        {"obs_scale": 1e-6},
        {"action_dim": 17},
        {"length": 1},
        {"length": 2},
    ],
)
def test_extreme_problems_leave_everything_finite(tmp_path, kwargs):
    text = json.dumps(kwargs, separators=(",", ":"))
    assert run(tmp_path, f"--env-id envs:Tiny-v0 --env-kwargs {text} {SMALL} --total-steps 400") == 0

    def finite(value):
        if isinstance(value, torch.Tensor):
            return bool(value.isfinite().all()) if value.is_floating_point() else True
        if isinstance(value, dict):
            return all(map(finite, value.values()))
        return all(map(finite, value)) if isinstance(value, list | tuple) else True

    for name in ("checkpoint.pt", "policy.pt"):
        assert finite(torch.load(tmp_path / "run" / name, weights_only=True))
    assert all(np.isfinite(float(row["q_values"])) for row in rows(tmp_path / "run"))
