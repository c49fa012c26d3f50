"""bc.py: losses, batches, what it learns, and its runs from command line to run folder."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from imitation import (
    demonstrations,
    linear_expert,
    needs_real_files,
    real,
    rows,
    same_policy,
    same_run,
    stop_at_gradient_step,
    write_npz,
)
from torch.distributions import Independent, Normal

import bc
import dagger
import envs  # noqa: F401, registers Tiny-v0
import sac_continuous as sac

ROOT = Path(__file__).parent.parent
SMALL = "--env-id envs:Tiny-v0 --train-steps 50 --batch-size 20 --hidden-size 16 --torch-threads 1 --eval-every 20"
SMALL += " --eval-episodes 2 --log-every 10"


def run(tmp_path, arguments, name="run"):
    return bc.main([*arguments.split(), "--run-dir", str(tmp_path / name)])


@pytest.fixture
def data(tmp_path):
    return write_npz(tmp_path / "data.npz")


# --------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("script", [bc, dagger])
def test_a_gradient_may_lie_in_memory_in_another_order(script):
    weight, slope = torch.zeros(3, 3, requires_grad=True), torch.tensor([[1.0, -1, 1], [1, 1, -1], [1, 1, 1]])
    script.gradient_step(torch.optim.Adam([weight], lr=0.5, fused=True), (weight.mT * slope).sum())
    assert torch.allclose(weight, -0.5 * slope.mT)  # Adam's first step is the rate against the gradient's sign


def test_losses_against_torch_distributions():
    torch.manual_seed(0)
    mean, action = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    log_std = torch.randn(3, dtype=torch.float64).expand(7, 3)
    expected = -Independent(Normal(mean, log_std.exp()), 1).log_prob(action).mean()
    assert torch.allclose(bc.nll_loss(mean, log_std, action), expected)
    assert torch.allclose(bc.mse_loss(mean, action), torch.tensor(np.sum((mean - action).numpy() ** 2) / 7))


def test_squared_error_trains_the_mean_and_likelihood_the_standard_deviation():
    torch.manual_seed(0)
    actor = bc.Actor(2, 1, 8, 1, "tanh", "shared", squash=False)
    obs, action = torch.randn(9, 2), torch.randn(9, 1)
    loss, reported = bc.bc_loss(actor, obs, action, "mse")
    mean, log_std = actor(obs)
    expected = torch.autograd.grad((mean - action).square().mean(), actor.net[0].weight)[0]
    assert torch.allclose(torch.autograd.grad(loss, actor.net[0].weight, retain_graph=True)[0], expected)
    nll = -Normal(mean.detach(), log_std.exp()).log_prob(action).mean()
    assert torch.allclose(
        torch.autograd.grad(loss, actor.log_std)[0], torch.autograd.grad(nll, actor.log_std)[0], atol=1e-6
    )
    assert reported.item() == pytest.approx((mean - action).square().mean().item())


@pytest.mark.parametrize("loss", ["nll", "mse"])
def test_recovers_a_known_linear_gaussian_policy(loss, tmp_path):
    """Mean and standard deviation, in the environment's own units of -2..8, half width 5."""
    random = np.random.default_rng(0)
    obs = random.uniform(-1, 1, size=(4000, 2))
    slopes, offset, std = np.array([[1.5, -0.5], [0.0, 2.0]]), np.array([3.0, 2.0]), np.array([0.75, 1.5])
    action = obs @ slopes.T + offset + std * random.normal(size=(4000, 2))
    arrays = demonstrations(episodes=4, steps=1000) | {"observations": obs, "actions": action}
    write_npz(tmp_path / "d.npz", **arrays)
    kwargs = '{"low":-2,"high":8,"action_dim":2}'
    arguments = f"{SMALL} --env-kwargs {kwargs} --expert-data {tmp_path / 'd.npz'} --loss {loss} --train-steps 600"
    assert run(tmp_path, f"{arguments} --batch-size 400 --eval-every 600") == 0
    actor = bc.load_policy(str(tmp_path / "run"))["actor"]
    with torch.no_grad():
        mean, log_std = actor(torch.from_numpy(obs).float())
    error = 3 + 5 * mean.numpy() - (obs @ slopes.T + offset)
    assert np.sqrt((error**2).mean()) < 0.2
    assert 5 * log_std[0].exp().numpy() == pytest.approx(std, rel=0.05)
    last = rows(tmp_path / "run")[-1]
    if loss == "nll":  # the entropy of the true noise, in [-1, 1] units
        entropy = np.sum(np.log(std / 5) + 0.5 * np.log(2 * np.pi * np.e))
        assert float(last["validation_loss"]) == pytest.approx(entropy, abs=0.1)
    else:
        assert float(last["validation_loss"]) == pytest.approx(np.sum((std / 5) ** 2), rel=0.1)


