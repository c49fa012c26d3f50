"""Demonstrations and experts from every format, good, damaged and hostile, in bc.py and dagger.py alike."""

import contextlib
import os
import pickle
import sys
import time
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
    trajectories,
    write_npz,
    write_pickle,
)

import bc
import dagger
import envs  # noqa: F401, registers Tiny-v0
import sac_continuous as sac

BOTH = pytest.mark.parametrize("script", [bc, dagger], ids=["bc", "dagger"])
SETTINGS = {"env_id": "envs:Tiny-v0"}
DATA = demonstrations()


def load(script, path, **settings):
    args = script.Args(**SETTINGS | settings | {"expert_data": path})
    return script.load_demonstrations(args, script.make_env(args))


def refused(script, function, *arguments):
    """The message of the UserError, one line."""
    with pytest.raises(script.UserError) as raised:
        function(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------- good files


@BOTH
def test_npz(script, tmp_path):
    data = load(script, write_npz(tmp_path / "d.npz"))
    assert all(np.array_equal(data[name], array) for name, array in demonstrations().items())
    data = load(script, write_npz(tmp_path / "d.npz"), num_trajectories=2)
    assert len(data["actions"]) == 40
    assert np.array_equal(data["rewards"], demonstrations()["rewards"][:40])


@BOTH
@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickle_of_every_protocol(script, protocol, tmp_path):
    data = load(script, write_pickle(tmp_path / "d.pkl", trajectories(demonstrations()), protocol))
    assert all(np.array_equal(data[name], array) for name, array in demonstrations().items())


@BOTH
def test_pickle_written_by_numpy_1(script, tmp_path):
    content = pickle.dumps(trajectories(demonstrations()), 2)
    assert b"numpy._core" in content
    (tmp_path / "d.pkl").write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    assert np.array_equal(load(script, str(tmp_path / "d.pkl"))["actions"], demonstrations()["actions"])


@BOTH
def test_an_episode_of_a_pickle_is_truncated_if_it_reached_the_limit_else_terminated(script, tmp_path):
    data = load(script, write_pickle(tmp_path / "d.pkl", trajectories(demonstrations())), max_episode_steps=21)
    assert np.array_equal(data["terminations"], demonstrations()["truncations"])
    assert not data["truncations"].any()


@BOTH
def test_an_episode_that_was_cut_off_counts(script, tmp_path):
    path = write_npz(tmp_path / "d.npz", **{name: array[:50] for name, array in demonstrations().items()})
    assert len(load(script, path)["actions"]) == 50
    assert "has 3" in refused(script, lambda: load(script, path, num_trajectories=4))


@BOTH
def test_actions_are_in_the_environments_units_in_files_and_in_one_to_minus_one_in_memory(script, tmp_path):
    own = 3 + 5 * demonstrations()["actions"]  # -2..8
    path = write_npz(tmp_path / "d.npz", actions=own)
    data = load(script, path, env_kwargs='{"low": -2, "high": 8}')
    assert data["actions"] == pytest.approx(demonstrations()["actions"], abs=1e-6)


def test_saved_data_is_what_was_loaded(tmp_path):
    kwargs = {"env_kwargs": '{"low": -2, "high": 8}'}
    first = load(bc, write_npz(tmp_path / "d.npz"), **kwargs)
    env = bc.make_env(bc.Args(**SETTINGS, **kwargs))
    bc.save_demonstrations(first, "envs:Tiny-v0", env, tmp_path / "saved.npz")
    with np.load(tmp_path / "saved.npz", allow_pickle=False) as file:
        saved = dict(file)
    assert saved.pop("env_id") == "envs:Tiny-v0"
    for name, array in demonstrations().items():
        assert saved[name].dtype == array.dtype
        assert saved[name] == pytest.approx(array, abs=1e-6)


def test_minari(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari", reason="Minari is optional and not installed")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env, episodes = sac.gym.make("Pendulum-v1", max_episode_steps=7), []
    for i in range(3):
        episode = {"observations": [env.reset(seed=i)[0]], "actions": [], "rewards": []}
        episode |= {"terminations": [], "truncations": []}
        while not any(episode["truncations"]):
            action = env.action_space.sample()
            values = [action, *env.step(action)[:4]]
            for name, value in zip(("actions", "observations", *list(episode)[2:]), values, strict=True):
                episode[name].append(value)
        episodes.append(EpisodeBuffer(id=i, **episode))
    about = {"author": "a", "author_email": "a", "code_permalink": "a", "algorithm_name": "a", "eval_env": env}
    minari.create_dataset_from_buffers("pendulum/test-v0", episodes, env=env, description="a", **about)

    data = load(bc, "minari:pendulum/test-v0", env_id="Pendulum-v1", num_trajectories=2)
    assert data["observations"] == pytest.approx(np.concatenate([e.observations[:-1] for e in episodes[:2]]))
    assert 2 * data["actions"] == pytest.approx(np.concatenate([e.actions for e in episodes[:2]]))  # torque -2..2
    assert np.flatnonzero(data["truncations"]).tolist() == [6, 13]
    message = refused(bc, lambda: load(bc, "minari:pendulum/test-v0", env_id="MountainCarContinuous-v0"))
    assert "3 numbers, those of MountainCarContinuous-v0 have 2" in message
    assert "no/such-v0: cannot be loaded" in refused(bc, lambda: load(bc, "minari:no/such-v0"))


def test_without_minari_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    assert "pip install 'minari" in refused(bc, lambda: load(bc, "minari:mujoco/hopper/expert-v0"))
    assert "bc.py --save-data" in refused(dagger, lambda: load(dagger, "minari:mujoco/hopper/expert-v0"))


def test_a_million_steps_load_in_two_seconds(tmp_path):
    steps = 1_000_000
    data = {name: np.resize(array, (steps, *array.shape[1:])) for name, array in demonstrations().items()}
    path = write_npz(tmp_path / "d.npz", **data)
    before = time.process_time()
    assert len(load(bc, path)["actions"]) == steps
    assert time.process_time() - before < 2


# ----------------------------------------------------------------------------------------------------- bad files

WRONG_ARRAYS = [
    ({"observations": np.zeros((60, 3), np.float32)}, "observations have 3 numbers, those of envs:Tiny-v0 have 2"),
    ({"actions": np.zeros((60, 4), np.float32)}, "actions have 4 numbers, those of envs:Tiny-v0 have 1"),
    ({name: array[:0] for name, array in demonstrations().items()}, "no demonstrations"),
    ({"observations": np.full((60, 2), np.nan, np.float32)}, "NaN or infinity in its observations"),
    ({"actions": np.full((60, 1), np.inf, np.float32)}, "NaN or infinity in its actions"),
    ({"rewards": np.full(60, np.nan, np.float32)}, "NaN or infinity in its rewards"),
    ({"observations": np.full((60, 2), 1e300)}, "NaN or infinity in its observations"),
    ({"rewards": np.zeros(59, np.float32)}, "unequal lengths"),
    ({"rewards": np.zeros((60, 1), np.float32)}, "must have two dimensions, all else one"),
    ({"actions": np.array(["a"] * 60)[:, None]}, "not numbers"),
    ({"actions": np.array([{}] * 60, dtype=object)[:, None]}, "allow_pickle"),
    ({"terminations": None}, "terminations"),
    ({"env_id": np.array("Hopper-v4")}, "demonstrates Hopper-v4, not --env-id envs:Tiny-v0"),
]


@BOTH
@pytest.mark.parametrize(("changes", "message"), WRONG_ARRAYS)
def test_wrong_arrays_in_a_npz(script, changes, message, tmp_path):
    assert message in refused(script, lambda: load(script, write_npz(tmp_path / "d.npz", **changes)))


def spoiled(change):
    content = trajectories(demonstrations())
    changed = change(content)
    return changed if isinstance(changed, dict) else content


WRONG_PICKLES = [
    (lambda c: c[1].update(action=c[1]["action"][:-1]), "trajectory 1 has arrays of unequal lengths: observation 20"),
    (lambda c: c[0].update(observation=np.zeros((20, 5))), "do not fit each other"),
    (lambda c: [t.update(observation=t["observation"][:, :1]) for t in c], "have 1 numbers"),
    (lambda c: c[2].pop("reward") is None, "expected a list of dicts"),
    (lambda c: c[0]["action"].fill(np.nan), "NaN or infinity in its actions"),
    (lambda c: c[0].update(reward="abc"), "reward of trajectory 0 is not an array of numbers"),
    (lambda c: c[0].update(reward=[1.0, [2.0]]), "reward of trajectory 0 is not an array of numbers"),
    (lambda c: c.clear(), "no demonstrations"),
    (lambda c: {"observation": 1}, "expected a list of dicts"),
    (lambda c: c[0].update(action=np.array([{}] * 20)), "dtype 'O8' are refused"),
    (lambda c: c[0].update(action=np.zeros(20, dtype="f4,f4")), "dtype 'V8' are refused"),
]


@BOTH
@pytest.mark.parametrize(("change", "message"), WRONG_PICKLES)
def test_wrong_content_of_a_pickle(script, change, message, tmp_path):
    path = write_pickle(tmp_path / "d.pkl", spoiled(change))
    assert message in refused(script, lambda: load(script, path))


@BOTH
def test_damaged_foreign_and_missing_files(script, tmp_path):
    good = {".npz": write_npz(tmp_path / "good.npz"), ".pkl": write_pickle(tmp_path / "g.pkl", trajectories(DATA))}
    for suffix, path in good.items():
        content = Path(path).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 4] ^= 1
        damaged = {"cut": content[:-100], "empty": b"", "text": b"hello", "none": None}
        if suffix == ".npz":  # a pickle has no checksum: a flipped bit of a number is a number
            damaged["flipped"] = bytes(flipped)
        for name, data in damaged.items():
            file = tmp_path / (name + suffix)
            if data is not None:
                file.write_bytes(data)
            assert str(file) in refused(script, lambda file=file: load(script, str(file)))
    assert "must be a .npz" in refused(script, lambda: load(script, str(tmp_path / "d.csv")))


def test_a_small_file_that_unpacks_to_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(bc, "MAX_DATA_BYTES", 10_000)
    np.savez_compressed(tmp_path / "d.npz", observations=np.zeros((10_000, 2), np.float32))
    assert "unpacks to more" in refused(bc, lambda: load(bc, str(tmp_path / "d.npz")))
    trajectory = trajectories(demonstrations())[0]
    path = write_pickle(tmp_path / "d.pkl", [trajectory] * 100)  # the same arrays a hundred times
    assert os.path.getsize(path) < 5_000
    assert "unpacks to more" in refused(bc, lambda: load(bc, path))


class Calls:
    """Pickled as a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Named:
    def __init__(self, name):
        self.__name__ = self.__qualname__ = name


def hostile_pickles(effect):
    command = f"touch {effect}"
    yield pickle.dumps(Calls(os.system, command))
    yield pickle.dumps([trajectories(demonstrations())[0] | {"action": Calls(os.system, command)}])
    yield pickle.dumps(Calls(eval, f"open({str(effect)!r}, 'w')"), 2)
    yield pickle.dumps(Calls(np.testing.rundocs, str(effect)))
    code = f"open({str(effect)!r}, 'w')"
    for module in ("numpy.testing._private.utils", "numpy.testing", "numpy._core.multiarray", "numpy", "builtins"):
        for name in ("runstring", "exec", "_reconstruct.__class__", "ndarray.tofile", "load"):
            yield f"c{module}\n{name}\n(V{code}\n(dtR.".encode()
    # numpy.ndarray itself makes an object array of any bytes: of forged pointers, here of 0x4141414141414141.
    yield b"cnumpy\nndarray\n((I1\nI1\ntcnumpy\ndtype\n(VO\ntRVAAAAAAAA\ntR."
    yield b"cnumpy\nndarray\n((I1\nI1\ntVO\nVAAAAAAAA\ntR."


@BOTH
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(script, tmp_path):
    effect = tmp_path / "effect"
    contents = list(hostile_pickles(effect))
    pickle.loads(contents[0])
    assert effect.exists()  # what the plain unpickler would do
    effect.unlink()
    for content in contents:
        (tmp_path / "d.pkl").write_bytes(content)
        message = refused(script, lambda: load(script, str(tmp_path / "d.pkl")))
        assert "refused" in message or "not a pickle" in message
        env = script.make_env(script.Args(**SETTINGS))
        refused(script, lambda env=env: script.PickledExpert(str(tmp_path / "d.pkl"), env))
        assert not effect.exists()


def test_a_npz_that_would_run_code_is_refused_and_runs_none(tmp_path):
    effect = tmp_path / "effect"
    path = write_npz(tmp_path / "d.npz", actions=np.array([Calls(os.system, f"touch {effect}")] * 60, dtype=object))
    assert "allow_pickle" in refused(bc, lambda: load(bc, path))
    assert not effect.exists()


def test_a_policy_file_that_would_run_code_is_refused_and_runs_none(tmp_path):
    effect = tmp_path / "effect"
    torch.save({"format": "policy/1", "state_dict": Calls(os.system, f"touch {effect}")}, tmp_path / "p.pt")
    assert "p.pt" in refused(bc, lambda: bc.load_policy(str(tmp_path / "p.pt")))
    assert not effect.exists()


def test_every_byte_of_a_pickle_flipped_is_refused_or_read(tmp_path):
    """Fuzzing: whatever a damaged pickle is, the answer is data or a UserError."""
    content, path = pickle.dumps(trajectories(demonstrations(episodes=1, steps=4)), 2), tmp_path / "d.pkl"
    for i in range(len(content)):
        for bit in (0, 3, 6):
            flipped = bytearray(content)
            flipped[i] ^= 1 << bit
            with contextlib.suppress(bc.UserError):
                path.write_bytes(bytes(flipped))
                bc.read_pickle(str(path), None)


# ------------------------------------------------------------------------------------------------------- experts


@BOTH
@pytest.mark.parametrize("nonlin_type", ["tanh", "lrelu"])
def test_cs285_expert_against_its_formula(script, nonlin_type, tmp_path):
    policy = cs285_policy(nonlin_type=nonlin_type)
    args = script.Args(**SETTINGS, env_kwargs='{"low": -2, "high": 8}', expert=write_pickle(tmp_path / "e.pkl", policy))
    expert = script.load_expert(args, script.make_env(args))
    obs = np.random.default_rng(1).normal(size=(50, 2)).astype(np.float32)
    action = expert.mean_action(torch.from_numpy(obs)).detach().numpy()
    assert 3 + 5 * action == pytest.approx(cs285_action(policy, obs), abs=1e-4)


@BOTH
def test_expert_from_a_policy_file_acts_as_that_policy(script, tmp_path):
    path = linear_expert(tmp_path / "e.pt", [[0.5, -2.0]], "envs:Tiny-v0", squash=True)
    args = script.Args(**SETTINGS, expert=path)
    obs = torch.randn(10, 2)
    action = script.load_expert(args, script.make_env(args)).mean_action(obs)
    assert torch.allclose(action[:, 0], (0.5 * obs[:, 0] - 2 * obs[:, 1]).tanh(), atol=1e-6)


@BOTH
def test_experts_for_another_environment_and_damaged_ones(script, tmp_path):
    def expert(path, **settings):
        args = script.Args(**SETTINGS | {"expert": str(path)} | settings)
        return refused(script, script.load_expert, args, script.make_env(args))

    policy = cs285_policy(obs_dim=4, action_dim=3)
    assert "4 observations and 3 actions" in expert(write_pickle(tmp_path / "e.pkl", policy))
    assert "2 and 1" in expert(write_pickle(tmp_path / "e.pkl", policy))
    assert "3 observations" in expert(linear_expert(tmp_path / "e.pt", [[1.0, 1, 1]], "envs:Tiny-v0"))
    assert "Hopper-v4, not in --env-id" in expert(linear_expert(tmp_path / "e.pt", [[1.0, 1]], "Hopper-v4"))
    assert "not a policy of CS285" in expert(write_pickle(tmp_path / "e.pkl", trajectories(DATA)))
    policy = cs285_policy()
    policy["GaussianPolicy"]["out"]["AffineLayer"]["W"] = np.zeros((7, 1))
    assert "do not fit each other" in expert(write_pickle(tmp_path / "e.pkl", policy))
    policy = cs285_policy()
    policy["GaussianPolicy"]["out"]["AffineLayer"]["W"][0] = np.nan
    assert "not finite" in expert(write_pickle(tmp_path / "e.pkl", policy))
    (tmp_path / "e.pkl").write_bytes(b"")
    assert "e.pkl" in expert(tmp_path / "e.pkl")
    assert "no expert" in expert("", env_id="Pendulum-v1", expert=None)
    assert "cannot be read" in expert(tmp_path / "none.pt")


def test_only_contact_forces_may_be_missing(tmp_path):
    args = bc.Args(env_id="Ant-v4", expert=write_pickle(tmp_path / "e.pkl", cs285_policy(111, 8)))
    expert = bc.load_expert(args, bc.make_env(args))
    obs = np.random.default_rng(0).normal(size=(5, 27)).astype(np.float32)
    by_hand = cs285_action(cs285_policy(111, 8), obs)
    assert expert.mean_action(torch.from_numpy(obs)).detach().numpy() == pytest.approx(by_hand, abs=1e-4)
    write_pickle(tmp_path / "e.pkl", cs285_policy(110, 8))
    assert "110 observations" in refused(bc, bc.load_expert, args, bc.make_env(args))


# ---------------------------------------------------------------------------------------------- the real files


@needs_real_files
@pytest.mark.parametrize(("env_id", "limit"), [("Ant-v4", 4400), ("HalfCheetah-v4", 3900), ("Hopper-v4", 3700)])
def test_real_files(env_id, limit):
    """The recorded actions are the expert's in the recorded states, and its episodes end as well as the recorded."""
    expert = real(f"expert_policy_{env_id}.pkl")
    args = dagger.Args(env_id=env_id, expert_data=real(f"expert_data_{env_id}.pkl"), expert=expert)
    env = dagger.make_env(args)
    data, expert = dagger.load_demonstrations(args, env), dagger.load_expert(args, env)
    assert len(data["actions"]) == 2000
    assert np.flatnonzero(data["truncations"]).tolist() == [999, 1999]
    with torch.no_grad():
        action = expert.mean_action(torch.from_numpy(data["observations"])).numpy()
    assert action == pytest.approx(data["actions"], abs=1e-4)
    assert bc.episode_returns(data).min() > limit
    assert dagger.evaluate(expert, [env])["returns"].min() > limit
