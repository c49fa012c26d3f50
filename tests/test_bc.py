"""bc.py: losses, batches, what it learns, and its runs from command line to run folder."""

import errno
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from imitation import (
    HOMEWORK,
    ODD_CENTRE,
    ODD_HALF_WIDTH,
    ROOT,
    demonstrations,
    linear_expert,
    load_actor,
    make_actor,
    needs_real_files,
    policy_of,
    real_arguments,
    rows,
    run,
    same_policy,
    same_run,
    the_error,
    write_npz,
)
from torch.distributions import Independent, Normal

import bc
import dagger
import envs  # noqa: F401, registers Tiny-v0
import sac_continuous as sac

SMALL = "--env-id Tiny-v0 --train-steps 50 --batch-size 20 --hidden-size 16 --torch-threads 1 --eval-every 20"
SMALL += " --eval-episodes 2 --log-every 10"


@pytest.fixture
def small(tmp_path):
    """Arguments for a small run on demonstrations."""
    return f"{SMALL} --expert-data {write_npz(tmp_path / 'data.npz')}"


# ------------------------------------------------------------------------------------------------------------- losses
def test_losses_against_torch_distributions():
    torch.manual_seed(0)
    mean, action = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    log_std = torch.randn(3, dtype=torch.float64).expand(7, 3)
    expected = -Independent(Normal(mean, log_std.exp()), 1).log_prob(action).mean()
    assert torch.allclose(bc.nll_loss(mean, log_std, action), expected)
    assert torch.allclose(bc.mse_loss(mean, action), torch.tensor(np.sum((mean - action).numpy() ** 2) / 7))


def test_squared_error_trains_the_mean_and_likelihood_the_standard_deviation():
    torch.manual_seed(0)
    actor = make_actor()
    obs, action = torch.randn(9, 2), torch.randn(9, 1)
    loss, reported = bc.bc_loss(actor, obs, action, "mse")
    mean, log_std = actor(obs)
    weight, squared_error = actor.net[0].weight, (mean - action).square().mean()
    [expected] = torch.autograd.grad(squared_error, weight)
    assert torch.allclose(torch.autograd.grad(loss, weight, retain_graph=True)[0], expected)
    nll = -Normal(mean.detach(), log_std.exp()).log_prob(action).mean()
    [expected] = torch.autograd.grad(nll, actor.log_std)
    assert torch.allclose(torch.autograd.grad(loss, actor.log_std)[0], expected, atol=1e-6)
    assert reported.item() == pytest.approx(squared_error.item())


def test_likelihood_trains_both():
    torch.manual_seed(0)
    actor = make_actor()
    obs, action = torch.randn(9, 2), torch.randn(9, 1)
    mean, log_std = actor(obs)
    parameters, expected = list(actor.parameters()), -Normal(mean, log_std.exp()).log_prob(action).mean()
    loss, reported = bc.bc_loss(actor, obs, action, "nll")
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert reported.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["nll", "mse"])
def test_recovers_a_known_linear_gaussian_policy(loss, tmp_path):
    """Mean and standard deviation, in the environment's own units, another scale for each action."""
    random = np.random.default_rng(0)
    obs = random.uniform(-1, 1, size=(4000, 2))
    slopes, offset, std = np.array([[1.5, -0.5], [0.0, 0.1]]), np.array([3.0, 0.3]), np.array([0.75, 0.05])
    action = obs @ slopes.T + offset + std * random.normal(size=(4000, 2))
    arrays = demonstrations(episodes=4, steps=1000) | {"observations": obs, "actions": action}
    data = write_npz(tmp_path / "d.npz", "Odd-v0", **arrays)
    arguments = f"{SMALL} --env-id Odd-v0 --expert-data {data} --loss {loss} --train-steps 600 {HOMEWORK}"
    assert run(bc, f"{arguments} --batch-size 400 --eval-every 600", tmp_path / "run") == 0
    with torch.no_grad():
        mean, log_std = load_actor(tmp_path / "run", "Odd-v0")(torch.from_numpy(obs).float())
    error = (ODD_CENTRE + ODD_HALF_WIDTH * mean.numpy() - (obs @ slopes.T + offset)) / ODD_HALF_WIDTH
    assert np.sqrt((error**2).mean()) < 0.04
    assert ODD_HALF_WIDTH * log_std[0].exp().numpy() == pytest.approx(std, rel=0.05)
    last, std = rows(tmp_path / "run")[-1], std / ODD_HALF_WIDTH
    if loss == "nll":  # the entropy of the true noise
        entropy = np.sum(np.log(std) + 0.5 * np.log(2 * np.pi * np.e))
        assert float(last["validation_loss"]) == pytest.approx(entropy, abs=0.1)
    else:
        assert float(last["validation_loss"]) == pytest.approx(np.sum(std**2), rel=0.1)