# -------------------------------------------------------------------------------------------------------- batches


def test_batches_are_without_replacement_and_can_start_anywhere():
    rows_ = torch.arange(100, 123)
    batches = torch.stack(list(islice(bc.batches(rows_, 5, seed=1), 12)))  # 4 batches a pass, 3 rows left out
    for i in range(3):
        a_pass = batches[4 * i : 4 * i + 4].flatten()
        assert len(a_pass.unique()) == 20
        assert set(a_pass.tolist()) <= set(rows_.tolist())
    assert not torch.equal(batches[:4], batches[4:8])
    assert len(batches.unique()) == 23  # whoever is left out of one pass takes part in another
    for first in (1, 4, 7, 8):
        again = torch.stack(list(islice(bc.batches(rows_, 5, seed=1, first_step=first), 12 - first)))
        assert torch.equal(again, batches[first:])


def test_held_out_steps_are_never_trained_on(tmp_path, data, monkeypatch):
    seen = {True: set(), False: set()}
    original = bc.bc_loss

    def spying(actor, obs, action, kind):
        seen[torch.is_grad_enabled()] |= {tuple(row) for row in obs.tolist()}
        return original(actor, obs, action, kind)

    monkeypatch.setattr(bc, "bc_loss", spying)
    assert run(tmp_path, f"{SMALL} --expert-data {data} --validation-fraction 0.25") == 0
    assert len(seen[True]) == 45
    assert len(seen[False]) == 15
    assert not seen[True] & seen[False]


# ----------------------------------------------------------------------------------------------------------- runs


def start(arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, str(ROOT / "bc.py"), *arguments.split()]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_a_run_as_a_process(tmp_path):
    expert = linear_expert(tmp_path / "expert.pt", np.zeros((6, 17)), "HalfCheetah-v4")
    arguments = "--train-steps 40 --eval-every 30 --eval-episodes 2 --max-episode-steps 100 --torch-threads 1"
    done = start(f"--env-id HalfCheetah-v4 --expert {expert} {arguments} --save-data d.npz", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [x for x in done.stderr.replace("\r", "\n").splitlines() if x.strip() and "step" not in x] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.npz", "expert.pt", "runs"]  # no MUJOCO_LOG.TXT
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"HalfCheetah-v4__bc__1__\d{8}-\d{6}", run_dir.name)
    assert [row["step"] for row in rows(run_dir)] == ["30", "40"]
    columns = "step wall_time_s eval_return_mean eval_return_std eval_length_mean train_loss validation_loss"
    columns += " eval_sampled_return_mean eval_sampled_return_std expert_return_mean distance_from_demonstrations"
    assert list(rows(run_dir)[0]) == columns.split()
    settings = json.loads((run_dir / "args.json").read_text())
    assert settings["learning_rate"] == 5e-3
    assert settings["versions"]["torch"].startswith("2.")
    assert list(run_dir.glob("events.out.tfevents.*"))
    assert f"plot.py runs/{run_dir.name} --out runs/{run_dir.name}/curves.png" in done.stdout
    assert f"tensorboard --logdir runs/{run_dir.name}" in done.stdout
    assert f"bc.py --evaluate runs/{run_dir.name}" in done.stdout
    with np.load(tmp_path / "d.npz") as saved:
        assert saved["observations"].shape == (200, 17)
        assert np.flatnonzero(saved["truncations"]).tolist() == [99, 199]

    done = start(f"--evaluate {run_dir} --eval-episodes 2", tmp_path)
    mean = re.search(r"return (\S+) \+- (\S+) over 2 episodes", done.stdout).group(1)
    assert float(mean) == pytest.approx(float(rows(run_dir)[-1]["eval_return_mean"]), abs=0.01)


