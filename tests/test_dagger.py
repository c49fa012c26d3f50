"""dagger.py: data, rollouts, labels, what DAgger repairs, and its runs from command line to run folder."""

import itertools
import os
import re
from itertools import islice

import numpy as np
import pytest
import torch
from imitation import (
    HOMEWORK,
    ODD_CENTRE,
    ODD_HALF_WIDTH,
    convert,
    cs285_action,
    cs285_policy,
    demonstrations,
    linear_expert,
    load_actor,
    make_actor,
    mean_action,
    needs_real_files,
    policy_of,
    real_arguments,
    rows,
    run,
    same_policy,
    same_run,
    the_error,
    write_npz,
    write_pickle,
)

import bc
import dagger
import envs  # noqa: F401, registers Tiny-v0

SMALL = "--num-iterations 4 --train-steps-per-iteration 20 --rollout-steps 30 --batch-size 10 --hidden-size 16"
SMALL += " --eval-episodes 2 --log-every 10 --torch-threads 1"
AS_BC = "--learning-rate 1e-3 --lr-schedule constant --loss nll"


@pytest.fixture
def small(tmp_path):
    """Arguments for a small run with a linear expert."""
    return f"--env-id Tiny-v0 --expert {linear_expert(tmp_path / 'expert.pt', [[1.0, -0.5]])} {SMALL}"


# ----------------------------------------------------------------------------------------------- batches and rollouts
def test_batches_are_without_replacement_and_new_in_each_iteration():
    batches = [torch.stack(list(islice(dagger.batches(23, 5, i, 1), 12))) for i in range(2)]
    for i in range(3):
        assert len(batches[0][4 * i : 4 * i + 4].unique()) == 20
    assert len(batches[0].unique()) == 23
    assert not torch.equal(batches[0][:4], batches[0][4:8])
    assert not torch.equal(batches[0], batches[1])


def constant(action, std):
    """An actor that says `action`, give or take `std`, whatever it sees."""
    actor = make_actor()
    actor.load_state_dict({name: torch.zeros_like(value) for name, value in actor.state_dict().items()})
    actor.net[-1].bias.data.fill_(action)
    actor.log_std.data.fill_(np.log(std))
    return actor


def rollouts(learner, expert, iteration=1, **settings):
    """The episodes, and the actions that reached the environment."""
    args = dagger.Args(env_id="Tiny-v0", **settings)
    env = dagger.make_env(args)
    return list(dagger.rollouts(learner, expert, env, args, iteration)), np.array(env.unwrapped.actions)[:, 0]


@pytest.mark.parametrize(("beta", "iteration"), [(0.0, 1), (1.0, 3), (0.8, 1), (0.8, 2)])
def test_rollouts_mix_expert_and_learner_step_by_step(beta, iteration):
    """The expert's share is beta^i; of the two the learner alone samples."""
    arguments = constant(0.5, 0.02), constant(-0.5, 0.02), iteration
    episodes, actions = rollouts(*arguments, expert_mixing=beta, rollout_steps=2000)
    by_expert = actions == -0.5
    assert by_expert.mean() == pytest.approx(beta**iteration, abs=0.05)  # 4.5 standard deviations
    assert np.all(by_expert | (actions > 0.3))
    if 0 < beta < 1:
        assert np.corrcoef(by_expert[1:], by_expert[:-1])[0, 1] == pytest.approx(0, abs=0.1)
    if beta < 1:  # the learner's actions are sampled
        assert np.std(actions[~by_expert]) == pytest.approx(0.02, rel=0.15)
    assert [len(episode["rewards"]) for episode in episodes] == [20] * 100
    assert np.array_equal(np.concatenate([episode["actions"] for episode in episodes])[:, 0], actions)


def test_rollouts_are_whole_episodes_until_there_are_enough_steps():
    actor = make_actor()
    episodes, _ = rollouts(actor, actor, rollout_steps=41)
    assert [len(episode["rewards"]) for episode in episodes] == [20, 20, 20]
    assert all(episode["truncations"][-1] and not episode["truncations"][:-1].any() for episode in episodes)
    starts = [tuple(episode["observations"][0]) for episode in episodes]
    for changes in ({"iteration": 2}, {"seed": 2}):
        [other, *_] = rollouts(actor, actor, **changes, rollout_steps=20)[0]
        starts.append(tuple(other["observations"][0]))
    assert len(set(starts)) == 5
    assert len(rollouts(actor, actor, rollout_steps=40)[0]) == 2


