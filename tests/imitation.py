"""What tests of bc.py, dagger.py and experts/convert.py share: environments, demonstrations, experts, run folders."""

import csv
import os
import pickle
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import bc
import envs

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "experts"))
import convert  # noqa: E402

REAL = os.environ.get("CS285_EXPERTS")
HOMEWORK = "--num-layers 2 --activation tanh --learning-rate 5e-3"  # CS285's
needs_real_files = pytest.mark.skipif(not REAL, reason="CS285_EXPERTS names no folder with the files of CS285")


def converted(folder, env_id, kind, suffix):
    """The file of this project's format that experts/convert.py makes of CS285's."""
    out = folder / f"{kind}_{env_id}{suffix}"
    if not out.exists():
        assert convert.main([f"{REAL}/expert_{kind}_{env_id}.pkl", str(out), "--env-id", env_id]) == 0
    return out


def real_arguments(folder, env_id, steps=None):
    """Of the demonstrations the first steps only, so few that any clone of them is poor, whatever its seed."""
    data, expert = converted(folder, env_id, "data", ".npz"), converted(folder, env_id, "policy", ".pt")
    if steps:
        np.savez(data, **{name: array[:steps] if array.shape else array for name, array in np.load(data).items()})
    return f"--env-id {env_id} --expert-data {data} --expert {expert} --torch-threads 1"