def test_policy_files_of_the_three_scripts_have_the_same_keys_and_each_script_evaluates_them(tmp_path, data, capsys):
    expert = linear_expert(tmp_path / "expert.pt", [[1.0, 0.0]], "envs:Tiny-v0")
    run(tmp_path, f"{SMALL} --expert-data {data}", "bc")
    small = "--train-steps-per-iteration 20 --num-iterations 2 --rollout-steps 20 --batch-size 10 --eval-episodes 2"
    folder = str(tmp_path / "dagger")
    assert dagger.main(["--env-id", "envs:Tiny-v0", "--expert", expert, "--run-dir", folder, *small.split()]) == 0
    small = "--total-steps 60 --learning-starts 40 --random-steps 40 --batch-size 8 --eval-episodes 2"
    assert sac.main(["--env-id", "envs:Tiny-v0", "--run-dir", str(tmp_path / "sac"), *small.split()]) == 0
    policies = {name: torch.load(tmp_path / name / "policy.pt", weights_only=True) for name in ("bc", "dagger", "sac")}
    assert {name: policy["algorithm"] for name, policy in policies.items()} == {name: name for name in policies}
    assert policies["bc"].keys() == policies["dagger"].keys() == policies["sac"].keys()
    for name in policies:
        capsys.readouterr()
        for script in (bc, dagger, sac):
            assert script.main(["--evaluate", str(tmp_path / name), "--eval-episodes", "2"]) == 0
        assert len(set(capsys.readouterr().out.splitlines())) == 1
        mean = rows(tmp_path / name)[-1]["eval_return_mean"]
        script.main(["--evaluate", str(tmp_path / name), "--eval-episodes", "2"])
        assert f"return {float(mean):.2f}" in capsys.readouterr().out


def test_same_seed_same_bytes_and_evaluating_changes_nothing(tmp_path, data):
    arguments = f"{SMALL} --expert-data {data}"
    for name, more in [("a", ""), ("b", ""), ("c", "--seed 2"), ("d", "--eval-every 7 --eval-episodes 5")]:
        run(tmp_path, f"{arguments} {more} --save-data {tmp_path / name}.npz", name)
    assert same_run(tmp_path / "a", tmp_path / "b")
    assert not same_policy(tmp_path / "a/policy.pt", tmp_path / "c/policy.pt")
    assert same_policy(tmp_path / "a/policy.pt", tmp_path / "d/policy.pt")
    run(tmp_path, f"{SMALL} --expert-data {tmp_path / 'a.npz'}", "e")
    assert same_run(tmp_path / "a", tmp_path / "e")


def test_expert_return_is_the_experts_or_else_the_demonstrations(tmp_path, data):
    run(tmp_path, f"{SMALL} --expert-data {data}", "data")
    returns = demonstrations()["rewards"].reshape(3, 20).sum(1)
    assert float(rows(tmp_path / "data")[0]["expert_return_mean"]) == pytest.approx(returns.mean(), rel=1e-5)
    expert = linear_expert(tmp_path / "expert.pt", [[1.0, 0.0]], "envs:Tiny-v0")
    run(tmp_path, f"{SMALL} --expert-data {data} --expert {expert}", "expert")
    args = bc.Args(env_id="envs:Tiny-v0")
    actor = bc.load_policy(expert)["actor"]
    returns = bc.evaluate(actor, [bc.make_env(args) for _ in range(2)])["returns"]
    assert float(rows(tmp_path / "expert")[0]["expert_return_mean"]) == pytest.approx(returns.mean(), rel=1e-6)