# ------------------------------------------------------------------------------------------------------------ the data
def standardised(obs, demonstrated):
    obs, demonstrated = torch.from_numpy(obs), torch.from_numpy(demonstrated)
    return (obs - demonstrated.mean(0)) / demonstrated.std(0, correction=0).clamp(min=1e-2)


@pytest.fixture
def trained_on(monkeypatch):
    """What each iteration is trained on, obs and action, and what the rollouts before it saw."""
    data, seen, original = {}, {}, dagger.rollouts

    def bc_loss(actor, obs, action, kind):
        data[len(seen)] = obs.clone(), action.clone()
        return bc.bc_loss(actor, obs, action, kind)

    def spying(actor, expert, env, args, iteration):
        episodes = list(original(actor, expert, env, args, iteration))
        seen[iteration] = np.concatenate([episode["observations"] for episode in episodes])
        yield from episodes

    monkeypatch.setattr(dagger, "bc_loss", bc_loss)
    monkeypatch.setattr(dagger, "rollouts", spying)
    monkeypatch.setattr(dagger, "batches", lambda num_rows, *_: itertools.repeat(torch.arange(num_rows)))
    return data, seen


def test_every_visited_state_is_labelled_by_the_expert_in_the_right_units(tmp_path, trained_on, monkeypatch):
    """An expert of CS285 speaks in the environment's own units, the learner and the data set in [-1, 1]."""
    policy, expert = cs285_policy(), str(tmp_path / "expert.pt")
    assert convert.main([write_pickle(tmp_path / "expert.pkl", policy), expert, "--env-id", "Odd-v0"]) == 0
    played, original = [], dagger.rollout
    monkeypatch.setattr(dagger, "rollout", lambda *given: played.append(original(*given)) or played[-1])
    arguments = f"--env-id Odd-v0 --expert {expert} {SMALL} --expert-mixing 0.5"
    assert run(dagger, arguments, tmp_path / "run") == 0
    data, seen = trained_on
    assert [len(obs) for obs, _ in data.values()] == [40, 80, 120, 160]  # demonstrations, then episodes
    demonstrated = all_obs = np.concatenate([episode["observations"] for episode in played[:2]])
    for i, (obs, action) in data.items():
        all_obs = np.concatenate([all_obs, seen[i]]) if i else all_obs
        assert torch.equal(obs, standardised(all_obs, demonstrated))
        assert ODD_CENTRE + ODD_HALF_WIDTH * action.numpy() == pytest.approx(cs285_action(policy, all_obs), abs=1e-4)
    assert [row["env_steps"] for row in rows(tmp_path / "run")] == ["0", "40", "80", "120"]
    assert [row["expert_queries"] for row in rows(tmp_path / "run")] == ["0", "40", "80", "120"]


@pytest.mark.parametrize("buffer_size", [30, 50, 130])
def test_the_buffer_bounds_what_is_trained_on_and_the_oldest_leave_first(buffer_size, tmp_path, small, trained_on):
    data_file = write_npz(tmp_path / "d.npz")
    arguments = f"{small} --expert-data {data_file} --buffer-size {buffer_size}"
    assert run(dagger, arguments, tmp_path / "run") == 0
    expert, all_obs = load_actor(tmp_path / "expert.pt"), demonstrations()["observations"]
    data, seen = trained_on
    for i, (obs, action) in data.items():
        all_obs = np.concatenate([all_obs, seen[i]]) if i else all_obs
        kept = all_obs[-buffer_size:]
        assert torch.equal(obs, standardised(kept, demonstrations()["observations"][-buffer_size:]))
        labels = min(len(obs), 40 * i)
        expected = mean_action(expert, torch.from_numpy(kept[len(obs) - labels :]))
        assert action[len(obs) - labels :].numpy() == pytest.approx(expected)
    assert len(data) == 4
    first = data[0][1].numpy()
    assert np.array_equal(first, demonstrations()["actions"][-buffer_size:])


