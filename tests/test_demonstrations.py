"""Demonstrations and experts in this project's formats, and experts/convert.py, which makes them of other files."""

import contextlib
import io
import os
import pickle
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from imitation import (
    ODD_CENTRE,
    ODD_HALF_WIDTH,
    REAL,
    Calls,
    convert,
    converted,
    cs285_action,
    cs285_policy,
    demonstrations,
    linear_expert,
    load_actor,
    make_actor,
    mean_action,
    needs_real_files,
    policy_of,
    the_error,
    trajectories,
    write_npz,
    write_pickle,
)

import bc
import envs  # noqa: F401, registers Tiny-v0

DATA = demonstrations()
ODD_DATA = demonstrations(action_dim=2)


def load(path, env_id="Tiny-v0", **settings):
    args = bc.Args(env_id=env_id, expert_data=str(path), **settings)
    return bc.load_demonstrations(args, bc.make_env(args))


def refused(function, *arguments, **settings):
    """The message of bad input."""
    with pytest.raises(bc.Failure) as raised:
        function(*arguments, **settings)
    exit_code, message = raised.value.args
    assert exit_code == 2
    return message


def same_arrays(a, b):
    return all(np.array_equal(a[name], b[name]) for name in bc.FIELDS)


# ------------------------------------------------------------------------------------------------- this project's .npz
def test_npz(tmp_path):
    path = write_npz(tmp_path / "d.npz")
    assert same_arrays(load(path), DATA)
    assert same_arrays(load(path, num_trajectories=2), {name: array[:40] for name, array in DATA.items()})


def test_an_episode_that_was_cut_off_counts(tmp_path):
    path = write_npz(tmp_path / "d.npz", **{name: array[:50] for name, array in DATA.items()})
    assert np.flatnonzero(load(path)["truncations"]).tolist() == [19, 39, 49]
    assert len(load(path, num_trajectories=3)["actions"]) == 50
    assert "it has 3 episodes, not 4" in refused(load, path, num_trajectories=4)


def test_either_flag_ends_an_episode(tmp_path):
    path = write_npz(tmp_path / "d.npz", terminations=DATA["truncations"], truncations=DATA["terminations"])
    assert len(load(path, num_trajectories=2)["actions"]) == 40


def test_actions_are_in_the_environments_units_in_files_and_in_one_to_minus_one_in_memory(tmp_path):
    own = ODD_CENTRE + ODD_HALF_WIDTH * ODD_DATA["actions"]
    data = load(write_npz(tmp_path / "d.npz", "Odd-v0", **ODD_DATA | {"actions": own}), "Odd-v0")
    assert data["actions"] == pytest.approx(ODD_DATA["actions"], abs=1e-6)
    assert data["actions"].dtype == np.float32


WRONG_ARRAYS = [
    ({"observations": np.zeros((60, 3), np.float32)}, "Tiny-v0 needs [(60, 2), (60, 1), (60,), (60,), (60,)]"),
    ({"actions": np.zeros((60, 4), np.float32)}, "with shapes [(60, 2), (60, 4), (60,), (60,), (60,)]"),
    ({name: array[:0] for name, array in DATA.items()}, "d.npz: "),
    ({"observations": np.full((60, 2), np.nan, np.float32)}, "NaN or infinity in its observations"),
    ({"actions": np.full((60, 1), np.inf, np.float32)}, "NaN or infinity in its actions"),
    ({"rewards": np.full(60, np.nan, np.float32)}, "NaN or infinity in its rewards"),
    ({"observations": np.full((60, 2), 1e300)}, "NaN or infinity in its observations"),
    ({"rewards": np.zeros(59, np.float32)}, "with shapes"),
    ({"rewards": np.zeros((60, 1), np.float32)}, "with shapes"),
    ({"rewards": np.zeros((), np.float32)}, "d.npz: "),
    ({"actions": np.array(["a"] * 60)[:, None]}, "could not convert string to float"),
    ({"actions": np.array([{}] * 60, dtype=object)[:, None]}, "allow_pickle"),
    ({"terminations": None}, "terminations"),
    ({"env_id": np.array("Hopper-v4")}, "of Hopper-v4 with shapes"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("changes", "message"), WRONG_ARRAYS)
def test_wrong_arrays_in_a_npz(changes, message, tmp_path):
    assert message in refused(load, write_npz(tmp_path / "d.npz", **changes))


def test_damaged_and_foreign_files_instead_of_a_npz(tmp_path):
    path = Path(write_npz(tmp_path / "d.npz"))
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 4] ^= 1
    policy = Path(linear_expert(tmp_path / "e.pt", [[1.0, 0.0]])).read_bytes()
    for damaged in (content[:-100], b"", b"hello", bytes(flipped), policy, pickle.dumps(trajectories(DATA))):
        path.write_bytes(damaged)
        assert refused(load, path).startswith(f"{path}: ")


