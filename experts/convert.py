"""Makes this project's two formats, policies (.pt) and demonstrations (.npz), of other people's files.

    python experts/convert.py expert_policy_Ant-v4.pkl expert.pt --env-id Ant-v4     # an expert of Berkeley's CS285
    python experts/convert.py expert_data_Ant-v4.pkl demos.npz --env-id Ant-v4       # its demonstrations
    python experts/convert.py minari:mujoco/hopper/expert-v0 demos.npz               # a Minari data set
    python experts/convert.py experts/Hopper-v4.pt demos.npz --episodes 16           # demonstrations of a policy

Nothing that a file names is run. A file that is not what it should be ends with one line and exit code 2.
"""

import argparse
import itertools
import os
import pickle
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bc
from bc import FIELDS, POLICY, Args, Failure, load_policy, make_env, one_line, rollout, save

ACTIVATIONS = {"tanh": "tanh", "lrelu": "leaky-relu"}  # CS285's names


# --------------------------------------------------------------------------------------------------- foreign pickles
class PickledDtype:
    """Stands in for numpy.dtype: the plain numbers alone."""

    def __init__(self, code: str, *_):
        if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
            raise pickle.UnpicklingError(f"arrays of dtype {code!r} are refused")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple):
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """Stands in for numpy.ndarray; what was pickled is in .array."""

    array = None

    def __setstate__(self, state: tuple):
        _, shape, dtype, fortran_order, data = state
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran_order else "C")


def pickled_array(buffer: bytes, dtype: PickledDtype, shape: tuple, order: str) -> PickledArray:
    result = PickledArray()
    result.__setstate__((1, shape, dtype, order == "F", buffer))
    return result


STAND_INS = {
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): PickledDtype,
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: PickledArray(),
    ("numpy._core.multiarray", "scalar"): lambda dtype, data: np.frombuffer(data, dtype.dtype)[0],
    ("numpy._core.numeric", "_frombuffer"): pickled_array,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how protocol 2 writes bytes
}


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays of numbers in plain containers and calls nothing that a file names.

    Not even NumPy's own constructors: numpy.ndarray itself makes an object array of any bytes, that is, of forged
    pointers. The names that pickled arrays need are replaced by stand-ins, every other name is refused.
    """

    def find_class(self, module: str, name: str):
        try:
            return STAND_INS[module.replace("numpy.core.", "numpy._core."), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, refused: only arrays and containers") from None


def is_plain(value) -> bool:
    """A number, or lists of numbers. NumPy would read memory at addresses that other objects' attributes give."""
    return isinstance(value, int | float | np.generic) or (isinstance(value, list) and all(map(is_plain, value)))


def numbers(value) -> np.ndarray:
    """A pickled array, or lists of numbers, as float64 or bool."""
    if isinstance(value, PickledArray):
        value = value.array
    elif not is_plain(value):
        raise TypeError(f"holds {type(value).__name__} where numbers should be")
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"holds {array.dtype} where numbers should be")
    return array if array.dtype.kind == "b" else array.astype(np.float64)


# -------------------------------------------------------------------------------------------------------- converters
def cs285_policy(content: dict, env: gym.Env, env_id: str) -> dict:
    """policy.pt of CS285's expert: obs -> (obs - mean) / (std + 1e-6) -> hidden layers -> action in its own units.

    Standardising is folded into the first layer, the scale of the actions and observations that are missing, which
    the expert then sees as zeros, into the last and the first.
    """
    policy = content["GaussianPolicy"]
    moments, hidden = policy["obsnorm"]["Standardizer"], policy["hidden"]["FeedforwardNet"]
    names = sorted(hidden, key=lambda name: int(name.rpartition("_")[2]))  # layer_10 comes after layer_9
    affine = [*(hidden[name]["AffineLayer"] for name in names), policy["out"]["AffineLayer"]]
    weights, biases = ([numbers(layer[name]) for layer in affine] for name in ("W", "b"))
    biases = [bias.reshape(-1) for bias in biases]
    sizes = [len(weights[0]), *map(len, biases)]
    if [weight.shape for weight in weights] != list(itertools.pairwise(sizes)) or len(set(sizes[1:-1])) != 1:
        raise ValueError(f"its layers do not fit each other: {[weight.shape for weight in weights]}")
    obs_dim, action_dim, model = env.spaces["obs_dim"], env.spaces["action_dim"], getattr(env.unwrapped, "model", None)
    # What may be missing: contact forces, six for each body, which Ant-v4 observed once and now does on request.
    missing = 6 * model.nbody if model and sizes[0] == obs_dim + 6 * model.nbody else 0
    if (sizes[0] - missing, sizes[-1]) != (obs_dim, action_dim):
        raise ValueError(f"it maps {sizes[0]} to {sizes[-1]} numbers, {env_id} has {obs_dim} and {action_dim}")

    mean, mean_square = (numbers(moments[name]).reshape(-1) for name in ("mean_1_D", "meansq_1_D"))
    std = np.sqrt(np.maximum(0, mean_square - mean**2)) + 1e-6
    biases[0] = biases[0] - (mean / std) @ weights[0]
    weights[0] = (weights[0] / std[:, None])[:obs_dim]
    low, high = (np.array(env.spaces[name]) for name in ("action_low", "action_high"))
    half_width = (high - low) / 2
    weights[-1], biases[-1] = weights[-1] / half_width, (biases[-1] - (low + high) / 2) / half_width

    state = {"log_std": numbers(policy["logstdevs_1_Da"]).reshape(-1) - np.log(half_width)}
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        state |= {f"net.{2 * i}.weight": weight.T, f"net.{2 * i}.bias": bias}
    shape = {"hidden_size": sizes[1], "num_layers": len(sizes) - 2, "activation": ACTIVATIONS[content["nonlin_type"]]}
    settings = {"env_id": env_id, "env_kwargs": "{}", "max_episode_steps": None, "actor_std": "shared", "squash": False}
    state_dict = {name: torch.tensor(value, dtype=torch.float32) for name, value in state.items()}
    if not all(value.isfinite().all() for value in state_dict.values()):
        raise ValueError("its weights are not finite")
    return {"format": POLICY, "algorithm": "cs285", **settings, **shape, **env.spaces, "state_dict": state_dict}


