"""What the tests of bc.py and dagger.py share: demonstrations and experts of their own making, and an environment."""

import csv
import os
import pickle
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

import bc

REAL = os.environ.get("CS285_EXPERTS")
needs_real_files = pytest.mark.skipif(not REAL, reason="CS285_EXPERTS names no folder with the files of CS285")


def real(name):
    return str(Path(REAL) / name)


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


def linear_expert(path, slopes, env_id, squash=False, **changes):
    """A policy file with the mean action `slopes` (action_dim, obs_dim) times the observation, in [-1, 1] units."""
    slopes = torch.tensor(slopes, dtype=torch.float32)
    action_dim, obs_dim = slopes.shape
    shape = {"obs_dim": obs_dim, "action_dim": action_dim, "hidden_size": 2 * obs_dim, "num_layers": 1}
    shape |= {"activation": "relu", "actor_std": "shared", "squash": squash}
    actor = bc.Actor(**shape)
    eye = torch.eye(obs_dim)
    state = {"net.0.weight": torch.cat([eye, -eye]), "net.0.bias": torch.zeros(2 * obs_dim)}  # relu(x), relu(-x)
    state |= {"net.2.weight": torch.cat([slopes, -slopes], 1), "net.2.bias": torch.zeros(action_dim)}
    actor.load_state_dict(state | {"log_std": torch.zeros(action_dim)})
    settings = {"format": "policy/1", "algorithm": "sac", "env_id": env_id, "env_kwargs": "{}"}
    settings |= {"max_episode_steps": None, "action_low": [-1.0] * action_dim, "action_high": [1.0] * action_dim}
    torch.save(settings | shape | {"state_dict": actor.state_dict()} | changes, path)
    return str(path)


def demonstrations(episodes=3, steps=20, obs_dim=2, action_dim=1, seed=0):
    """Arrays by the names of a .npz file, actions in [-1, 1]."""
    random = np.random.default_rng(seed)
    ends = np.arange(1, episodes * steps + 1) % steps == 0
    return {
        "observations": random.normal(size=(episodes * steps, obs_dim)).astype(np.float32),
        "actions": random.uniform(-1, 1, size=(episodes * steps, action_dim)).astype(np.float32),
        "rewards": random.normal(size=episodes * steps).astype(np.float32),
        "terminations": ends & False,
        "truncations": ends,
    }


def write_npz(path, env_id="envs:Tiny-v0", **changes):
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


def cs285_policy(obs_dim=2, action_dim=1, hidden=3, seed=0, nonlin_type="tanh"):
    """A policy by the names of CS285's files."""
    random = np.random.default_rng(seed)

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
    """Its mean action by hand, in float64 and the environment's own units."""
    parts = policy["GaussianPolicy"]
    moments = parts["obsnorm"]["Standardizer"]
    mean, mean_square = moments["mean_1_D"], moments["meansq_1_D"]
    padded = np.zeros((len(obs), mean.shape[1]))
    padded[:, : obs.shape[1]] = obs
    x = (padded - mean) / (np.sqrt(np.maximum(0, mean_square - mean**2)) + 1e-6)
    for name in sorted(parts["hidden"]["FeedforwardNet"]):
        layer = parts["hidden"]["FeedforwardNet"][name]["AffineLayer"]
        x = x @ layer["W"] + layer["b"]
        x = np.tanh(x) if policy["nonlin_type"] == "tanh" else np.where(x > 0, x, 0.01 * x)
    out = parts["out"]["AffineLayer"]
    return x @ out["W"] + out["b"]


def rows(run_dir):
    with open(run_dir / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_run(a, b):
    """Same rows, times aside, and bit for bit the same policy."""
    a_rows, b_rows = ([{k: v for k, v in row.items() if k != "wall_time_s"} for row in rows(x)] for x in (a, b))
    a_policy, b_policy = (torch.load(x / "policy.pt", weights_only=True)["state_dict"] for x in (a, b))
    return a_rows == b_rows and all(torch.equal(a_policy[name], b_policy[name]) for name in a_policy)


def same_policy(a, b):
    a, b = (torch.load(path, weights_only=True)["state_dict"] for path in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


def stop_at_gradient_step(monkeypatch, script, number, signal_number=signal.SIGTERM):
    """Has the signal arrive in gradient step `number`, counted from the start of this process."""
    original, count = script.gradient_step, [0]

    def counting(optimizer, loss):
        count[0] += 1
        if count[0] == number:
            os.kill(os.getpid(), signal_number)
        original(optimizer, loss)

    monkeypatch.setattr(script, "gradient_step", counting)


def hparams_table(log_dir):
    """What TensorBoard's HPARAMS tab shows, from its own backend.

    The types of the settings by name, the metrics, and for each run its settings and its metric with the step of it.
    """
    runs = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(log_dir))
    runs.Reload()
    provider = data_provider.MultiplexerDataProvider(runs, str(log_dir))
    backend = backend_context.Context(base_plugin.TBContext(multiplexer=runs, data_provider=provider))
    nobody = RequestContext()
    found = backend.hparams_metadata(nobody, ""), backend.hparams_from_data_provider(nobody, "", None)
    experiment = backend.experiment_from_metadata(nobody, "", True, *found)
    request = api_pb2.ListSessionGroupsRequest(slice_size=100, allowed_statuses=range(4), include_metrics=True)
    table = {}
    for group in list_session_groups.Handler(nobody, backend, "", request).run().session_groups:
        settings = {name: getattr(v, v.WhichOneof("kind")) for name, v in group.hparams.items()}
        [metric] = group.metric_values
        table[group.name] = settings, (metric.value, metric.training_step)
    types = {info.name: api_pb2.DataType.Name(info.type) for info in experiment.hparam_infos}
    return types, [info.name.tag for info in experiment.metric_infos], table
