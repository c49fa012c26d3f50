"""dagger.py: data set, rollouts, what DAgger repairs, and its runs from command line to run folder."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from imitation import (
    cs285_action,
    cs285_policy,
    demonstrations,
    linear_expert,
    needs_real_files,
    real,
    rows,
    same_policy,
    same_run,
    stop_at_gradient_step,
    write_npz,
    write_pickle,
)

import bc
import dagger
import envs  # noqa: F401, registers Tiny-v0

ROOT = Path(__file__).parent.parent
SMALL = "--num-iterations 4 --train-steps-per-iteration 20 --rollout-steps 30 --batch-size 10 --hidden-size 16"
SMALL += " --eval-episodes 2 --log-every 10 --torch-threads 1"


def run(tmp_path, arguments, name="run"):
    return dagger.main([*arguments.split(), "--run-dir", str(tmp_path / name)])


@pytest.fixture
def tiny(tmp_path):
    """Arguments for a small run with a linear expert."""
    expert = linear_expert(tmp_path / "expert.pt", [[1.0, -0.5]], "envs:Tiny-v0")
    return f"--env-id envs:Tiny-v0 --expert {expert} {SMALL}"


# ---------------------------------------------------------------------------------------------- data and rollouts


def test_data_set_keeps_the_newest_in_order():
    data = dagger.DataSet(5, 2, 1, torch.device("cpu"))

    def add(first, last):
        obs = torch.arange(first, last, dtype=torch.float32)[:, None]
        data.add(obs.repeat(1, 2), -obs)

    def held():
        assert torch.equal(data.obs[: len(data), :1], -data.action[: len(data)])
        return sorted(data.obs[: len(data), 1].tolist())

    add(0, 3)
    assert held() == [0, 1, 2]
    add(3, 6)
    assert held() == [1, 2, 3, 4, 5]
    assert data.obs[:, 0].tolist() == [5, 1, 2, 3, 4]  # the oldest row was replaced
    copy = dagger.DataSet(5, 2, 1, torch.device("cpu"))
    copy.load_checkpoint(data.checkpoint())
    add(6, 18)  # more than it holds, at once
    assert data.obs[:, 0].tolist() == [15, 16, 17, 13, 14]
    add(18, 20)
    assert held() == [15, 16, 17, 18, 19]
    data = copy  # from before
    assert held() == [1, 2, 3, 4, 5]
    add(6, 8)
    assert held() == [3, 4, 5, 6, 7]


def test_batches_are_without_replacement_and_new_in_each_iteration():
    batches = [torch.stack(list(islice(dagger.batches(23, 5, i, seed=1), 12))) for i in range(2)]
    for i in range(3):
        assert len(batches[0][4 * i : 4 * i + 4].unique()) == 20
    assert len(batches[0].unique()) == 23
    assert not torch.equal(batches[0], batches[1])


class Recorder:
    """An environment that remembers the actions it got."""

    def __init__(self, args):
        self.env, self.actions = dagger.make_env(args), []

    def reset(self, **options):
        return self.env.reset(**options)

    def step(self, action):
        self.actions.append(float(action[0]))
        return self.env.step(action)


@pytest.mark.parametrize(("beta", "iteration"), [(0.0, 1), (1.0, 3), (0.8, 1), (0.8, 2)])
def test_rollouts_mix_expert_and_learner_step_by_step(beta, iteration):
    """The learner always says +0.5, give or take, the expert always -0.5: the share of the two is beta^i."""
    args = dagger.Args(env_id="envs:Tiny-v0", expert_mixing=beta, rollout_steps=2000)
    learner, expert = (bc.Actor(2, 1, 4, 1, "tanh", "shared", squash=False) for _ in range(2))
    for actor, action in ((learner, 0.5), (expert, -0.5)):
        actor.load_state_dict({name: torch.zeros_like(value) for name, value in actor.state_dict().items()})
        actor.net[-1].bias.data.fill_(action)
        actor.log_std.data.fill_(-4.0)
    env = Recorder(args)
    episodes = list(dagger.rollouts(learner, expert, env, args, iteration))
    by_expert = np.array(env.actions) == -0.5
    assert by_expert.mean() == pytest.approx(beta**iteration, abs=0.05)  # 4.5 standard deviations
    assert np.all(by_expert | (np.array(env.actions) > 0.3))
    if 0 < beta < 1:
        assert np.corrcoef(by_expert[1:], by_expert[:-1])[0, 1] == pytest.approx(0, abs=0.1)
    if beta < 1:  # the learner's actions are sampled
        assert np.std(np.array(env.actions)[~by_expert]) == pytest.approx(np.exp(-4), rel=0.15)
    assert [len(episode["rewards"]) for episode in episodes] == [20] * 100


def test_rollouts_are_whole_episodes_until_there_are_enough_steps():
    args = dagger.Args(env_id="envs:Tiny-v0", rollout_steps=41)
    actor = bc.Actor(2, 1, 4, 1, "tanh", "shared", squash=False)
    episodes = list(dagger.rollouts(actor, actor, dagger.make_env(args), args, 1))
    assert [len(episode["rewards"]) for episode in episodes] == [20, 20, 20]
    assert all(episode["truncations"][-1] and not episode["truncations"][:-1].any() for episode in episodes)
    starts = {tuple(episode["observations"][0]) for episode in episodes}
    other = next(dagger.rollouts(actor, actor, dagger.make_env(args), args, 2))
    assert len(starts | {tuple(other["observations"][0])}) == 4


def test_every_visited_state_is_labelled_by_the_expert_in_the_environments_units(tmp_path, monkeypatch):
    """Bounds -2..8: an expert file of CS285 speaks in these units, the learner and the data set in [-1, 1]."""
    policy = cs285_policy()
    expert = write_pickle(tmp_path / "expert.pkl", policy)
    kept = []
    original = dagger.DataSet.add
    monkeypatch.setattr(
        dagger.DataSet, "add", lambda self, obs, action: (kept.append((obs, action)), original(self, obs, action))
    )
    kwargs = '{"low":-2,"high":8}'
    arguments = f"--env-id envs:Tiny-v0 --env-kwargs {kwargs} --expert {expert} {SMALL} --expert-mixing 0.5"
    assert run(tmp_path, arguments) == 0
    assert [len(obs) for obs, _ in kept] == [40, 20, 20, 20, 20, 20, 20]  # demonstrations, then episodes
    for obs, action in kept:
        assert 3 + 5 * action.numpy() == pytest.approx(cs285_action(policy, obs.numpy()), abs=1e-4)
    assert [row["env_steps"] for row in rows(tmp_path / "run")] == ["0", "40", "80", "120"]
    assert [row["expert_queries"] for row in rows(tmp_path / "run")] == ["0", "40", "80", "120"]


# ------------------------------------------------------------------------------------------- what DAgger is about


def test_a_clone_drifts_where_dagger_does_not(tmp_path):
    expert = linear_expert(tmp_path / "expert.pt", [[-2.0]], "Drift-v0")
    common = f"--env-id Drift-v0 --expert {expert} --hidden-size 16 --torch-threads 1 --eval-episodes 1"
    assert run(tmp_path, f"{common} --train-steps-per-iteration 300 --rollout-steps 300 --num-iterations 5") == 0
    assert bc.main([*common.split(), "--train-steps", "1500", "--run-dir", str(tmp_path / "bc")]) == 0
    clone, first, last = rows(tmp_path / "bc")[-1], rows(tmp_path / "run")[0], rows(tmp_path / "run")[-1]
    assert float(last["expert_return_mean"]) == 100
    assert float(clone["eval_return_mean"]) < 40
    assert float(first["eval_return_mean"]) < 40
    assert float(last["eval_return_mean"]) == 100
    assert float(last["eval_sampled_return_mean"]) == 100
    # x is 0 in all demonstrations, so that its distance from them is |x|.
    assert float(clone["distance_from_demonstrations"]) > 0.1
    assert float(last["distance_from_demonstrations"]) < 0.05


def test_iteration_0_is_bc(tmp_path, tiny, monkeypatch):
    """From the same weights on the same batches, with no step held out, both scripts make the same policy."""
    indices = [torch.randperm(40)[:10] for _ in range(20)]
    monkeypatch.setattr(dagger, "batches", lambda *_: iter(indices))
    monkeypatch.setattr(bc, "batches", lambda rows, *_: (rows[index] for index in indices))
    monkeypatch.setattr(bc.torch, "randperm", lambda n, **_: torch.arange(n))
    data = write_npz(tmp_path / "d.npz", **{name: array[:40] for name, array in demonstrations().items()})
    run(tmp_path, f"{tiny} --expert-data {data} --num-iterations 2")
    small = "--env-id envs:Tiny-v0 --train-steps 20 --batch-size 10 --hidden-size 16 --eval-episodes 2"
    small += " --validation-fraction 0 --torch-threads 1"
    bc.main([*small.split(), "--expert-data", data, "--run-dir", str(tmp_path / "bc")])
    assert same_policy(tmp_path / "bc/policy.pt", tmp_path / "run/policy_iteration_0.pt")


# ----------------------------------------------------------------------------------------------------------- runs


def test_run_folder(tmp_path, tiny, capsys):
    assert run(tmp_path, tiny) == 0
    out = capsys.readouterr().out
    for command in ("plot.py {0} --out {0}/curves.png", "tensorboard --logdir {0}", " --evaluate {0}"):
        assert command.format(tmp_path / "run") in out
    table = rows(tmp_path / "run")
    columns = "step wall_time_s eval_return_mean eval_return_std eval_length_mean iteration env_steps expert_queries"
    columns += " train_return_mean train_return_std train_loss eval_sampled_return_mean eval_sampled_return_std"
    assert list(table[0]) == [*columns.split(), "expert_return_mean", "distance_from_demonstrations"]
    assert [row["step"] for row in table] == ["20", "40", "60", "80"]
    assert [row["iteration"] for row in table] == ["0", "1", "2", "3"]
    actor = bc.load_policy(str(tmp_path / "run"))["actor"]
    eval_envs = [bc.make_env(bc.Args(env_id="envs:Tiny-v0")) for _ in range(2)]
    for column, noise in (("eval_return", None), ("eval_sampled_return", dagger.stream(dagger.EVALUATION, 1))):
        returns = dagger.evaluate(actor, eval_envs, noise)["returns"]
        assert float(table[-1][f"{column}_mean"]) == pytest.approx(returns.mean(), rel=1e-6)
        assert float(table[-1][f"{column}_std"]) == pytest.approx(returns.std(), rel=1e-6)
    assert table[-1]["eval_return_mean"] != table[-1]["eval_sampled_return_mean"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {f"policy_iteration_{i}.pt" for i in range(4)} | {"policy.pt", "args.json", "checkpoint.pt"} <= names
    assert same_policy(tmp_path / "run/policy.pt", tmp_path / "run/policy_iteration_3.pt")
    assert not same_policy(tmp_path / "run/policy.pt", tmp_path / "run/policy_iteration_2.pt")


def test_the_buffer_bounds_what_is_trained_on(tmp_path, tiny):
    assert run(tmp_path, f"{tiny} --buffer-size 50") == 0
    checkpoint = dagger.load_checkpoint(tmp_path / "run")
    assert checkpoint["data_set"]["obs"].shape == (50, 2)
    assert checkpoint["data_set"]["num_added"] == 160
    assert (tmp_path / "run/checkpoint.pt").stat().st_size < 60_000


def test_same_seed_same_bytes_and_evaluating_changes_nothing(tmp_path, tiny):
    for name, more in [("a", ""), ("b", ""), ("c", "--seed 2"), ("d", "--eval-episodes 5 --log-every 3")]:
        run(tmp_path, f"{tiny} {more}", name)
    assert same_run(tmp_path / "a", tmp_path / "b")
    assert not same_policy(tmp_path / "a/policy.pt", tmp_path / "c/policy.pt")
    assert same_policy(tmp_path / "a/policy.pt", tmp_path / "d/policy.pt")


# --------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [1, 20, 21, 47, 80])
def test_stopped_anywhere_and_resumed_is_the_run_that_never_stopped(tmp_path, tiny, monkeypatch, capsys, step):
    tiny += " --buffer-size 90 --expert-mixing 0.5"  # it wraps
    run(tmp_path, tiny, "whole")
    with monkeypatch.context() as patch:
        stop_at_gradient_step(patch, dagger, step)
        assert run(tmp_path, tiny, "stopped") == 143
    assert f"--resume {tmp_path / 'stopped'}" in capsys.readouterr().out
    assert dagger.main(["--resume", str(tmp_path / "stopped")]) == 0
    assert same_run(tmp_path / "whole", tmp_path / "stopped")
    for i in range(4):
        paths = (tmp_path / name / f"policy_iteration_{i}.pt" for name in ("whole", "stopped"))
        assert same_policy(*paths)
    capsys.readouterr()
    assert dagger.main(["--resume", str(tmp_path / "stopped")]) == 0
    assert "is finished: 4 iterations" in capsys.readouterr().out


def test_more_iterations_later_are_the_longer_run(tmp_path, tiny):
    run(tmp_path, tiny, "long")
    run(tmp_path, f"{tiny} --num-iterations 2", "short")
    assert dagger.main(["--resume", str(tmp_path / "short"), "--num-iterations", "4"]) == 0
    assert same_run(tmp_path / "long", tmp_path / "short")


def start(arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, str(ROOT / "dagger.py"), *arguments.split()]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_killed_and_resumed_while_a_second_process_is_refused(tmp_path, tiny):
    tiny += " --num-iterations 6 --train-steps-per-iteration 200"
    run_dir = tmp_path / "killed"
    process = start(f"{tiny} --run-dir {run_dir}", tmp_path)
    while not (run_dir / "policy_iteration_1.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(dagger.UserError, match="another process is working on this run"):
        dagger.open_run_dir(dagger.Args(resume=str(run_dir)))
    process.kill()
    process.communicate()
    assert dagger.main(["--resume", str(run_dir)]) == 0
    run(tmp_path, tiny, "whole")
    assert same_run(tmp_path / "whole", run_dir)


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, tiny, capsys):
    run(tmp_path, tiny, "whole")
    run(tmp_path, tiny)
    checkpoint = tmp_path / "run/checkpoint.pt"
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    assert dagger.main(["--resume", str(tmp_path / "run")]) == 0
    assert "going on from the one before" in capsys.readouterr().err
    assert same_run(tmp_path / "whole", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------ bad input

BAD = [
    ("--num-iterations 1", "--num-iterations 1: must be at least 2; for cloning without DAgger take bc.py"),
    ("--expert-mixing 1.1", "--expert-mixing 1.1: must be between 0 and 1"),
    ("--batch-size 41", "--batch-size 41: larger than the data, 40 demonstrated steps"),
    ("--batch-size 30 --buffer-size 20", "--batch-size 30 and --buffer-size 20 contradict each other"),
    ("--expert-data nothing.npz", "nothing.npz: cannot be read"),
    ("--expert-data data.txt", "data.txt: must be a .npz or .pkl file"),
    ("--expert nothing", "nothing: cannot be read"),
    ("--env-id Pendulum-v1", "a policy for 2 observations and 1 actions, Pendulum-v1 has 3 and 1"),
    ("--buffer-size 100000000000000", "--buffer-size 100000000000000: must be at least 1"),
    ("--video-every 3", "--video-every 3 and --capture-video False"),
    ("--video-episodes 3", "--video-episodes 3 and --capture-video False"),
    ("--capture-video --video-episodes 0", "--video-episodes 0: must be at least 1"),
    ("--render", "--render True and --evaluate None"),
    ("--capture-video", "envs:Tiny-v0 .* unexpected keyword argument 'render_mode'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_gets_one_line_and_exit_code_2_and_leaves_nothing(tmp_path, tiny, capsys, arguments, message):
    assert run(tmp_path, f"{tiny} {arguments}") == 2
    err = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message}.*\n", err)
    assert os.listdir(tmp_path) == ["expert.pt"]


def test_data_without_the_expert_that_made_it(tmp_path, capsys):
    assert run(tmp_path, f"--env-id envs:Tiny-v0 {SMALL} --expert-data {write_npz(tmp_path / 'd.npz')}") == 2
    assert "give --expert too" in capsys.readouterr().err
    assert run(tmp_path, f"--env-id envs:Tiny-v0 {SMALL}") == 2
    assert "there is no expert for it; give --expert" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["d.npz"]


def test_an_environment_that_breaks_ends_the_run_with_1(tmp_path, tiny, capsys):
    kwargs = '{"bad":"observation","bad_at":130}'
    assert run(tmp_path, f"{tiny} --env-kwargs {kwargs}") == 1
    assert "observation became NaN or infinite" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- what is shipped


def test_metadata_names_what_the_repository_pins():
    header = (ROOT / "dagger.py").read_text().split("# ///\n")[0].removeprefix("# /// script\n")
    metadata = tomllib.loads("".join(line.removeprefix("# ") for line in header.splitlines(keepends=True)))
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(metadata["dependencies"]) <= set(pinned)


@needs_real_files
def test_dagger_repairs_hopper(tmp_path):
    """Where two demonstrations are not enough, labels on the learner's own states are."""
    data, expert = (real(f"expert_{kind}_Hopper-v4.pkl") for kind in ("data", "policy"))
    arguments = f"--env-id Hopper-v4 --expert-data {data} --expert {expert} --torch-threads 1 --eval-episodes 2"
    assert run(tmp_path, f"{arguments} --num-iterations 7 --train-steps-per-iteration 700") == 0
    share = [
        float(row["eval_sampled_return_mean"]) / float(row["expert_return_mean"]) for row in rows(tmp_path / "run")
    ]
    assert share[0] < 0.6
    assert max(share) > 0.9