def cs285_demonstrations(content: list, episode_limit: int) -> list[dict[str, np.ndarray]]:
    """Episodes of CS285's trajectories. Their terminal is also set where the time limit cut the episode off."""
    episodes = []
    for trajectory in content:
        arrays = [numbers(trajectory[name]) for name in ("observation", "action", "reward")]
        last = np.arange(len(arrays[0])) == len(arrays[0]) - 1
        cut = last & (len(last) == episode_limit)
        episodes.append(dict(zip(FIELDS, [*arrays, last & ~cut, cut], strict=True)))
    return episodes


def without_module(env_id: str) -> str:
    """An environment's name out of a file, which must not have a module imported."""
    if ":" in env_id:
        raise ValueError(f"runs code of a module: if you trust it, give --env-id {env_id}")
    return env_id


def convert(source: str, out: Path, env_id: str | None, num_episodes: int | None) -> None:
    if out.suffix not in ((".pt", ".npz") if source.endswith(".pkl") else (".npz",)) or out.exists():
        raise Failure(2, f"{out}: must be a new .npz file, or for an expert of CS285 a new .pt file")
    if num_episodes is not None and source.startswith("minari:") | source.endswith(".pkl"):
        raise Failure(2, f"{source}: is converted whole, --episodes is for policies")
    args = Args(env_id=env_id)
    if source.startswith("minari:"):
        with one_line(source):
            import minari  # only this source needs it

            dataset = minari.load_dataset(source.removeprefix("minari:"), download=True)
            if env_id not in (None, dataset.env_spec.id):
                raise ValueError(f"it is of {dataset.env_spec.id}, not of {env_id}")
            args.env_id = env_id or without_module(dataset.env_spec.id)
            episodes = [
                {field: getattr(episode, field)[: len(episode.actions)] for field in FIELDS}  # one observation more
                for episode in dataset.iterate_episodes()
            ]
    elif source.endswith(".pkl"):
        if not env_id:
            raise Failure(2, f"{source}: give --env-id, the file does not say it")
        env = make_env(args)
        with one_line(source):
            with open(source, "rb") as file:
                content = ArrayUnpickler(file).load()
            if out.suffix == ".pt":
                save(out, cs285_policy(content, env, env_id))
                return
            episodes = cs285_demonstrations(content, env.spec.max_episode_steps)
    else:
        path = Path(source, "policy.pt") if Path(source).is_dir() else Path(source)
        with one_line(path):
            policy = torch.load(path, map_location="cpu", weights_only=True)
            args.env_id = env_id or without_module(policy["env_id"])
            args.env_kwargs, args.max_episode_steps = policy["env_kwargs"], policy["max_episode_steps"]
        env = make_env(args)
        actor = load_policy(path, args, env)
        low, high = np.float32(env.spaces["action_low"]), np.float32(env.spaces["action_high"])
        num_episodes = 16 if num_episodes is None else num_episodes
        episodes = [rollout(actor.mean_action, env, seed) for seed in range(num_episodes)]
        for episode in episodes:
            episode["actions"] = (low + high) / 2 + (high - low) / 2 * episode["actions"]
    try:
        with one_line(source):
            if any(len(set(map(len, episode.values()))) != 1 for episode in episodes):
                raise ValueError("an episode's arrays are of unequal lengths")
            data = {field: np.concatenate([episode[field] for episode in episodes]) for field in FIELDS}
            arrays = {name: data[name].astype(dtype) for name, dtype in FIELDS.items()}
            np.savez(out, env_id=np.array(args.env_id), **arrays)
        args.expert_data = str(out)
        bc.load_demonstrations(args, make_env(args))
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a .pkl of CS285, minari:DATASET-ID, a policy.pt or a run folder")
    parser.add_argument("out", type=Path, help="a new .pt or .npz file")
    parser.add_argument("--env-id", help="where the file does not say it")
    parser.add_argument("--episodes", type=int, help="demonstrated episodes of a policy (default: 16)")
    args = parser.parse_args(argv)
    sys.path.append(os.getcwd())  # --env-id module:Env-v0 finds a module there
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused
            convert(args.source, args.out, args.env_id, args.episodes)
        return 0
    except Failure as failure:
        exit_code, message = failure.args
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