# ------------------------------------------------------------------------------------------------------ environments
class Drift(gym.Env):
    """x' = 2 x + a from x = 0, over when |x| > 1. The expert, a = -2 x, never leaves 0.

    All that it demonstrates is that a = 0 at x = 0. So a clone's error at 0, whatever its size, doubles at each step
    unless its slope lies between -3 and -1, of which the demonstrations say nothing.
    """

    observation_space = gym.spaces.Box(-2, 2, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 0.0
        return np.array([self.x], np.float32), {}

    def step(self, action):
        self.x = 2 * self.x + float(action[0])
        return np.array([self.x], np.float32), 1.0, abs(self.x) > 1, False, {}


gym.register("Drift-v0", Drift, max_episode_steps=100)
ODD = {"low": [-2, 0], "high": [8, 0.5], "action_dim": 2}
ODD_CENTRE, ODD_HALF_WIDTH = np.array([3, 0.25]), np.array([5, 0.25])
gym.register("Odd-v0", envs.Tiny, max_episode_steps=20, kwargs=ODD)


# ------------------------------------------------------------------------------------------- policies and experts
def make_actor(obs_dim=2, action_dim=1, **changes):
    shape = {"hidden_size": 8, "num_layers": 1, "activation": "tanh", "actor_std": "shared", "squash": False} | changes
    return bc.Actor(obs_dim, action_dim, SimpleNamespace(**shape))


def linear_expert(path, slopes, env_id="Tiny-v0", squash=False, **changes):
    """A policy file with the mean action `slopes` (action_dim, obs_dim) times the observation, in [-1, 1] units."""
    slopes = torch.tensor(slopes, dtype=torch.float32)
    action_dim, obs_dim = slopes.shape
    eye = torch.eye(obs_dim)
    state = {"net.0.weight": torch.cat([eye, -eye]), "net.0.bias": torch.zeros(2 * obs_dim)}  # relu(x), relu(-x)
    state |= {"net.2.weight": torch.cat([slopes, -slopes], 1), "net.2.bias": torch.zeros(action_dim)}
    policy = {"format": "policy/1", "algorithm": "sac", "env_id": env_id, "env_kwargs": "{}", "max_episode_steps": None}
    policy |= {"obs_dim": obs_dim, "action_dim": action_dim, "hidden_size": 2 * obs_dim, "num_layers": 1}
    policy |= {"activation": "relu", "actor_std": "shared", "squash": squash}
    policy |= {"action_low": [-1.0] * action_dim, "action_high": [1.0] * action_dim}
    torch.save(policy | {"state_dict": state | {"log_std": torch.zeros(action_dim)}} | changes, path)
    return str(path)


def load_actor(path, env_id="Tiny-v0"):
    args = bc.Args(env_id=env_id)
    return bc.load_policy(Path(path), args, bc.make_env(args))


def mean_action(actor, obs):
    with torch.no_grad():
        return actor.mean_action(torch.as_tensor(obs, dtype=torch.float32)).numpy()


def cs285_policy(obs_dim=2, action_dim=2, hidden=3, nonlin_type="tanh"):
    """A policy by the names of CS285's files."""
    random = np.random.default_rng(0)

    def affine(fan_in, fan_out):
        return {"AffineLayer": {"W": random.normal(size=(fan_in, fan_out)), "b": random.normal(size=(1, fan_out))}}

    mean = random.normal(size=(1, obs_dim))
    moments = {"mean_1_D": mean, "meansq_1_D": mean**2 + random.uniform(0.5, 2, size=(1, obs_dim))}
    policy = {
        "logstdevs_1_Da": np.zeros((1, action_dim)),
        "hidden": {"FeedforwardNet": {"layer_0": affine(obs_dim, hidden), "layer_2": affine(hidden, hidden)}},
        "obsnorm": {"Standardizer": moments | {"count": np.float64(100.0)}},
        "out": affine(hidden, action_dim),
    }
    return {"nonlin_type": nonlin_type, "GaussianPolicy": policy}


def cs285_action(policy, obs):
    """Its mean action by hand, in float64 and the environment's own units; observations that are missing are 0."""
    parts = policy["GaussianPolicy"]
    moments = parts["obsnorm"]["Standardizer"]
    mean, mean_square = moments["mean_1_D"], moments["meansq_1_D"]
    padded = np.zeros((len(obs), mean.shape[1]))
    padded[:, : obs.shape[1]] = obs
    x = (padded - mean) / (np.sqrt(np.maximum(0, mean_square - mean**2)) + 1e-6)
    for layer in parts["hidden"]["FeedforwardNet"].values():
        layer = layer["AffineLayer"]
        x = x @ layer["W"] + layer["b"]
        x = np.tanh(x) if policy["nonlin_type"] == "tanh" else np.where(x > 0, x, 0.01 * x)
    out = parts["out"]["AffineLayer"]
    return x @ out["W"] + out["b"]


# --------------------------------------------------------------------------------------------------- demonstrations
def demonstrations(episodes=3, steps=20, obs_dim=2, action_dim=1):
    """Arrays by the names of a .npz file, actions in [-1, 1]."""
    random = np.random.default_rng(0)
    ends = np.arange(1, episodes * steps + 1) % steps == 0
    return {
        "observations": random.normal(size=(episodes * steps, obs_dim)).astype(np.float32),
        "actions": random.uniform(-1, 1, size=(episodes * steps, action_dim)).astype(np.float32),
        "rewards": random.normal(size=episodes * steps).astype(np.float32),
        "terminations": ends & False,
        "truncations": ends,
    }


def write_npz(path, env_id="Tiny-v0", **changes):
    arrays = demonstrations() | {"env_id": np.array(env_id)} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def trajectories(data, steps=20):
    """The same as a list of dicts, in the names and dtypes of CS285's files."""
    names = {"observation": ("observations", np.float64), "action": ("actions", np.float32)}
    names |= {"reward": ("rewards", np.float64), "terminal": ("truncations", np.bool_)}
    starts = range(0, len(data["rewards"]), steps)
    return [{key: data[name][i : i + steps].astype(dtype) for key, (name, dtype) in names.items()} for i in starts]


def write_pickle(path, content, protocol=4):
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol)
    return str(path)


class Calls:
    """Pickled as a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# -------------------------------------------------------------------------------------------------------------- runs
def run(script, arguments, run_dir):
    """main() in this process. Returns its exit code."""
    return script.main([*arguments.split(), "--run-dir", str(run_dir)])


def the_error(capsys):
    """The one line on stderr since the last look."""
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\S.*\n", err), err
    return err


def rows(run_dir):
    with open(run_dir / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def policy_of(run_dir, name="policy.pt"):
    return torch.load(run_dir / name, weights_only=True)


def same_policy(a, b):
    a, b = (content["state_dict"] for content in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


def same_run(a, b):
    """Same rows, times aside, and the same bytes of policy."""
    a_rows, b_rows = ([{k: v for k, v in row.items() if k != "wall_time_s"} for row in rows(x)] for x in (a, b))
    return a_rows == b_rows and (a / "policy.pt").read_bytes() == (b / "policy.pt").read_bytes()