def test_a_small_npz_that_unpacks_to_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    """The file's own table of contents says how large it gets; here it says so of an empty array."""
    original = bc.zipfile.ZipFile.infolist

    def infolist(archive):
        infos = original(archive)
        infos[0].file_size = 2**34
        return infos

    path = write_npz(tmp_path / "d.npz")
    monkeypatch.setattr(bc.zipfile.ZipFile, "infolist", infolist)
    assert "unpacks to more" in refused(load, path)


def test_a_npz_that_would_run_code_runs_none(tmp_path):
    effect = tmp_path / "effect"
    for name in ("actions", "env_id"):
        hostile = np.array([Calls(os.system, f"touch {effect}")] * 60, dtype=object)[:, None]
        assert "allow_pickle" in refused(load, write_npz(tmp_path / "d.npz", **{name: hostile}))
    assert not effect.exists()


# ------------------------------------------------------------------------------------------------ this project's .pt
def test_an_expert_acts_as_its_policy(tmp_path):
    actor = load_actor(linear_expert(tmp_path / "e.pt", [[0.5, -2.0]], squash=True))
    obs = torch.randn(10, 2)
    assert mean_action(actor, obs)[:, 0] == pytest.approx((0.5 * obs[:, 0] - 2 * obs[:, 1]).tanh().numpy(), abs=1e-6)


OTHER_POLICIES = [
    {"env_id": "Hopper-v4"},
    {"action_low": [-2.0]},
    {"action_high": [2.0]},
    {"obs_dim": 3},
    {"action_dim": 2},
    {"format": "sac-checkpoint/6"},
    {"activation": "maximum"},
    {"hidden_size": 5},
    {"state_dict": {}},
    {"state_dict": make_actor(hidden_size=4, activation="relu").state_dict() | {"log_std": torch.tensor([torch.nan])}},
    {"state_dict": None},
]


@pytest.mark.parametrize("changes", OTHER_POLICIES, ids=[str(changes) for changes in OTHER_POLICIES])
def test_other_policies_are_refused(changes, tmp_path):
    path = linear_expert(tmp_path / "e.pt", [[1.0, 1.0]], **changes)
    assert refused(load_actor, path).startswith(f"--expert {path}: ")


