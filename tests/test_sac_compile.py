"""sac_continuous.py with its update compiled to C++. Compiling takes its time: as few programs as will do."""

import sys
import threading
import time

import pytest
import torch
from fault_campaign import differences
from test_sac_algorithm import copies, equal, filled_buffer, make_agent
from test_sac_resume import resume
from test_sac_run import SMALL, run, start

import sac_continuous as sac

LONG = f"--env-id envs:Tiny-v0 {SMALL} --total-steps 600 --compile always --checkpoint-every 10"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A process that compiles beside this one and is killed once it trains, and the thread that kills it."""
    folder = tmp_path_factory.mktemp("compiled")
    process = start(f"{LONG} --run-dir killed", folder)

    def kill_after_some_updates():
        while process.poll() is None and not (folder / "killed/policy.pt").exists():
            time.sleep(0.002)
        process.kill()

    killer = threading.Thread(target=kill_after_some_updates)
    killer.start()
    yield folder, killer
    process.kill()
    killer.join()
    process.communicate()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"critic_backup": "value", "actor_gradient": "reinforce", "num_actor_samples": 3, "actor_std": "shared"},
    ],
    ids=["default", "value-reinforce"],
)
def test_compiled_gradients_are_the_plain_ones(settings, killed):
    """Also on further batches, without compiling again and without a step of Python through the losses."""
    plain, compiled = (make_agent(2, 1, batch_size=16, compile=c, **settings) for c in ("never", "always"))
    assert equal(compiled, copies(plain))
    buffer, noise = filled_buffer(2, 1), torch.randn(2, 48, 1, generator=torch.Generator().manual_seed(2))
    called = set()
    for i in range(2):
        batch = buffer[torch.arange(16 * i, 16 * i + 16)]
        given = {
            "critic": (*batch, noise[i, :16], None),
            "actor": (batch[0], noise[i, : 16 * plain.args.num_actor_samples]),
        }
        given |= {"value": (batch[0], noise[i, :16])} if plain.value else {}
        for name, arguments in given.items():
            expected = getattr(plain, f"{name}_gradients")(*arguments)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                sys.setprofile((lambda frame, event, _: called.add(frame.f_code.co_name)) if i else None)
                found = getattr(compiled, f"{name}_gradients")(*arguments)
                sys.setprofile(None)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        for agent in (plain, compiled):
            agent.step(agent.actor.parameters(), [torch.full_like(p, 0.1 * i) for p in agent.actor.parameters()])
    assert called and not called & {"critic_loss", "actor_objective", "actor_loss", "log_prob"}, called


def test_killed_and_resumed_is_the_run_that_never_stopped(killed, capsys):
    folder, killer = killed
    killer.join()
    checkpoint = torch.load(folder / "killed/checkpoint.pt", weights_only=True)
    assert checkpoint["compile"] == "always" and 40 <= checkpoint["progress"][0] < 600
    assert resume(folder, "killed", "--env-id", "envs:Tiny-v0") == 0
    assert run(folder, LONG, "whole") == 0
    assert "compiling" in capsys.readouterr().err
    assert differences(folder / "killed", folder / "whole") == []


def test_auto_compiles_long_runs_where_it_can(monkeypatch):
    def chosen(arguments):
        return sac.parse_args(arguments.split())[0].compile

    assert (chosen("--total-steps 100000"), chosen("--total-steps 99999")) == ("always", "never")
    assert chosen("--total-steps 99999 --compile always") == "always"
    monkeypatch.setenv("CXX", "nosuchcompiler")
    assert chosen("--total-steps 100000") == "never"
    with pytest.raises(sac.Failure, match=r"--compile always: .*C\+\+ compiler"):
        chosen("--compile always")