@pytest.mark.parametrize(
    ("script", "steps", "policy"),
    [
        (bc, "--train-steps 1", "policy.pt"),
        (dagger, "--num-iterations 2 --train-steps-per-iteration 1", "policy_iteration_0.pt"),
    ],
    ids=["bc", "dagger"],
)
def test_a_gradient_may_lie_in_memory_in_another_order(script, steps, policy, tmp_path, monkeypatch):
    """Adam's first step is the learning rate against the gradient's sign."""
    slopes = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def loss(actor, *_):
        value = (actor.net[2].weight.mT * slopes).sum() + sum(0 * parameter.sum() for parameter in actor.parameters())
        return value, value.detach()

    monkeypatch.setattr(script, "bc_loss", loss)
    arguments = f"--env-id Tiny-v0 --expert {linear_expert(tmp_path / 'e.pt', [[1.0, 0.0]])} --torch-threads 1 {steps}"
    arguments += f" --hidden-size 4 --eval-episodes 1 --batch-size 9 {HOMEWORK}"
    assert run(script, arguments, tmp_path / "run") == 0
    torch.manual_seed(1)
    before = make_actor(hidden_size=4, num_layers=2).net[2].weight
    after = policy_of(tmp_path / "run", policy)["state_dict"]["net.2.weight"]
    assert torch.allclose(after - before, -5e-3 * slopes.mT.sign(), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ batches
def test_batches_are_without_replacement():
    numbers = torch.arange(100, 123)
    batches = torch.stack(list(islice(bc.batches(numbers, 5, seed=1), 12)))  # 4 batches a pass, 3 rows left out
    for i in range(3):
        a_pass = batches[4 * i : 4 * i + 4].flatten()
        assert len(a_pass.unique()) == 20
        assert set(a_pass.tolist()) <= set(numbers.tolist())
    assert not torch.equal(batches[:4], batches[4:8])
    assert len(batches.unique()) == 23  # whoever is left out of one pass takes part in another
    assert not torch.equal(batches[0], next(bc.batches(numbers, 5, seed=2)))


@pytest.mark.parametrize(("fraction", "episodes"), [(0.1, 0), (0.33, 0), (0.34, 1), (0.7, 2), (0.99, 2), (0.0, 0)])
def test_whole_episodes_are_held_out_where_the_fraction_makes_one_else_steps(fraction, episodes):
    """Three episodes of 20 steps, the last of them 13, ended by either flag."""
    data = {name: array[:53] for name, array in demonstrations().items()}
    data["terminations"][19], data["truncations"][19] = True, False
    number = np.repeat([0, 1, 2], [20, 20, 13])
    data["truncations"][-1] = True
    held_out, training = bc.split(data, fraction, seed=1)
    assert sorted([*held_out.tolist(), *training.tolist()]) == [*range(53)]
    if episodes:
        assert len(set(number[held_out])) == episodes
        assert not set(number[held_out]) & set(number[training])
    else:
        assert len(held_out) == int(53 * fraction)
    others = [bc.split(data, fraction, seed)[0].tolist() for seed in range(1, 6)]
    assert others[0] == held_out.tolist()
    assert len(set(map(tuple, others))) > 1 or fraction == 0


@pytest.mark.parametrize(("fraction", "num_held_out"), [(0.25, 15), (0.4, 20)])
def test_held_out_steps_are_never_trained_on(fraction, num_held_out, tmp_path, small, monkeypatch):
    trained_on, validated_on = set(), set()
    original = bc.bc_loss

    def spying(actor, obs, action, kind):
        (trained_on if len(obs) == 7 else validated_on).update(map(tuple, obs.tolist()))
        return original(actor, obs, action, kind)

    monkeypatch.setattr(bc, "bc_loss", spying)
    assert run(bc, f"{small} --validation-fraction {fraction} --batch-size 7", tmp_path / "run") == 0
    assert len(trained_on) == 60 - num_held_out
    assert len(validated_on) == num_held_out
    assert not trained_on & validated_on


# --------------------------------------------------------------------------------------------------------------- runs
def test_a_run_as_a_process(tmp_path):
    """With MuJoCo, which would speak up and leave a file."""
    expert = linear_expert(tmp_path / "expert.pt", np.zeros((6, 17)), "HalfCheetah-v4")
    arguments = "--train-steps 40 --eval-every 30 --eval-episodes 2 --max-episode-steps 200 --torch-threads 1"
    command = [sys.executable, str(ROOT / "bc.py"), "--env-id", "HalfCheetah-v4", "--expert", expert]
    pipes = {"capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*command, *arguments.split()], cwd=tmp_path, check=False, **pipes)
    assert done.returncode == 0, done.stderr
    assert [x for x in done.stderr.replace("\r", "\n").splitlines() if x.strip() and "it/s" not in x] == []  # the bar
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert.pt", "runs"]  # no MUJOCO_LOG.TXT
    [run_dir] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"HalfCheetah-v4__bc__1__\d{8}-\d{6}", run_dir.name)
    assert [row["step"] for row in rows(run_dir)] == ["30", "40"]
    settings = json.loads((run_dir / "args.json").read_text())
    expected = vars(bc.Args()) | {"env_id": "HalfCheetah-v4", "expert": expert, "run_dir": f"runs/{run_dir.name}"}
    expected |= {"train_steps": 40, "eval_every": 30, "eval_episodes": 2, "max_episode_steps": 200, "torch_threads": 1}
    assert settings == expected | {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    names = sorted(re.sub("events.*", "events", path.name) for path in run_dir.iterdir())
    assert names == ["args.json", "events", "policy.pt", "progress.csv"]
    folder = f"runs/{run_dir.name}"
    assert f"benchmark/plot.py {folder} --out {folder}/curves.png" in done.stdout
    assert f"tensorboard --logdir {folder}" in done.stdout
    assert f"sac_continuous.py --evaluate {folder}" in done.stdout


def test_progress_csv(tmp_path, small):
    assert run(bc, small, tmp_path / "run") == 0
    text = (tmp_path / "run/progress.csv").read_bytes().decode()
    assert "\r" not in text
    columns = "step,wall_time_s,eval_return_mean,eval_return_std,eval_length_mean,train_loss,validation_loss"
    columns += ",eval_sampled_return_mean,eval_sampled_return_std,expert_return_mean"
    assert text.startswith(columns + "\n")
    assert text.endswith("\n")
    assert [row["step"] for row in rows(tmp_path / "run")] == ["20", "40", "50"]
    assert all(math.isfinite(float(value)) for row in rows(tmp_path / "run") for value in row.values())
    assert run(bc, f"{small} --validation-fraction 0", tmp_path / "all") == 0
    assert [row["validation_loss"] for row in rows(tmp_path / "all")] == ["nan"] * 3


def test_policies_of_the_three_scripts_have_the_same_keys_and_sac_evaluates_them(tmp_path, small, capsys):
    expert = linear_expert(tmp_path / "expert.pt", [[1.0, 0.0]])
    assert run(bc, small, tmp_path / "bc") == 0
    few = "--env-id Tiny-v0 --hidden-size 16 --eval-episodes 2 --torch-threads 1"
    iterations = f"--expert {expert} --train-steps-per-iteration 20 --num-iterations 2 --rollout-steps 20"
    assert run(dagger, f"{few} {iterations} --batch-size 10", tmp_path / "dagger") == 0
    assert run(sac, f"{few} --total-steps 60 --batch-size 8 --compile never", tmp_path / "sac") == 0
    policies = {name: policy_of(tmp_path / name) for name in ("bc", "dagger", "sac")}
    assert {name: policy["algorithm"] for name, policy in policies.items()} == {name: name for name in policies}
    assert policies["bc"].keys() == policies["dagger"].keys() == policies["sac"].keys()
    assert policies["bc"]["action_low"] == [-1.0]
    for name in ("bc", "dagger"):
        capsys.readouterr()
        assert sac.main(["--evaluate", str(tmp_path / name), "--eval-episodes", "2"]) == 0
        mean, std = re.search(r"return (\S+) \+- (\S+) over 2 episodes", capsys.readouterr().out).groups()
        last = rows(tmp_path / name)[-1]
        assert float(mean) == pytest.approx(float(last["eval_return_mean"]), abs=0.01)
        assert float(std) == pytest.approx(float(last["eval_return_std"]), abs=0.01)
    torch.save(policies["bc"] | {"action_low": [-2.0]}, tmp_path / "other_bounds.pt")
    assert sac.main(["--evaluate", str(tmp_path / "other_bounds.pt")]) == 2
    the_error(capsys)


def test_same_seed_same_bytes_and_evaluating_changes_nothing(tmp_path, small):
    for name, more in [
        ("a", ""),
        ("b", ""),
        ("c", "--seed 2"),
        ("d", "--eval-every 7 --eval-episodes 5 --log-every 3"),
    ]:
        assert run(bc, f"{small} {more}", tmp_path / name) == 0
    assert same_run(tmp_path / "a", tmp_path / "b")
    a, c, d = (policy_of(tmp_path / name) for name in "acd")
    assert not same_policy(a, c)
    assert same_policy(a, d)


def test_expert_return_is_the_experts_or_else_the_demonstrations(tmp_path, small):
    assert run(bc, small, tmp_path / "data") == 0
    returns = demonstrations()["rewards"].reshape(3, 20).sum(1)
    assert float(rows(tmp_path / "data")[0]["expert_return_mean"]) == pytest.approx(returns.mean(), rel=1e-5)
    expert = linear_expert(tmp_path / "expert.pt", [[1.0, 0.0]])
    assert run(bc, f"{small} --expert {expert}", tmp_path / "expert") == 0
    result = bc.evaluate(load_actor(expert), bc.make_env(bc.Args(env_id="Tiny-v0")), 2)
    assert float(rows(tmp_path / "expert")[0]["expert_return_mean"]) == result["return_mean"]


def test_a_row_has_the_returns_of_the_mean_and_of_sampled_actions(tmp_path, small):
    assert run(bc, small, tmp_path / "run") == 0
    last, actor, env = rows(tmp_path / "run")[-1], load_actor(tmp_path / "run"), bc.make_env(bc.Args(env_id="Tiny-v0"))
    result = bc.evaluate(actor, env, 2)
    assert [float(last[f"eval_{name}"]) for name in result] == list(result.values())
    sampled = bc.evaluate(actor, env, 2, bc.stream(bc.EVALUATION, 1))
    assert [float(last[f"eval_sampled_{name}"]) for name in ("return_mean", "return_std")] == list(sampled.values())[:2]
    assert result["return_mean"] != sampled["return_mean"]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("squash", [False, True])
def test_evaluation_by_hand(sampled, squash):
    """In an environment made without the script, episode after episode, with the same noise."""
    torch.manual_seed(0)
    actor = make_actor(action_dim=2, squash=squash)
    noise, again = (torch.Generator().manual_seed(3) for _ in range(2))
    result = bc.evaluate(actor, bc.make_env(bc.Args(env_id="Odd-v0")), 3, noise if sampled else None)
    env, returns = gym.make("Odd-v0"), []
    for i in range(3):
        obs, total = env.reset(seed=1000 + i)[0], 0.0
        for _ in range(20):
            with torch.no_grad():
                mean, log_std = actor(torch.from_numpy(obs)[None])
            action = mean + log_std.exp() * torch.randn(1, 2, generator=again) * sampled
            action = np.clip((action.tanh() if squash else action).numpy()[0], -1, 1)
            obs, reward, *_ = env.step((ODD_CENTRE + ODD_HALF_WIDTH * action).astype(np.float32))
            total += reward
        returns.append(total)
    assert len(set(returns)) == 3
    expected = {"return_mean": np.mean(returns), "return_std": np.std(returns), "length_mean": 20}
    assert result == pytest.approx(expected, rel=1e-4)


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    registration = "gymnasium.register('Mine-v0', envs.Tiny, max_episode_steps=20)"
    (tmp_path / "mymodule.py").write_text(f"import gymnasium, envs\n{registration}\n")
    data = write_npz(tmp_path / "data.npz", "mymodule:Mine-v0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert bc.main(f"{SMALL} --env-id mymodule:Mine-v0 --expert-data {data}".split()) == 0
    [run_dir] = Path("runs").iterdir()
    assert re.fullmatch(r"mymodule_Mine-v0__bc__1__\d{8}-\d{6}", run_dir.name)


# ------------------------------------------------------------------------------------- environments in the corners
def rollout(seed=3, **kwargs):
    """An episode of actions that the observations decide."""
    args = bc.Args(env_id="Tiny-v0", env_kwargs=json.dumps(kwargs))
    return bc.rollout(lambda obs: 2 * obs[:, :1], bc.make_env(args), seed)


def same_episode(a, b):
    return all(np.array_equal(a[field], b[field]) for field in bc.FIELDS)


@pytest.mark.parametrize("corner", ["same_array", "reward_as_array"])
def test_an_environment_may_return_the_same_array_again_or_rewards_as_arrays(corner):
    episode = rollout()
    assert same_episode(episode, rollout(**{corner: True}))
    assert not same_episode(episode, rollout(seed=4))
    assert np.ptp(episode["observations"], axis=0).min() > 0
    assert {field: array.dtype for field, array in episode.items()} == {k: np.dtype(v) for k, v in bc.FIELDS.items()}
    assert [array.shape for array in episode.values()] == [(20, 2), (20, 1), (20,), (20,), (20,)]


def test_an_environment_that_samples_from_its_action_space_repeats_itself():
    assert same_episode(rollout(samples=True), rollout(samples=True))


def test_no_action_leaves_the_bounds_by_rounding():
    tenths = np.arange(-10, 11) / 10
    for low, high in itertools.combinations(tenths.tolist(), 2):
        env = bc.make_env(bc.Args(env_id="Tiny-v0", env_kwargs=json.dumps({"low": low, "high": high, "strict": True})))
        env.reset(seed=0)
        for action in (-1, 1, -1.5, 1.5):
            env.step(np.float32([action]))
        assert np.array(env.unwrapped.actions)[:, 0] == pytest.approx([low, high, low, high], abs=1e-6)


@pytest.mark.parametrize("kind", ["dict", "image", "unbounded", "discrete", "integer", "flat"])
def test_other_spaces_are_refused(kind, tmp_path, small, capsys):
    kwargs = f'{{"kind":"{kind}"}}'
    assert run(bc, f"{small} --env-id Space-v0 --env-kwargs {kwargs}", tmp_path / "run") == 2
    assert "needs flat Box observations, has " in the_error(capsys)
    assert os.listdir(tmp_path) == ["data.npz"]


def test_an_environment_without_a_time_limit_needs_one(tmp_path, small, capsys):
    data = write_npz(tmp_path / "endless.npz", "Endless-v0")
    endless = f"{small} --env-id Endless-v0 --expert-data {data}"
    assert run(bc, endless, tmp_path / "run") == 2
    assert "no time limit" in (message := the_error(capsys))
    assert "--max-episode-steps" in message
    assert run(bc, f"{endless} --max-episode-steps 20", tmp_path / "run") == 0
    assert rows(tmp_path / "run")[-1]["eval_length_mean"] == "20.0"


# ---------------------------------------------------------------------------------------------------------- bad input
ONE_OR_MORE = "num-trajectories batch-size hidden-size num-layers eval-episodes log-every video-every"
OUT_OF_RANGE = "--seed -1,--seed 9223372036854775808,--torch-threads -1,--torch-threads 1025,--device abacus,"
OUT_OF_RANGE += "--expert=,--expert-data=,--exp-name=,"
OUT_OF_RANGE += "--learning-rate 0,--learning-rate nan,--learning-rate inf,--video-every 3"
BREAKS_A_RULE = {  # of each script, a setting
    bc: ["train-steps", "eval-every", "--validation-fraction 1", "--validation-fraction -0.1"],
    dagger: [
        *["train-steps-per-iteration", "rollout-steps", "--num-iterations 1", "--buffer-size 99"],
        *["--expert-mixing -0.1", "--expert-mixing 1.1", "--expert-mixing nan", "--expert-data data.npz"],
    ],
}


@pytest.mark.parametrize("script", [bc, dagger], ids=["bc", "dagger"])
def test_every_rule_is_kept(script, tmp_path, capsys):
    broken = set()
    for setting in [*ONE_OR_MORE.split(), *OUT_OF_RANGE.split(","), *BREAKS_A_RULE[script]]:
        arguments = setting if setting.startswith("--") else f"--{setting} 0"
        assert run(script, arguments, tmp_path / "run") == 2, arguments
        given, _, rule = the_error(capsys).partition(": it must hold that ")
        assert re.split("[ =]", arguments)[0] in given
        broken.add(rule.strip())
    assert broken == {" ".join(rule.split()) for rule in script.RULES}
    assert os.listdir(tmp_path) == []


def test_dagger_points_to_bc_where_there_is_nothing_to_iterate(tmp_path, capsys):
    assert run(dagger, "--num-iterations 1", tmp_path / "run") == 2
    assert "bc.py" in the_error(capsys)


BAD = [
    ("--batch-size 55", "--batch-size 55: there are only 54 steps to train on"),
    ("--num-trajectories 4", "data.npz: it has 3 episodes, not 4"),
    ("--env-id Pendulum-v1", "Pendulum-v1 needs "),
    ("--env-id Nothing-v0", "--env-id Nothing-v0 --env-kwargs {}: Environment `Nothing` doesn't exist"),
    ("--env-id nomodule:Nothing-v0", "nomodule"),
    ("--env-id Broken-v0", "the simulator is not installed"),
    ("--env-kwargs {", "--env-kwargs {: "),
    ("--env-kwargs []", "--env-kwargs []: "),
    ('--env-kwargs {"nothing":1}', "unexpected keyword argument 'nothing'"),
    ('--env-id Hopper-v4 --env-kwargs {"reset_noise_scale":"x"}', "--env-id Hopper-v4 "),
    ("--max-episode-steps 0", "actually: 0"),
    ("--max-episode-steps -1", "no time limit"),
    ("--expert nothing.pt", "nothing.pt: "),
    ("--expert-data nothing.npz", "nothing.npz: "),
    ("--device cuda:99", "--device cuda:99 "),
    ("--run-dir /proc/self/run", "--run-dir: "),
    ("--capture-video", "unexpected keyword argument 'render_mode'"),
    ("--capture-video --env-id Blind-v0", "--capture-video: no screen"),
    ("--capture-video --env-id Blank-v0", "--capture-video: "),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_gets_one_line_and_exit_code_2_and_leaves_nothing(arguments, message, tmp_path, small, capsys):
    assert bc.main(f"{small} --run-dir {tmp_path / 'run'} {arguments}".split()) == 2
    assert message in (error := the_error(capsys))
    assert "(2, " not in error  # an error inside another
    assert os.listdir(tmp_path) == ["data.npz"]


def test_no_expert_and_no_data(tmp_path, capsys):
    for script in (bc, dagger):
        assert run(script, "--env-id Tiny-v0", tmp_path / "run") == 2
        assert "experts/Tiny-v0.pt" in the_error(capsys)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_holds_a_run_is_refused(tmp_path, small, capsys):
    assert run(bc, small, tmp_path / "run") == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert run(bc, small, tmp_path / "run") == 2
    assert "--run-dir: " in the_error(capsys)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


# ----------------------------------------------------------------------------------------------- runs that break off
def last_line(capsys):
    """After the bar, without a traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize("log_every", [10, 1000])
def test_a_loss_that_becomes_infinite_ends_the_run(log_every, tmp_path, capsys):
    data = write_npz(tmp_path / "d.npz", actions=np.full((60, 1), 1e30, np.float32))
    assert run(bc, f"{SMALL} --expert-data {data} --log-every {log_every}", tmp_path / "run") == 1
    step = min(log_every, 20)
    assert last_line(capsys).startswith(f"error: step {step}: loss became NaN or infinite")
    assert not (tmp_path / "run/policy.pt").exists()
    assert not (tmp_path / "run/progress.csv").exists()


def test_an_evaluation_that_returns_nan_ends_the_run_and_leaves_what_was_before(tmp_path, small, capsys):
    """In the second evaluation: each has 20 steps in 2 episodes of the mean and 2 of sampled actions."""
    kwargs = '{"bad":"evaluation","bad_at":90}'
    assert run(bc, f"{small} --env-kwargs {kwargs}", tmp_path / "run") == 1
    assert last_line(capsys).startswith("error: step 40: eval_return_mean became NaN or infinite")
    assert run(bc, f"{small} --train-steps 20", tmp_path / "whole") == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == ["20"]
    assert same_policy(policy_of(tmp_path / "run"), policy_of(tmp_path / "whole"))


class Full(io.FileIO):
    """On a disk that has room for 100 bytes."""

    def write(self, data):
        if self.tell() + len(data) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_one_line_and_leaves_whole_files(tmp_path, small, capsys, monkeypatch):
    count = itertools.count()

    def second_policy_is_too_much(path, mode):
        return Full(path, "w") if path.name == "policy.pt.tmp" and next(count) else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(bc, "open", second_policy_is_too_much, raising=False)
        assert run(bc, small, tmp_path / "run") == 1
    assert last_line(capsys) == f"error: {tmp_path}/run/policy.pt: [Errno 28] No space left on device"
    assert run(bc, f"{small} --train-steps 20", tmp_path / "whole") == 0
    assert same_policy(policy_of(tmp_path / "run"), policy_of(tmp_path / "whole"))


# -------------------------------------------------------------------------------------------------- what is shipped
@pytest.mark.parametrize("path", sorted((ROOT / "experts").glob("*.pt")), ids=lambda path: path.stem)
def test_starts_on_the_experts_that_are_shipped(path, tmp_path):
    assert f"`{path.name}`" in (path.parent / "README.md").read_text()
    # Five episodes: Ant-v4's expert falls at times, and which episode it falls in depends on the machine's rounding.
    arguments = f"--env-id {path.stem} --train-steps 100 --eval-episodes 5 --torch-threads 1"
    assert run(bc, arguments, tmp_path / "run") == 0
    assert float(rows(tmp_path / "run")[-1]["expert_return_mean"]) > 2000


@needs_real_files
def test_clones_the_real_demonstrations(tmp_path):
    """Half of the published steps are enough for HalfCheetah; a tenth of an episode of Hopper never is."""
    share = {}
    for env_id, demonstrated, settings in (
        ("HalfCheetah-v4", None, "--train-steps 600 --batch-size 100"),
        ("Hopper-v4", 100, "--train-steps 1000 --batch-size 40 --validation-fraction 0"),
    ):
        arguments = f"{real_arguments(tmp_path, env_id, demonstrated)} {HOMEWORK} --hidden-size 64 {settings}"
        assert run(bc, f"{arguments} --eval-every 1000 --eval-episodes 3", tmp_path / env_id) == 0
        [last] = rows(tmp_path / env_id)
        share[env_id] = float(last["eval_sampled_return_mean"]) / float(last["expert_return_mean"])
    assert share["HalfCheetah-v4"] > 0.8
    assert share["Hopper-v4"] < 0.6