def test_every_damage_to_a_policy_is_noticed(tmp_path):
    content, path = Path(linear_expert(tmp_path / "e.pt", [[1.0, 1.0]])).read_bytes(), tmp_path / "damaged.pt"
    expected = mean_action(load_actor(tmp_path / "e.pt"), torch.ones(1, 2))
    damaged = [b"", b"hello", content[:-1], content[: len(content) // 2]]
    damaged += [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(0, len(content), 23)]
    for data in damaged:
        path.write_bytes(data)
        with contextlib.suppress(bc.Failure):  # what is left is a byte that nobody reads
            assert mean_action(load_actor(path), torch.ones(1, 2)) == expected
    torch.save([1, 2], path)
    assert "damaged.pt" in refused(load_actor, path)


def test_a_policy_that_would_run_code_runs_none(tmp_path):
    effect = tmp_path / "effect"
    call = Calls(os.system, f"touch {effect}")
    for number, content in enumerate([call, {"format": "policy/1", "state_dict": call}]):
        torch.save(content, tmp_path / f"{number}.pt")
        linear_expert(tmp_path / "e.pt", [[1.0, 1.0]], state_dict=call)
        for path in (tmp_path / f"{number}.pt", tmp_path / "e.pt"):
            assert refused(load_actor, path).startswith(f"--expert {path}: ")
            assert convert.main([str(path), str(tmp_path / "out.npz")]) == 2
    assert not effect.exists()
    assert not (tmp_path / "out.npz").exists()


# ------------------------------------------------------------------------------------- convert.py: pickles of CS285
def to_npz(tmp_path, content, env_id="Tiny-v0"):
    """The arrays of the converted file, from pickled bytes or what to pickle."""
    source, out = tmp_path / "d.pkl", tmp_path / "out.npz"
    source.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    out.unlink(missing_ok=True)
    convert.convert(str(source), out, env_id, None)
    with np.load(out) as file:
        return dict(file)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol(protocol, tmp_path):
    arrays = to_npz(tmp_path, pickle.dumps(trajectories(DATA), protocol))
    assert same_arrays(arrays, DATA)
    assert {name: arrays[name].dtype for name in bc.FIELDS} == {name: DATA[name].dtype for name in bc.FIELDS}
    assert arrays["env_id"] == "Tiny-v0"


def test_pickle_written_by_numpy_1(tmp_path):
    content = pickle.dumps(trajectories(DATA), 2)
    assert b"numpy._core" in content
    assert same_arrays(to_npz(tmp_path, content.replace(b"numpy._core", b"numpy.core")), DATA)


def test_arrays_in_another_order_in_memory_and_lists(tmp_path):
    content = trajectories(DATA)
    content[0]["observation"] = np.asfortranarray(content[0]["observation"])
    content[1]["observation"] = content[1]["observation"].astype(">f8")
    content[2]["reward"] = content[2]["reward"].tolist()
    for protocol in (2, 5):
        assert same_arrays(to_npz(tmp_path, pickle.dumps(content, protocol)), DATA)


def test_an_episode_of_a_pickle_is_truncated_if_it_reached_the_limit_else_terminated(tmp_path):
    content = trajectories(DATA)
    content[1] = {name: array[:7] for name, array in content[1].items()}
    arrays = to_npz(tmp_path, content)
    assert np.flatnonzero(arrays["truncations"]).tolist() == [19, 46]
    assert np.flatnonzero(arrays["terminations"]).tolist() == [26]


def test_actions_of_a_pickle_stay_in_the_environments_units(tmp_path):
    own = ODD_CENTRE + ODD_HALF_WIDTH * ODD_DATA["actions"]
    arrays = to_npz(tmp_path, trajectories(ODD_DATA | {"actions": own}), "Odd-v0")
    assert arrays["actions"] == pytest.approx(own, abs=1e-6)


WRONG_PICKLES = [
    (lambda c: c[0]["observation"].fill(1e300), "NaN or infinity in its observations"),
    (lambda c: c[1].update(action=c[1]["action"][:-1]), "unequal lengths"),
    (lambda c: (c[0].update(action=c[0]["action"][1:]), c[1].update(action=np.zeros((21, 1)))), "unequal lengths"),
    (lambda c: c[0].update(observation=np.zeros((20, 5))), "must match exactly"),
    (lambda c: [t.update(observation=t["observation"][:, :1]) for t in c], "Tiny-v0 needs [(60, 2)"),
    (lambda c: c[2].pop("reward"), "'reward'"),
    (lambda c: c[0]["action"].fill(np.nan), "NaN or infinity in its actions"),
    (lambda c: c[0].update(reward="abc"), "holds str where numbers should be"),
    (lambda c: c[0].update(reward=[1.0, [2.0]]), "inhomogeneous"),
    (lambda c: c.clear(), "at least one array"),
    (lambda c: c.append(1), "not subscriptable"),
    (lambda c: c[0].update(action=np.array([{}] * 20)), "dtype 'O8' are refused"),
    (lambda c: c[0].update(action=np.zeros(20, dtype="f4,f4")), "dtype 'V8' are refused"),
    (lambda c: c[0].update(action=np.zeros(20, dtype="c8")), "dtype 'c8' are refused"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("change", "message"), WRONG_PICKLES)
def test_wrong_content_of_a_pickle(change, message, tmp_path, capsys):
    content = trajectories(DATA)
    change(content)
    source, out = write_pickle(tmp_path / "d.pkl", content), tmp_path / "out.npz"
    assert convert.main([source, str(out), "--env-id", "Tiny-v0"]) == 2
    assert message in the_error(capsys)
    assert not out.exists()


class Named:
    def __init__(self, name):
        self.__name__ = self.__qualname__ = name


def hostile_pickles(effect):
    command = f"touch {effect}"
    yield pickle.dumps(Calls(os.system, command))
    yield pickle.dumps([trajectories(DATA)[0] | {"action": Calls(os.system, command)}])
    yield pickle.dumps(Calls(eval, f"open({str(effect)!r}, 'w')"), 2)
    yield pickle.dumps(Calls(np.testing.rundocs, str(effect)))
    code = f"open({str(effect)!r}, 'w')"
    for module in ("numpy.testing._private.utils", "numpy.testing", "numpy._core.multiarray", "numpy", "builtins"):
        for name in ("runstring", "exec", "_reconstruct.__class__", "ndarray.tofile", "load"):
            yield f"c{module}\n{name}\n(V{code}\n(dtR.".encode()
    # numpy.ndarray itself makes an object array of any bytes: of forged pointers, here of 0x4141414141414141.
    yield b"cnumpy\nndarray\n((I1\nI1\ntcnumpy\ndtype\n(VO\ntRVAAAAAAAA\ntR."
    yield b"cnumpy\nndarray\n((I1\nI1\ntVO\nVAAAAAAAA\ntR."
    # NumPy would read a stand-in, too, where an attribute says: the same address, alone and as a list's object.
    for kind, memory in ((b"<f8", b"(L4702111234474983745L\nI00\nt"), (b"|O", b"C\x08AAAAAAAA")):
        interface = b"}(Vdata\n" + memory + b"Vshape\n(I1\ntVtypestr\nV" + kind + b"\nVversion\nI3\nu"
        forged = b"cnumpy.core.multiarray\n_reconstruct\n}V__array_interface__\n" + interface + b"sb"
        for value in (forged, b"](" + forged + b"e"):
            yield b"](}(Vobservation\n" + value + b"Vaction\nI0\nVreward\nI0\nue."


def test_a_pickle_that_would_run_code_is_refused_in_a_line_and_runs_none(tmp_path, capsys):
    effect, source = tmp_path / "effect", tmp_path / "d.pkl"
    contents = list(hostile_pickles(effect))
    pickle.loads(contents[0])
    assert effect.exists()  # what the plain unpickler would do
    effect.unlink()
    for content in contents:
        source.write_bytes(content)
        for out in ("out.npz", "out.pt"):
            assert convert.main([str(source), str(tmp_path / out), "--env-id", "Tiny-v0"]) == 2
            assert the_error(capsys).startswith(f"error: {source}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["d.pkl"]


def test_every_byte_of_a_pickle_flipped_is_refused_or_read(tmp_path):
    """Whatever a damaged pickle is, the answer is arrays or one line."""
    content = pickle.dumps(trajectories(demonstrations(episodes=1, steps=4), steps=4), 2)
    for i in range(len(content)):
        for bit in (0, 3, 6):
            flipped = io.BytesIO(content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :])
            with contextlib.suppress(bc.Failure), bc.one_line("d.pkl"):
                convert.cs285_demonstrations(convert.ArrayUnpickler(flipped).load(), 20)
    for other in (b"", b"hello", content[:-9]):
        assert "d.pkl: " in refused(to_npz, tmp_path, other)


# --------------------------------------------------------------------------------------- convert.py: experts of CS285
def to_policy(tmp_path, content, env_id="Odd-v0"):
    out = tmp_path / "e.pt"
    out.unlink(missing_ok=True)
    convert.convert(write_pickle(tmp_path / "e.pkl", content), out, env_id, None)
    return out


@pytest.mark.parametrize("nonlin_type", ["tanh", "lrelu"])
def test_a_converted_expert_against_its_formula(nonlin_type, tmp_path):
    policy = cs285_policy(nonlin_type=nonlin_type)
    policy["GaussianPolicy"]["logstdevs_1_Da"][:] = [[0.5, -1.0]]
    actor = load_actor(to_policy(tmp_path, policy), "Odd-v0")
    obs = np.random.default_rng(1).normal(size=(50, 2)).astype(np.float32)
    expected = cs285_action(policy, obs)
    assert ODD_CENTRE + ODD_HALF_WIDTH * mean_action(actor, obs) == pytest.approx(expected, abs=1e-4)
    assert ODD_HALF_WIDTH * actor.log_std.detach().exp().numpy() == pytest.approx(np.exp([0.5, -1.0]))


def test_observations_that_never_vary_are_divided_by_next_to_nothing(tmp_path):
    """As the original does: the variance rounds to just below 0 or to 0, the deviation is 1e-6."""
    policy = cs285_policy()
    moments = policy["GaussianPolicy"]["obsnorm"]["Standardizer"]
    moments["meansq_1_D"][0] = moments["mean_1_D"][0] ** 2 * [1, 1 - 1e-9]
    obs = moments["mean_1_D"].astype(np.float32) + np.float32([[0, 0], [1e-6, 0]])
    actor = load_actor(to_policy(tmp_path, policy), "Odd-v0").double()
    with torch.no_grad():
        action = actor.mean_action(torch.from_numpy(obs).double()).numpy()
    assert ODD_CENTRE + ODD_HALF_WIDTH * action == pytest.approx(cs285_action(policy, obs), abs=0.3)


def spoil(**layer):
    policy = cs285_policy()
    policy["GaussianPolicy"]["out"]["AffineLayer"].update(layer)
    return policy


WRONG_POLICIES = [
    (cs285_policy(obs_dim=4, action_dim=3), "it maps 4 to 3 numbers, Odd-v0 has 2 and 2"),
    (trajectories(DATA), "must be integers"),
    (spoil(W=np.zeros((7, 2))), "do not fit each other"),
    (spoil(W=np.full((3, 2), np.nan)), "not finite"),
    (spoil(b=np.full((1, 2), np.inf)), "not finite"),
    (spoil(b="ab"), "where numbers should be"),
    (cs285_policy(nonlin_type="relu"), "'relu'"),
    ({"nonlin_type": "tanh"}, "'GaussianPolicy'"),
]


@pytest.mark.parametrize(("content", "message"), WRONG_POLICIES, ids=[message for _, message in WRONG_POLICIES])
def test_wrong_layers_of_an_expert(content, message, tmp_path):
    assert message in refused(to_policy, tmp_path, content)
    assert not (tmp_path / "e.pt").exists()


def test_the_tenth_layer_comes_after_the_second(tmp_path):
    policy, random = cs285_policy(), np.random.default_rng(1)
    layers = [{"W": random.normal(size=(3, 3)), "b": random.normal(size=(1, 3))} for _ in range(5)]
    net = policy["GaussianPolicy"]["hidden"]["FeedforwardNet"]
    net |= {f"layer_{4 + 2 * i}": {"AffineLayer": layer} for i, layer in enumerate(layers)}
    obs = np.random.default_rng(2).normal(size=(50, 2)).astype(np.float32)
    action = ODD_CENTRE + ODD_HALF_WIDTH * mean_action(load_actor(to_policy(tmp_path, policy), "Odd-v0"), obs)
    assert action == pytest.approx(cs285_action(policy, obs), abs=1e-4)


def test_only_contact_forces_may_be_missing(tmp_path):
    policy = cs285_policy(27 + 84, 8)
    actor = load_actor(to_policy(tmp_path, policy, "Ant-v4"), "Ant-v4")
    obs = np.random.default_rng(0).normal(size=(5, 27)).astype(np.float32)
    assert mean_action(actor, obs) == pytest.approx(cs285_action(policy, obs), abs=1e-4)
    for obs_dim in (26, 110, 112):
        message = refused(to_policy, tmp_path, cs285_policy(obs_dim, 8), "Ant-v4")
        assert f"it maps {obs_dim} to 8 numbers, Ant-v4 has 27 and 8" in message


# ---------------------------------------------------------------------------------- convert.py: Minari and policies
@pytest.fixture
def minari_episodes(tmp_path, monkeypatch):
    """Three episodes of Pendulum, in a data set of their own."""
    minari = pytest.importorskip("minari", reason="Minari is optional and not installed")
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    env, episodes = gym.make("Pendulum-v1", max_episode_steps=7), []
    for i in range(3):
        episode = {"observations": [env.reset(seed=i)[0]], "actions": [], "rewards": []}
        episode |= {"terminations": [], "truncations": []}
        while not any(episode["truncations"]):
            action = env.action_space.sample()
            values = [action, *env.step(action)[:4]]
            for name, value in zip(("actions", "observations", *list(episode)[2:]), values, strict=True):
                episode[name].append(value)
        episodes.append(EpisodeBuffer(id=i, **episode))
    about = dict.fromkeys(["description", "author", "author_email", "code_permalink", "algorithm_name"], "a")
    minari.create_dataset_from_buffers("pendulum/test-v0", episodes, env=env, eval_env=env, **about)
    return episodes


def test_minari(tmp_path, minari_episodes, capsys):
    out = tmp_path / "d.npz"
    assert convert.main(["minari:pendulum/test-v0", str(out)]) == 0
    data = load(out, "Pendulum-v1", num_trajectories=2)
    both = minari_episodes[:2]
    assert data["observations"] == pytest.approx(np.concatenate([episode.observations[:-1] for episode in both]))
    assert 2 * data["actions"] == pytest.approx(np.concatenate([episode.actions for episode in both]))  # torque -2..2
    assert data["rewards"] == pytest.approx(np.concatenate([episode.rewards for episode in both]))
    assert np.flatnonzero(data["truncations"]).tolist() == [6, 13]
    other = tmp_path / "other.npz"
    assert convert.main(["minari:pendulum/test-v0", str(other), "--env-id", "MountainCarContinuous-v0"]) == 2
    assert "it is of Pendulum-v1, not of MountainCarContinuous-v0" in the_error(capsys)
    assert not other.exists()


@pytest.mark.parametrize("source", ["minari:pendulum/test-v0", "expert_data.pkl"])
def test_only_a_policy_is_asked_for_a_number_of_episodes(source, tmp_path, capsys):
    assert convert.main([source, str(tmp_path / "d.npz"), "--env-id", "Tiny-v0", "--episodes", "5"]) == 2
    assert "--episodes is for policies" in the_error(capsys)


def test_without_minari_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(convert.sys.modules, "minari", None)
    assert convert.main(["minari:mujoco/hopper/expert-v0", str(tmp_path / "d.npz")]) == 2
    assert "minari" in the_error(capsys)


def test_demonstrations_of_a_policy(tmp_path):
    """In the environment's own units; an episode from each seed, 0 first."""
    bounds = {"action_low": [-2.0, 0.0], "action_high": [8.0, 0.5]}
    slopes = [[1.0, -0.5], [0.2, 0.3]]
    source, out = linear_expert(tmp_path / "e.pt", slopes, "Odd-v0", **bounds), tmp_path / "d.npz"
    assert convert.main([source, str(out), "--episodes", "3"]) == 0
    with np.load(out) as file:
        arrays = dict(file)
    expected = ODD_CENTRE + ODD_HALF_WIDTH * (arrays["observations"] @ np.transpose(slopes))
    assert arrays["actions"] == pytest.approx(expected, abs=1e-5)
    assert np.flatnonzero(arrays["truncations"]).tolist() == [19, 39, 59]
    starts = [gym.make("Odd-v0").reset(seed=seed)[0] for seed in range(3)]
    assert np.array_equal(arrays["observations"][::20], starts)
    data = load(out, "Odd-v0")
    assert data["actions"] == pytest.approx(arrays["observations"] @ np.transpose(slopes), abs=1e-5)


def test_demonstrations_of_a_policy_are_of_its_own_time_limit_and_settings(tmp_path):
    settings = {"max_episode_steps": 7, "env_kwargs": '{"reward_scale":0}'}
    linear_expert(tmp_path / "policy.pt", [[1.0, 0.0]], **settings)
    assert convert.main([str(tmp_path), str(tmp_path / "d.npz"), "--episodes", "2"]) == 0  # a run folder
    data = load(tmp_path / "d.npz")
    assert np.flatnonzero(data["truncations"]).tolist() == [6, 13]
    assert not data["rewards"].any()


@pytest.mark.parametrize("source", ["d.pkl", "e.pkl", "e.pt"])
def test_nothing_is_overwritten(source, tmp_path, capsys):
    write_pickle(tmp_path / "d.pkl", trajectories(DATA))
    write_pickle(tmp_path / "e.pkl", cs285_policy(action_dim=1))
    linear_expert(tmp_path / "e.pt", [[1.0, 0.0]])
    out = tmp_path / ("out.pt" if source == "e.pkl" else "out.npz")
    command = [str(tmp_path / source), str(out), "--env-id", "Tiny-v0"]
    assert convert.main(command) == 0
    capsys.readouterr()
    before = out.read_bytes()
    assert convert.main(command) == 2
    assert "must be a new .npz file" in the_error(capsys)
    assert out.read_bytes() == before


BAD = [
    ("d.pkl out.npz", "d.pkl: give --env-id"),
    ("d.pkl out.csv --env-id Tiny-v0", "out.csv: must be a new .npz file"),
    ("d.pkl nowhere/out.npz --env-id Tiny-v0", "No such file or directory"),
    ("nothing.pkl out.npz --env-id Tiny-v0", "nothing.pkl: "),
    ("nothing.pt out.npz", "nothing.pt: "),
    ("e.pt out.pt", "out.pt: must be a new .npz file"),
    ("e.pt out.npz --episodes 0", "at least one array"),
    ("e.pt out.npz --env-id Pendulum-v1", "not a policy for"),
    ("d.pkl out.npz --env-id Endless-v0", "no time limit"),
    ("module.pt out.npz", "module.pt: runs code of a module: if you trust it, give --env-id hostile:Tiny-v0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_gets_one_line_and_exit_code_2_and_leaves_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert.sys, "path", [*convert.sys.path])
    write_pickle("d.pkl", trajectories(DATA))
    linear_expert("e.pt", [[1.0, 0.0]])
    linear_expert("module.pt", [[1.0, 0.0]], "hostile:Tiny-v0")
    Path("hostile.py").write_text("open('effect', 'w')")
    before = sorted(os.listdir())
    assert convert.main(arguments.split()) == 2
    assert message in (error := the_error(capsys))
    assert "(1, " not in error
    assert "(2, " not in error  # an error inside another
    assert sorted(os.listdir()) == before


# ------------------------------------------------------------------------------------------------------ the real files
@needs_real_files
@pytest.mark.parametrize("env_id", ["Ant-v4", "HalfCheetah-v4", "Hopper-v4"])
def test_real_files(env_id, tmp_path):
    """The recorded actions are the converted expert's in the recorded states, and its returns those of the table.

    The table's actions were not clipped to their bounds, which HalfCheetah makes pay for.
    """
    actor = load_actor(converted(tmp_path, env_id, "policy", ".pt"), env_id)
    data = load(converted(tmp_path, env_id, "data", ".npz"), env_id)
    assert np.flatnonzero(data["truncations"]).tolist() == [999, 1999]
    assert mean_action(actor, data["observations"]) == pytest.approx(data["actions"], abs=1e-4)
    table = (Path(REAL) / "README.md").read_text()
    [of_expert, of_data] = next(line for line in table.splitlines() if line.startswith(f"| {env_id} ")).split("|")[2:4]
    returns = data["rewards"].reshape(2, 1000).sum(1, dtype=float)
    assert returns == pytest.approx([float(number) for number in of_data.split(",")], abs=0.51)
    env, total = gym.make(env_id), 0.0
    for seed in range(10):
        obs, over = env.reset(seed=seed)[0], False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(mean_action(actor, obs[None])[0])
            total, over = total + reward, terminated or truncated
    average, deviation = map(float, of_expert.split("±"))  # over 5 episodes, which rounding makes others of
    standard_error = deviation * (1 / 5 + 1 / 10) ** 0.5
    assert total / 10 == pytest.approx(average, rel=0.01, abs=3 * standard_error)
    assert policy_of(tmp_path, f"policy_{env_id}.pt")["algorithm"] == "cs285"