def test_a_row_has_the_returns_of_the_mean_and_of_sampled_actions(tmp_path, data):
    run(tmp_path, f"{SMALL} --expert-data {data}")
    last = rows(tmp_path / "run")[-1]
    actor = bc.load_policy(str(tmp_path / "run"))["actor"]
    eval_envs = [bc.make_env(bc.Args(env_id="envs:Tiny-v0")) for _ in range(2)]
    for column, noise in (("eval_return", None), ("eval_sampled_return", bc.stream(bc.EVALUATION, 1))):
        returns = bc.evaluate(actor, eval_envs, noise)["returns"]
        assert float(last[f"{column}_mean"]) == pytest.approx(returns.mean(), rel=1e-6)
        assert float(last[f"{column}_std"]) == pytest.approx(returns.std(), rel=1e-6)
    assert last["eval_return_mean"] != last["eval_sampled_return_mean"]


def test_sampled_evaluation_by_hand():
    """Two episodes of sampled actions, replayed one after the other with the same noise."""
    actor = bc.Actor(2, 1, 8, 1, "tanh", "shared", squash=False)
    args = bc.Args(env_id="envs:Tiny-v0")
    envs_ = [bc.make_env(args) for _ in range(2)]
    result = bc.evaluate(actor, envs_, noise=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.randn(2, 1, generator=generator) for _ in range(20)])
    for i, env in enumerate(envs_):
        obs, total = env.reset(seed=bc.EVALUATION_SEED + i)[0], 0.0
        for t in range(20):
            with torch.no_grad():
                mean, log_std = actor(torch.from_numpy(obs)[None])
            obs, reward, *_ = env.step((mean + log_std.exp() * noise[t, i]).numpy()[0])
            total += reward
        assert result["returns"][i] == pytest.approx(total, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [1, 13, 20, 49])
def test_stopped_anywhere_and_resumed_is_the_run_that_never_stopped(tmp_path, data, monkeypatch, capsys, step):
    arguments = f"{SMALL} --expert-data {data}"
    run(tmp_path, arguments, "whole")
    with monkeypatch.context() as patch:
        stop_at_gradient_step(patch, bc, step, signal.SIGINT)
        assert run(tmp_path, arguments, "stopped") == 130
    assert f"--resume {tmp_path / 'stopped'}" in capsys.readouterr().out
    assert bc.main(["--resume", str(tmp_path / "stopped")]) == 0
    assert same_run(tmp_path / "whole", tmp_path / "stopped")
    capsys.readouterr()
    assert bc.main(["--resume", str(tmp_path / "stopped")]) == 0
    assert "is finished" in capsys.readouterr().out