def test_the_learning_rate_falls_to_zero_in_each_iteration(tmp_path, small, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: [rates.append(self.param_groups[0]["lr"]), step(self)])
    assert run(dagger, f"{small} --learning-rate 0.1", tmp_path / "run") == 0
    assert rates == pytest.approx(4 * [0.1 * (20 - i) / 20 for i in range(20)])


# ----------------------------------------------------------------------------------------------- what DAgger is about
def test_a_clone_drifts_where_dagger_does_not(tmp_path):
    expert = linear_expert(tmp_path / "expert.pt", [[-2.0]], "Drift-v0")
    common = f"--env-id Drift-v0 --expert {expert} {HOMEWORK} --hidden-size 16 --torch-threads 1 --eval-episodes 1"
    iterations = "--train-steps-per-iteration 300 --rollout-steps 300 --num-iterations 5 --lr-schedule constant"
    assert run(dagger, f"{common} {iterations} --batch-size 100", tmp_path / "dagger") == 0
    assert run(bc, f"{common} --train-steps 1500 --batch-size 100", tmp_path / "bc") == 0
    clone, first, last = rows(tmp_path / "bc")[-1], rows(tmp_path / "dagger")[0], rows(tmp_path / "dagger")[-1]
    assert float(last["expert_return_mean"]) == 100
    assert float(clone["eval_return_mean"]) < 40
    assert float(first["eval_return_mean"]) < 40
    assert float(last["eval_return_mean"]) == 100
    assert float(last["eval_sampled_return_mean"]) == 100


def test_iteration_0_is_bc(tmp_path, small, monkeypatch):
    """From the same weights on the same batches, with no step held out, both scripts make the same policy."""
    indices = [torch.randperm(60)[:10] for _ in range(20)]
    monkeypatch.setattr(dagger, "batches", lambda *_: iter(indices))
    monkeypatch.setattr(bc, "batches", lambda *_: iter(indices))
    data = f"--expert-data {write_npz(tmp_path / 'd.npz')}"
    assert run(dagger, f"{small} {data} {AS_BC} --num-iterations 2", tmp_path / "dagger") == 0
    same = "--env-id Tiny-v0 --train-steps 20 --batch-size 10 --hidden-size 16 --eval-episodes 2 --torch-threads 1"
    assert run(bc, f"{same} {data} --validation-fraction 0", tmp_path / "bc") == 0
    assert same_policy(policy_of(tmp_path / "bc"), policy_of(tmp_path / "dagger", "policy_iteration_0.pt"))


@needs_real_files
def test_dagger_repairs_hopper(tmp_path):
    """Where a tenth of a demonstration is not enough, labels on the learner's own states are."""
    arguments = f"{real_arguments(tmp_path, 'Hopper-v4', steps=100)} --batch-size 40 --eval-episodes 2"
    assert run(dagger, f"{arguments} --num-iterations 7 --train-steps-per-iteration 700", tmp_path / "run") == 0
    table = rows(tmp_path / "run")
    share = [float(row["eval_sampled_return_mean"]) / float(row["expert_return_mean"]) for row in table]
    assert share[0] < 0.6
    assert max(share) > 0.9


# --------------------------------------------------------------------------------------------------------------- runs
def test_run_folder(tmp_path, small, capsys):
    assert run(dagger, small, tmp_path / "run") == 0
    out = capsys.readouterr().out
    for command in ("plot.py {0} --out {0}/curves.png", "tensorboard --logdir {0}", "sac_continuous.py --evaluate {0}"):
        assert command.format(tmp_path / "run") in out
    names = {re.sub("events.*", "events", path.name) for path in (tmp_path / "run").iterdir()}
    policies = [f"policy_iteration_{i}.pt" for i in range(4)]
    assert names == {"args.json", "progress.csv", "policy.pt", "events", *policies}
    assert same_policy(policy_of(tmp_path / "run"), policy_of(tmp_path / "run", policies[3]))
    assert not same_policy(policy_of(tmp_path / "run"), policy_of(tmp_path / "run", policies[2]))


