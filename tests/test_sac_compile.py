"""sac_continuous.py with its update compiled to C++."""

import json
import os
import signal
import sys
import time

import pytest
import torch
from fault_campaign import differences
from test_sac_algorithm import copies, equal, filled_buffer, make_agent
from test_sac_resume import LONG, check_stop_and_resume, resume, stopped_run
from test_sac_run import run, same_policy, start

import sac_continuous as sac


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0, "num_critics": 1, "critic_backup": "mean", "num_layers": 1, "activation": "silu"},
        {"temperature": 0.3, "backup_entropy": False, "critic_backup": "double-q", "actor_std": "shared"},
        {"critic_backup": "redq", "num_critics": 4, "actor_gradient": "reinforce", "num_actor_samples": 3},
        {"critic_backup": "value", "squash": False, "activation": "leaky-relu"},
    ],
)
def test_compiled_gradients_are_the_plain_ones(settings):
    plain, compiled = (make_agent(batch_size=32, compile=c, **settings) for c in ("never", "always"))
    assert compiled.compiled and not plain.compiled
    assert equal(compiled, copies(plain))
    obs, action, *rest = filled_buffer()[torch.arange(32)]
    noise = torch.randn(32, 2, generator=torch.Generator().manual_seed(2))
    pair = torch.tensor([3, 1]) if settings.get("critic_backup") == "redq" else None
    inputs = {"critic": (obs, action, *rest, None if plain.value else noise, pair), "value": (obs, noise)}
    inputs["actor"] = obs, noise.repeat(plain.args.num_actor_samples, 1)
    called = set()
    for name in plain.optimizers:
        expected = plain.gradients_of[name](*inputs[name])
        sys.setprofile(lambda frame, event, argument: called.add(frame.f_code.co_name))
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = compiled.gradients_of[name](*inputs[name])
        sys.setprofile(None)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert called and not called & {"critic_loss", "actor_objective"}, called


def test_stopped_and_resumed_is_the_run_that_never_stopped(tmp_path, monkeypatch, capsys):
    check_stop_and_resume(tmp_path, monkeypatch, f"{LONG} --compile always", 61)
    assert "warning" not in capsys.readouterr().err


def test_uncompiled_from_somewhere_on_is_said(tmp_path, monkeypatch, capsys):
    stopped_run(tmp_path, monkeypatch, f"{LONG} --compile always", 61)
    assert resume(tmp_path, "stopped", "--compile", "never") == 0
    assert "1 threads, compiled before, --device cpu with 1 threads now: results will differ" in capsys.readouterr().err


def compiler_script(tmp_path, *lines):
    """The environment of a process whose C++ compiler is a script, in Python since shells meddle with signals."""
    script = tmp_path / "compiler"
    script.write_text("\n".join([f"#!{sys.executable}", "import os, pathlib, sys, time", *lines]) + "\n")
    script.chmod(0o755)
    return {"CXX": str(script)}


def test_without_a_compiler_it_is_said_once_and_trains_all_the_same(tmp_path, monkeypatch):
    for name, value in compiler_script(tmp_path, "sys.exit('no standard library')").items():
        monkeypatch.setenv(name, value)
    out, err = start(f"{LONG} --compile always --run-dir broken", tmp_path).communicate(timeout=100)
    assert err.count("warning: not compiled") == 1 and "g++" in err
    assert "Traceback" not in err and "evaluation return" in out
    assert run(tmp_path, f"{LONG} --compile never", "plain") == 0
    assert same_policy(tmp_path / "broken", tmp_path / "plain")
    saved = torch.load(tmp_path / "broken/checkpoint.pt", weights_only=True)["arithmetic"]
    assert saved == "--device cpu with 1 threads"


def test_ctrl_c_while_it_compiles_changes_no_result(tmp_path, monkeypatch):
    marker = tmp_path / "compiling"
    lines = [
        "if any('.main.cpp' in argument for argument in sys.argv):",
        f"    pathlib.Path({str(marker)!r}).touch()",
        "    time.sleep(0.5)",
        "os.execvp('c++', ['c++', *sys.argv[1:]])",
    ]
    for name, value in compiler_script(tmp_path, *lines).items():
        monkeypatch.setenv(name, value)
    process = start(f"{LONG} --compile always --run-dir stopped", tmp_path, start_new_session=True)
    deadline = time.time() + 100
    while not marker.exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "everything is saved" in out and "warning" not in err
    assert resume(tmp_path) == 0
    run(tmp_path, f"{LONG} --compile always", "whole")
    assert differences(tmp_path / "stopped", tmp_path / "whole") == []


@pytest.mark.parametrize(("total_steps", "resolved"), [(100_000, "always"), (99_999, "never")])
def test_auto_compiles_long_runs(tmp_path, monkeypatch, total_steps, resolved):
    arguments = f"{LONG} --compile auto --total-steps {total_steps}"
    stopped_run(tmp_path, monkeypatch, arguments, 10)
    assert json.loads((tmp_path / "stopped/args.json").read_text())["compile"] == resolved


def test_only_for_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sac, "set_up_torch", lambda args: torch.device("cuda", 0))
    assert run(tmp_path, f"{LONG} --compile always") == 2
    assert "--compile always: needs a CPU under Linux or macOS, this is cuda:0" in capsys.readouterr().err