def test_resume_notices_other_demonstrations_and_other_settings(tmp_path, data, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at_gradient_step(patch, bc, 30)
        run(tmp_path, f"{SMALL} --expert-data {data}")
    assert bc.main(["--resume", str(tmp_path / "run"), "--learning-rate", "0.1"]) == 2
    assert "--learning-rate 0.1 (saved: 0.005)" in capsys.readouterr().err
    write_npz(data, actions=-demonstrations()["actions"])
    assert bc.main(["--resume", str(tmp_path / "run")]) == 2
    assert "not those that the run began with" in capsys.readouterr().err


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, data, monkeypatch, capsys):
    arguments = f"{SMALL} --expert-data {data}"
    run(tmp_path, arguments, "whole")
    with monkeypatch.context() as patch:
        stop_at_gradient_step(patch, bc, 45)
        run(tmp_path, arguments)
    checkpoint = tmp_path / "run/checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-50])
    assert bc.main(["--resume", str(tmp_path / "run")]) == 0
    assert "going on from the one before" in capsys.readouterr().err
    assert same_run(tmp_path / "whole", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ bad input

BAD = [
    ("--train-steps 0", "--train-steps 0: must be at least 1"),
    ("--learning-rate nan", "--learning-rate nan: must be above 0"),
    ("--validation-fraction 1", "--validation-fraction 1.0: must be 0 or more and below 1"),
    ("--batch-size 55", "--batch-size 55: 54 of the 60 demonstrated steps are to train on"),
    ("--num-trajectories 4", "--num-trajectories 4: .*data.npz has 3"),
    ("--save-data x.txt", "must end in .npz"),
    ("--save-data /nowhere/x.npz", "--save-data /nowhere/x.npz: exists already or cannot be written"),
    ("--env-id Pendulum-v1", "observations have 2 numbers, those of Pendulum-v1 have 3"),
    ("--env-id CartPole-v1", "supported are flat bounded Box actions"),
    ("--expert nothing.pt", "nothing.pt: cannot be read"),
    ("--device abacus", "--device abacus"),
    ("--resume a --evaluate b", "contradict each other"),
    ("--video-every 3", "--video-every 3 and --capture-video False"),
    ("--video-episodes 3", "--video-episodes 3 and --capture-video False"),
    ("--capture-video --video-every 0", "--video-every 0: must be at least 1"),
    ("--render", "--render True and --evaluate None"),
    ("--capture-video", "envs:Tiny-v0 .* unexpected keyword argument 'render_mode'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_gets_one_line_and_exit_code_2_and_leaves_nothing(tmp_path, data, capsys, arguments, message):
    assert run(tmp_path, f"{SMALL} --expert-data {data} {arguments}") == 2
    err = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message}.*\n", err)
    assert os.listdir(tmp_path) == ["data.npz"]


def test_no_expert_and_no_data(tmp_path, capsys):
    assert run(tmp_path, SMALL) == 2
    assert "there is no expert for it; give --expert or --expert-data" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_save_data_never_overwrites(tmp_path, data, capsys):
    assert run(tmp_path, f"{SMALL} --expert-data {data} --batch-size 9 --num-trajectories 1 --save-data {data}") == 2
    assert "exists already" in capsys.readouterr().err
    assert len(bc.read_npz(data)[0]["actions"]) == 60


def test_a_loss_that_becomes_infinite_ends_the_run_with_1(tmp_path, capsys):
    data = write_npz(tmp_path / "d.npz", actions=np.full((60, 1), 1e30, np.float32))
    assert run(tmp_path, f"{SMALL} --expert-data {data}") == 1
    assert "loss became NaN or infinite" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- what is shipped


def test_metadata_names_what_the_repository_pins():
    header = (ROOT / "bc.py").read_text().split("# ///\n")[0].removeprefix("# /// script\n")
    metadata = tomllib.loads("".join(line.removeprefix("# ") for line in header.splitlines(keepends=True)))
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(metadata["dependencies"]) <= set(pinned)


@pytest.mark.parametrize("path", sorted((ROOT / "experts").glob("*.pt")), ids=lambda path: path.stem)
def test_starts_on_the_experts_that_are_shipped(path, tmp_path):
    assert f"`{path.name}`" in (path.parent / "README.md").read_text()
    arguments = f"--env-id {path.stem} --train-steps 100 --eval-episodes 1 --torch-threads 1"
    assert run(tmp_path, f"{arguments} --num-trajectories 1") == 0
    assert float(rows(tmp_path / "run")[-1]["expert_return_mean"]) > 2000


@needs_real_files
def test_clones_the_real_demonstrations(tmp_path):
    """Half of the published steps are enough for HalfCheetah; Hopper's two demonstrations are not enough ever."""
    for env_id, steps in (("HalfCheetah-v4", 600), ("Hopper-v4", 1000)):
        data, expert = (real(f"expert_{kind}_{env_id}.pkl") for kind in ("data", "policy"))
        arguments = f"--env-id {env_id} --expert-data {data} --expert {expert} --train-steps {steps} --eval-every 1000"
        assert run(tmp_path, f"{arguments} --eval-episodes 3 --torch-threads 1", env_id) == 0
    share = {}
    for env_id in ("HalfCheetah-v4", "Hopper-v4"):
        last = rows(tmp_path / env_id)[-1]
        share[env_id] = float(last["eval_sampled_return_mean"]) / float(last["expert_return_mean"])
    assert share["HalfCheetah-v4"] > 0.8
    assert share["Hopper-v4"] < 0.6