def test_progress_csv(tmp_path, small, monkeypatch):
    returns, original = {}, dagger.rollouts

    def spying(actor, expert, env, args, iteration):
        for episode in original(actor, expert, env, args, iteration):
            returns.setdefault(iteration, []).append(episode["rewards"].sum(dtype=float))
            yield episode

    monkeypatch.setattr(dagger, "rollouts", spying)
    assert run(dagger, small, tmp_path / "run") == 0
    text = (tmp_path / "run/progress.csv").read_bytes().decode()
    assert "\r" not in text
    columns = "step,wall_time_s,eval_return_mean,eval_return_std,eval_length_mean,iteration,env_steps,expert_queries"
    columns += ",train_return_mean,train_return_std,train_loss,eval_sampled_return_mean,eval_sampled_return_std"
    assert text.startswith(f"{columns},expert_return_mean\n")
    table = rows(tmp_path / "run")
    assert [row["step"] for row in table] == ["20", "40", "60", "80"]
    assert [row["iteration"] for row in table] == ["0", "1", "2", "3"]
    for i, row in enumerate(table):
        expected = [np.mean(returns[i]), np.std(returns[i])] if i else [np.nan, np.nan]
        found = [float(row[name]) for name in ("train_return_mean", "train_return_std")]
        assert found == pytest.approx(expected, nan_ok=True)
    env = bc.make_env(bc.Args(env_id="Tiny-v0"))
    learner, expert = load_actor(tmp_path / "run"), load_actor(tmp_path / "expert.pt")
    result, sampled = bc.evaluate(learner, env, 2), bc.evaluate(learner, env, 2, dagger.stream(dagger.EVALUATION, 1))
    assert [float(table[-1][f"eval_{name}"]) for name in result] == list(result.values())
    found = [float(table[-1][f"eval_sampled_{name}"]) for name in ("return_mean", "return_std")]
    assert found == list(sampled.values())[:2]
    assert float(table[0]["expert_return_mean"]) == bc.evaluate(expert, env, 2)["return_mean"]


def test_same_seed_same_bytes_and_evaluating_changes_nothing(tmp_path, small):
    small += " --expert-mixing 0.5 --num-iterations 3"
    for name, more in [("a", ""), ("b", ""), ("c", "--seed 2"), ("d", "--eval-episodes 5 --log-every 3")]:
        assert run(dagger, f"{small} {more}", tmp_path / name) == 0
    assert same_run(tmp_path / "a", tmp_path / "b")
    a, c, d = (policy_of(tmp_path / name) for name in "acd")
    assert not same_policy(a, c)
    assert same_policy(a, d)


def test_more_demonstrated_steps_than_there_are(tmp_path, small, capsys):
    assert run(dagger, f"{small} --batch-size 41", tmp_path / "run") == 2
    assert "--batch-size 41: there are only 40 demonstrated steps" in the_error(capsys)
    assert os.listdir(tmp_path) == ["expert.pt"]


BROKEN = [  # 80 steps make the demonstrations and evaluate the expert, 80 the first iteration, then come the rollouts
    ({"bad": "evaluation", "bad_at": 100}, "step 20: eval_return_mean", 0),
    ({"bad": "observation", "bad_at": 170}, "step 30: loss", 1),
    ({"bad": "reward", "bad_at": 170}, "step 40: train_return_mean", 1),
    ({"bad": "evaluation", "bad_at": 250}, "step 40: eval_sampled_return_mean", 1),
]


@pytest.mark.filterwarnings("ignore:invalid value")  # the deviation of infinite returns
@pytest.mark.parametrize(("kwargs", "message", "iterations"), BROKEN)
def test_an_environment_that_breaks_ends_the_run(kwargs, message, iterations, tmp_path, small, capsys):
    kwargs = str(kwargs).replace("'", '"').replace(" ", "")
    assert run(dagger, f"{small} --env-kwargs {kwargs}", tmp_path / "run") == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"error: {message} became NaN or infinite")
    assert "Traceback" not in err
    assert len(list((tmp_path / "run").glob("policy_iteration_*.pt"))) == iterations
    for path in (tmp_path / "run").glob("policy*.pt"):
        assert all(value.isfinite().all() for value in policy_of(path.parent, path.name)["state_dict"].values())
