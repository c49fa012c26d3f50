# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "filelock==4.2.11",
#     "gymnasium[mujoco]==1.4.0",
#     "moviepy==2.2.1",
#     "mujoco==4.0.0",
#     "numpy==2.4.6",
#     "pillow==11.3.0",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///
"""DAgger for continuous control, in one file: behavioural cloning, then expert labels on the learner's own states.

Paper:
    Ross, Gordon and Bagnell 2011, "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online
        Learning", arXiv:1011.0686, algorithm 3.1
The defaults are those of homework 1 of Berkeley's CS285, fall 2023.

Example:
    python dagger.py --env-id Hopper-v4
    python dagger.py --env-id Ant-v4 --expert-data expert_data_Ant-v4.pkl --expert expert_policy_Ant-v4.pkl

Writes a run folder, runs/ENV__EXP__SEED__TIME by default: args.json (settings), progress.csv (a row per iteration),
events.out.tfevents.* (TensorBoard), policy_iteration_N.pt (each iteration's policy), policy.pt (the last one's),
checkpoint.pt (all that --resume needs) and, with --capture-video, videos/*.mp4.
"""

import contextlib
import csv
import dataclasses
import difflib
import importlib.metadata
import io
import itertools
import json
import math
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import filelock
import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "Hopper-v4"
    """Gymnasium environment: flat Box observations, bounded Box actions"""
    env_kwargs: str = "{}"
    """JSON for gym.make, as '{"use_contact_forces": true}' for Ant-v4"""
    max_episode_steps: int | None = None
    """replaces the environment's own limit"""
    seed: int = 1
    """seeds everything; the same seed on the same machine gives the same bytes"""
    exp_name: str = "dagger"
    """name of the experiment, part of the run folder's name"""
    run_dir: str | None = None
    """run folder (default: runs/ENV__EXP__SEED__TIME)"""
    resume: str | None = None
    """run folder of a stopped run: continue it as if it had never stopped"""
    evaluate: str | None = None
    """no training: evaluate this policy file or run folder and print its return"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    torch_threads: int = 0
    """CPU threads for PyTorch; 0 leaves its default"""

    expert_data: str | None = None
    """demonstrations of the expert: a .npz or .pkl file (default: the expert makes them)"""
    expert: str | None = None
    """expert: a policy.pt, a run folder or a .pkl (default without --expert-data: experts/ENV.pt)"""
    num_trajectories: int | None = None
    """demonstrated episodes to use (default: all of the data; 2 where the expert makes them)"""

    num_iterations: int = 10
    """iterations: the first clones the demonstrations, each later one rolls out the learner before it trains"""
    train_steps_per_iteration: int = 1_000
    """gradient steps"""
    rollout_steps: int = 1_000
    """environment steps of an iteration: whole episodes until there are at least so many"""
    expert_mixing: float = 0.0
    """beta: in the rollouts of iteration i the expert acts with probability beta^i"""
    buffer_size: int = 1_000_000
    """labelled steps the data set holds; the oldest leave first"""
    batch_size: int = 100
    """labelled steps in a batch, drawn without replacement"""
    learning_rate: float = 5e-3
    """Adam's learning rate"""
    loss: Literal["nll", "mse"] = "nll"
    """negative log-likelihood, or squared error of the mean action"""

    hidden_size: int = 64
    """units of a hidden layer"""
    num_layers: int = 2
    """hidden layers"""
    activation: Literal["relu", "tanh", "leaky-relu", "selu", "silu"] = "tanh"
    """non-linearity of the hidden layers"""

    eval_episodes: int = 10
    """episodes of the evaluation after each iteration, for the mean action and for sampled actions each"""
    log_every: int = 100
    """gradient steps between TensorBoard points"""
    capture_video: bool = False
    """record evaluation episodes as mp4, and a rollout after each iteration, in TensorBoard"""
    video_every: int = 10
    """iterations between recordings; the last one is always recorded"""
    video_episodes: int = 1
    """episodes of a recording"""
    render: bool = False
    """with --evaluate: show the episodes in a window"""


# What --resume may change, and what --evaluate listens to.
RESUME_MAY_CHANGE = {"resume", "eval_episodes", "num_iterations", "device", "torch_threads"}
RESUME_MAY_CHANGE |= {"capture_video", "video_every", "video_episodes"}
EVALUATE_USES = {"evaluate", "env_id", "env_kwargs", "max_episode_steps", "eval_episodes", "device", "torch_threads"}
EVALUATE_USES |= {"capture_video", "video_episodes", "render"}


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do. Exit code 2."""


class RunError(Exception):
    """Training could not go on (a full disk, a loss that became NaN). Exit code 1."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_args(args: Args) -> None:
    """Raises UserError for numbers out of range and for settings that contradict each other."""
    counts = "train_steps_per_iteration rollout_steps buffer_size batch_size num_trajectories hidden_size num_layers"
    counts += " eval_episodes log_every max_episode_steps video_every video_episodes"
    ranges = [
        ("at least 1, at most 2^31", lambda x: 1 <= x <= 2**31, counts),
        ("0 or more", lambda x: 0 <= x < 2**63, "seed"),
        ("from 0 to 1024", lambda x: 0 <= x <= 1024, "torch_threads"),
        ("above 0 and finite", lambda x: 0 < x < math.inf, "learning_rate"),
        ("between 0 and 1", lambda x: 0 <= x <= 1, "expert_mixing"),
        ("at least 2; for cloning without DAgger take bc.py", lambda x: x >= 2, "num_iterations"),
    ]
    for field in dataclasses.fields(Args):
        if getattr(args, field.name) == "":
            raise UserError(f"{flag(field.name)} is empty: give it a value or leave it out")
    for meaning, holds, names in ranges:
        for name in names.split():
            value = getattr(args, name)
            if isinstance(value, int | float) and not holds(value):
                raise UserError(f"{flag(name)} {value}: must be {meaning}")

    silent = not args.capture_video
    contradictions = [
        ("batch_size buffer_size", args.batch_size > args.buffer_size, "the buffer must hold a batch"),
        ("video_every capture_video", silent and args.video_every != Args.video_every, "nothing is recorded"),
        ("video_episodes capture_video", silent and args.video_episodes != Args.video_episodes, "nothing is recorded"),
        ("render evaluate", args.render and not args.evaluate, "a window shows evaluations of --evaluate"),
        ("render capture_video", args.render and args.capture_video, "show or record"),
    ]
    for names, wrong, why in contradictions:
        if wrong:
            pair = " and ".join(f"{flag(name)} {getattr(args, name)}" for name in names.split())
            raise UserError(f"{pair} contradict each other: {why}")
    if args.expert_data and not args.expert:
        raise UserError(
            f"--expert-data {args.expert_data}: give --expert too, the policy that made it labels new states"
        )


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line as checked settings. --resume starts from the saved ones, --evaluate from the policy's."""
    args = tyro.cli(Args, args=argv, description="DAgger for continuous control.")
    if args.resume and args.evaluate:
        raise UserError("--resume and --evaluate contradict each other: give one of them")
    if args.resume:
        saved = read_args(Path(args.resume))
        args = tyro.cli(Args, args=argv, default=dataclasses.replace(saved, resume=args.resume))
        differ = [
            f"{flag(field.name)} {getattr(args, field.name)} (saved: {getattr(saved, field.name)})"
            for field in dataclasses.fields(Args)
            if field.name not in RESUME_MAY_CHANGE and getattr(args, field.name) != getattr(saved, field.name)
        ]
        if differ:
            raise UserError(f"--resume {args.resume}: the run has other settings, leave out {', '.join(differ)}")
    elif args.evaluate:
        policy = load_policy(args.evaluate)
        saved = {name: policy[name] for name in ("env_id", "env_kwargs", "max_episode_steps")}
        args = tyro.cli(Args, args=argv, default=Args(**saved))
        unused = [
            flag(field.name)
            for field in dataclasses.fields(Args)
            if field.name not in EVALUATE_USES and getattr(args, field.name) != field.default
        ]
        if unused:
            raise UserError(f"--evaluate trains nothing and contradicts {', '.join(unused)}: leave one side out")
    check_args(args)
    return args


# ---------------------------------------------------------------------------------------------------- environment


def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The environment with actions in [-1, 1]^action_dim, rescaled to its own bounds. Raises UserError."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
        if render_mode == "human":
            raise UserError("--render: there is no display (DISPLAY is not set); record with --capture-video instead")
        os.environ.setdefault("MUJOCO_GL", "egl")  # the way to draw without a display
    # A user can act on neither: MuJoCo's remarks on Gymnasium's model files (which it also writes to MUJOCO_LOG.TXT)
    # and Gymnasium's advice to take another version of the environment than the one asked for.
    mujoco.set_mju_user_warning(lambda message: None)
    gym.logger.min_level = gym.logger.ERROR

    try:
        kwargs = json.loads(args.env_kwargs)
        if not isinstance(kwargs, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise UserError(f"--env-kwargs {args.env_kwargs}: must be a JSON object ({error})") from None
    if render_mode:
        kwargs["render_mode"] = render_mode
    try:
        env = gym.make(args.env_id, max_episode_steps=args.max_episode_steps, **kwargs)
    except gym.error.UnregisteredEnv:
        near = difflib.get_close_matches(args.env_id, gym.registry, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see gymnasium.registry for those there are"
        raise UserError(f"--env-id {args.env_id}: no such environment; {hint}") from None
    except Exception as error:  # an environment's constructor may raise anything
        reason = " ".join(str(error).split())
        what = f"drawn as {render_mode}" if render_mode else "made"
        raise UserError(f"--env-id {args.env_id} --env-kwargs {args.env_kwargs}: cannot be {what}: {reason}") from None

    if render_mode:
        follow(env)
    obs_space, action_space = env.observation_space, env.action_space
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        raise UserError(f"--env-id {args.env_id}: observations are {obs_space}; supported are flat Box observations")
    if not isinstance(action_space, gym.spaces.Box) or len(action_space.shape) != 1 or not action_space.is_bounded():
        raise UserError(f"--env-id {args.env_id}: actions are {action_space}; supported are flat bounded Box actions")
    return gym.wrappers.ClipAction(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))


def follow(env: gym.Env) -> None:
    """Takes the camera that follows the robot, where a MuJoCo model has one; Gymnasium's own choice stays behind."""
    if hasattr(env.unwrapped, "mujoco_renderer"):
        renderer = env.unwrapped.mujoco_renderer
        renderer.camera_id = mujoco.mj_name2id(env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")  # for frames
        if renderer.camera_id >= 0:  # for a window
            renderer.default_cam_config = {"type": mujoco.mjtCamera.mjCAMERA_FIXED, "fixedcamid": renderer.camera_id}


class FrameText(gym.Wrapper):
    """Writes the step, its reward and the return so far on each frame."""

    def reset(self, **kwargs):
        self.steps, self.reward, self.episode_return = 0, 0.0, 0.0
        return self.env.reset(**kwargs)

    def step(self, action):
        result = self.env.step(action)
        self.steps, self.reward = self.steps + 1, float(result[1])
        self.episode_return += self.reward
        return result

    def render(self) -> np.ndarray:
        """The frame, (height, width, 3) bytes."""
        image = Image.fromarray(self.env.render())
        text = f"step {self.steps}   reward {self.reward:.2f}   return {self.episode_return:.1f}"
        font = ImageFont.load_default(size=image.width / 24)
        ImageDraw.Draw(image).text((10, 8), text, "white", font, stroke_width=2, stroke_fill="black")
        return np.asarray(image)


class EveryFourthFrame(gym.Wrapper):
    """Around FrameText: draws and keeps every fourth frame of an episode, in .frames."""

    def reset(self, **kwargs):
        result = self.env.reset(**kwargs)
        self.frames = [self.env.render()]
        return result

    def step(self, action):
        result = self.env.step(action)
        if self.env.steps % 4 == 0:
            self.frames.append(self.env.render())
        return result


class RealSpeed(gym.Wrapper):
    """Steps no faster than time passes in the simulation, for a window."""

    def reset(self, **kwargs):
        self.due = time.perf_counter()
        return self.env.reset(**kwargs)

    def step(self, action):
        self.due += 1 / self.metadata.get("render_fps", 30)
        time.sleep(max(0, self.due - time.perf_counter()))
        return self.env.step(action)


def rollout(act: Callable, envs: list[gym.Env], seeds: list[int]) -> list[dict[str, np.ndarray]]:
    """One episode in each environment, side by side so that the policy sees them as a batch.

    act: obs (n, obs_dim) -> action (n, action_dim), tensors on the CPU. Environment i is reset with seeds[i].
    Returns for each episode: observations (T, obs_dim), actions (T, action_dim) as the policy gave them, rewards,
    terminations and truncations, (T,) each.
    """
    obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]).astype(np.float32)
    steps = [[] for _ in envs]
    running = np.arange(len(envs))
    while len(running):
        actions = act(torch.from_numpy(obs[running])).numpy()
        still_running = []
        for i, action in zip(running, actions, strict=True):
            next_obs, reward, terminated, truncated, _ = envs[i].step(action)
            steps[i].append((obs[i].copy(), action, reward, terminated, truncated))
            obs[i] = next_obs
            if not (terminated or truncated):
                still_running.append(i)
        running = np.array(still_running, dtype=int)
    return [dict(zip(FIELDS, map(np.array, zip(*episode, strict=True)), strict=True)) for episode in steps]


# ------------------------------------------------------------------------------------------------------- networks

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "leaky-relu": nn.LeakyReLU, "selu": nn.SELU, "silu": nn.SiLU}
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


class Actor(nn.Module):
    """Gaussian policy, squashed by tanh into [-1, 1]^action_dim unless told otherwise.

    The log standard deviation is clamped to [-20, 2], as in sac_continuous.py.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        hidden_size: int = 256,
        num_layers: int = 2,
        activation: str = "relu",
        actor_std: str | float = "state",
        squash: bool = True,
    ):
        super().__init__()
        sizes = [obs_dim, *[hidden_size] * num_layers]
        layers = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], action_dim * (2 if actor_std == "state" else 1)))
        self.squash = squash
        if actor_std == "shared":
            self.log_std = nn.Parameter(torch.zeros(action_dim))
        elif actor_std != "state":
            self.register_buffer("log_std", torch.full((action_dim,), math.log(actor_std)))
        self.std_from_net = actor_std == "state"

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (batch, obs_dim) -> mean and log_std of the Gaussian before the tanh, each (batch, action_dim)."""
        out = self.net(obs)
        mean, log_std = out.chunk(2, dim=-1) if self.std_from_net else (out, self.log_std.expand_as(out))
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def to_action(self, u: torch.Tensor) -> torch.Tensor:
        return u.tanh() if self.squash else u

    def mean_action(self, obs: torch.Tensor) -> torch.Tensor:
        """The deterministic policy that evaluations follow. Returns (batch, action_dim)."""
        return self.to_action(self(obs)[0])


# ------------------------------------------------------------------------------------------------- demonstrations
# Demonstrations are a dict of arrays, episodes in a row: observations (N, obs_dim) and actions (N, action_dim)
# float32, rewards (N,) float32, terminations and truncations (N,) bool; an episode ends where either flag is set.
# In memory, as for the networks, actions are in [-1, 1]^action_dim, or beyond where the demonstrator went beyond the
# bounds; in files they are in the environment's own units.

FIELDS = {
    "observations": np.float32,
    "actions": np.float32,
    "rewards": np.float32,
    "terminations": np.bool_,
    "truncations": np.bool_,
}
MAX_DATA_BYTES = 2**34  # unpacked, so that a small file cannot fill the memory


def action_scale(env: gym.Env) -> tuple[np.ndarray, np.ndarray]:
    """The (action_dim,) centre and half width of the environment's own bounds: own units = centre + half_width a."""
    space = env.unwrapped.action_space
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    return (low + high) / 2, (high - low) / 2


def some_of(obs: np.ndarray, count: int = 2_000) -> torch.Tensor:
    """Every n-th of the observations (N, obs_dim), so that there are at most `count`."""
    return torch.from_numpy(obs[:: math.ceil(len(obs) / count)].copy())


def join(episodes: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {field: np.concatenate([episode[field] for episode in episodes]) for field in FIELDS}


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

    def __init__(self):
        self.array = None

    def __setstate__(self, state: tuple):
        _, shape, dtype, fortran_order, data = state
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran_order else "C")


def pickled_array(buffer: bytes, dtype: PickledDtype, shape: tuple, order: str) -> PickledArray:
    result = PickledArray()
    result.__setstate__((1, shape, dtype, order == "F", buffer))
    return result


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays of numbers in plain containers and calls nothing that a file names.

    Not even NumPy's own constructors: numpy.ndarray itself makes an object array of any bytes, that is, of forged
    pointers. The names that pickled arrays need are replaced by stand-ins, every other name is refused.
    """

    stand_ins: ClassVar[dict] = {
        ("numpy", "ndarray"): PickledArray,
        ("numpy", "dtype"): PickledDtype,
        ("numpy._core.multiarray", "_reconstruct"): lambda *_: PickledArray(),
        ("numpy._core.multiarray", "scalar"): lambda dtype, data: np.frombuffer(data, dtype.dtype)[0],
        ("numpy._core.numeric", "_frombuffer"): pickled_array,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how protocol 2 writes bytes
    }

    def find_class(self, module: str, name: str):
        try:
            return self.stand_ins[module.replace("numpy.core.", "numpy._core."), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, refused: only arrays and containers") from None


def unpickle(path: str):
    """A foreign pickle of arrays in plain containers. Runs no code from it. Raises UserError."""
    try:
        with open(path, "rb") as file:
            return ArrayUnpickler(file).load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # damaged pickles raise almost anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged, cut short or not a pickle of arrays ({reason})") from None


def numbers(path: str, where: str, value) -> np.ndarray:
    """A pickled array, or a list of numbers, as an array that holds numbers. Raises UserError."""
    try:
        array = np.asarray(value.array if isinstance(value, PickledArray) else value)
    except ValueError:  # lists of unequal lengths
        array = None
    if array is None or array.dtype.kind not in "fiub":
        raise UserError(f"{path}: {where} is not an array of numbers")
    return array


def read_pickle(path: str, episode_limit: int | None) -> dict[str, np.ndarray]:
    """Demonstrations of Berkeley's CS285: a list of dicts with observation, action, reward, terminal, a row a step.

    Its terminal is also set where an episode was truncated: one that lasted for episode_limit steps was.
    """
    trajectories = unpickle(path)
    keys = ("observation", "action", "reward", "terminal")
    if not isinstance(trajectories, list) or not all(isinstance(t, dict) and {*keys} <= {*t} for t in trajectories):
        raise UserError(f"{path}: expected a list of dicts with {', '.join(keys)}")
    episodes = []
    for i, trajectory in enumerate(trajectories):
        arrays = [numbers(path, f"{key} of trajectory {i}", trajectory[key]) for key in keys]
        lengths = [len(array) if array.ndim else 0 for array in arrays]
        if len(set(lengths)) > 1:
            described = ", ".join(f"{key} {length}" for key, length in zip(keys, lengths, strict=True))
            raise UserError(f"{path}: trajectory {i} has arrays of unequal lengths: {described}")
        if lengths[0]:
            last = np.arange(lengths[0]) == lengths[0] - 1
            cut = last & (lengths[0] == episode_limit)
            episodes.append(dict(zip(FIELDS, [*arrays[:3], last & ~cut, cut], strict=True)))
    if not episodes:
        raise UserError(f"{path}: no demonstrations in it")
    if sum(array.nbytes for episode in episodes for array in episode.values()) > MAX_DATA_BYTES:
        raise UserError(f"{path}: unpacks to more than {MAX_DATA_BYTES >> 30} GiB")
    try:
        return join(episodes)
    except ValueError as error:
        raise UserError(f"{path}: its trajectories do not fit each other ({error})") from None


def read_npz(path: str) -> tuple[dict[str, np.ndarray], str]:
    """Demonstrations and env_id of a file that bc.py --save-data wrote. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MAX_DATA_BYTES:
                raise ValueError(f"unpacks to more than {MAX_DATA_BYTES >> 30} GiB")
        with np.load(path, allow_pickle=False) as file:
            return {field: file[field] for field in FIELDS}, str(file["env_id"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # damaged archives raise almost anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged, cut short or not demonstrations ({reason})") from None


def load_demonstrations(args: Args, env: gym.Env) -> dict[str, np.ndarray]:
    """The first --num-trajectories episodes of --expert-data, checked against the environment. Raises UserError."""
    path, env_id = args.expert_data, None
    if path.endswith(".npz"):
        data, env_id = read_npz(path)
    elif path.endswith(".pkl"):
        data = read_pickle(path, env.spec.max_episode_steps)
    else:
        raise UserError(f"--expert-data {path}: must be a .npz or .pkl file; bc.py --save-data makes one of a data set")

    shapes = {field: array.shape for field, array in data.items()}
    if any(array.dtype.kind not in "fiub" for array in data.values()):
        raise UserError(f"{path}: holds arrays that are not numbers")
    if any(len(shape) != (2 if field in ("observations", "actions") else 1) for field, shape in shapes.items()):
        raise UserError(f"{path}: observations and actions must have two dimensions, all else one; found {shapes}")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise UserError(f"{path}: arrays of unequal lengths: {shapes}")
    if shapes["observations"][0] == 0:
        raise UserError(f"{path}: no demonstrations in it")
    for field, space in (("observations", env.observation_space), ("actions", env.action_space)):
        if shapes[field][1:] != space.shape:
            found, needed = shapes[field][1], space.shape[0]
            raise UserError(f"{path}: its {field} have {found} numbers, those of {args.env_id} have {needed}")
    if env_id not in (None, args.env_id):
        raise UserError(f"{path}: demonstrates {env_id}, not --env-id {args.env_id}")

    ends = np.flatnonzero(data["terminations"].astype(bool) | data["truncations"].astype(bool)) + 1
    if len(ends) == 0 or ends[-1] < shapes["actions"][0]:
        ends = np.append(ends, shapes["actions"][0])  # the last episode was cut off
    num_trajectories = args.num_trajectories or len(ends)
    if num_trajectories > len(ends):
        raise UserError(f"--num-trajectories {num_trajectories}: {path} has {len(ends)}")
    for field, dtype in FIELDS.items():
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            data[field] = data[field][: ends[num_trajectories - 1]].astype(dtype, copy=False)
        if not np.isfinite(data[field]).all():
            raise UserError(f"{path}: NaN or infinity in its {field}")
    centre, half_width = action_scale(env)
    data["actions"] -= centre
    data["actions"] /= half_width
    return data


def demonstrate(expert: nn.Module, env: gym.Env, args: Args) -> dict[str, np.ndarray]:
    """Demonstrations by the expert's mean action: as many episodes as --num-trajectories, 2 by default."""
    count = args.num_trajectories or 2
    seeds = torch.randint(2**31, (count,), generator=stream(DEMONSTRATIONS, args.seed)).tolist()
    return join([rollout(policy_of(expert), [env], [seed])[0] for seed in seeds])


class DataSet:
    """The last `capacity` pairs of observation and expert's action: the oldest leave first."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.obs = torch.empty(capacity, obs_dim, device=device)
        self.action = torch.empty(capacity, action_dim, device=device)
        self.num_added = 0

    def __len__(self) -> int:
        return min(self.num_added, len(self.obs))

    def add(self, obs: torch.Tensor, action: torch.Tensor) -> None:
        """obs (n, obs_dim) and action (n, action_dim), oldest first."""
        capacity = len(self.obs)
        index = torch.arange(self.num_added, self.num_added + len(obs))[-capacity:].to(self.obs.device) % capacity
        self.obs[index] = obs[-capacity:].to(self.obs.device)
        self.action[index] = action[-capacity:].to(self.obs.device)
        self.num_added += len(obs)

    def checkpoint(self) -> dict:
        # The view from NumPy has a storage of its own extent, so that only filled rows are saved, without a copy.
        obs, action = (torch.from_numpy(rows[: len(self)].cpu().numpy()) for rows in (self.obs, self.action))
        return {"obs": obs, "action": action, "num_added": self.num_added}

    def load_checkpoint(self, state: dict) -> None:
        self.obs[: len(state["obs"])] = state["obs"]
        self.action[: len(state["action"])] = state["action"]
        self.num_added = state["num_added"]


DEMONSTRATIONS, ROLLOUTS, NOISE, COINS, BATCHES, EVALUATION = range(6)


def stream(*key: int) -> torch.Generator:
    """A random stream of its own for each purpose: none shifts another, and none has a state to save.

    key: the purpose, what counts within it, and the seed.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def batches(num_rows: int, batch_size: int, iteration: int, seed: int) -> Iterator[torch.Tensor]:
    """Batch after batch (batch_size,) of row numbers: each pass over the rows is in a new order.

    What is left of a pass and does not fill a batch is dropped.
    """
    for i in itertools.count():
        order = torch.randperm(num_rows, generator=stream(BATCHES, iteration, i, seed))
        yield from order.split(batch_size)[: num_rows // batch_size]


# --------------------------------------------------------------------------------------------------------- expert


class PickledExpert(nn.Module):
    """The expert of Berkeley's CS285, a Gaussian policy that acts with its mean.

    obs -> (obs - mean) / (std + 1e-6) -> hidden layers -> mean action in the environment's own units.
    """

    def __init__(self, path: str, env: gym.Env):
        super().__init__()
        policy = unpickle(path)
        try:
            nonlinearity = {"tanh": nn.Tanh, "lrelu": nn.LeakyReLU}[policy["nonlin_type"]]
            policy = policy["GaussianPolicy"]
            moments = policy["obsnorm"]["Standardizer"]
            hidden = policy["hidden"]["FeedforwardNet"]
            affine = [hidden[name]["AffineLayer"] for name in sorted(hidden)] + [policy["out"]["AffineLayer"]]
            mean, mean_square = (numbers(path, name, moments[name]).reshape(-1) for name in ("mean_1_D", "meansq_1_D"))
            weights = [(numbers(path, "W", layer["W"]), numbers(path, "b", layer["b"])) for layer in affine]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a policy of CS285 ({type(error).__name__}: {error})") from None
        sizes = [len(np.atleast_1d(weights[0][0])), *(bias.size for _, bias in weights)]
        if any(w.shape != shape for (w, _), shape in zip(weights, itertools.pairwise(sizes), strict=True)):
            raise UserError(f"{path}: its layers do not fit each other: {[w.shape for w, _ in weights]}")
        # What is left out there: contact forces, six for each body, which Ant-v4 observed once and now does on request.
        obs_dim, model = env.observation_space.shape[0], getattr(env.unwrapped, "model", None)
        self.num_missing = sizes[0] - obs_dim if model and sizes[0] - obs_dim == 6 * model.nbody else 0
        check_sizes(path, sizes[0] - self.num_missing, sizes[-1], env)
        if mean.size != sizes[0] or mean_square.size != sizes[0]:
            raise UserError(f"{path}: it standardises {mean.size} observations and takes {sizes[0]}")

        layers = []
        for weight, bias in weights:
            linear = nn.Linear(*weight.shape)
            linear.load_state_dict({"weight": torch.tensor(weight.T.copy()), "bias": torch.tensor(bias.reshape(-1))})
            layers += [linear, nonlinearity()]
        self.net = nn.Sequential(*layers[:-1])
        std = np.sqrt(np.maximum(0, mean_square - np.square(mean))) + 1e-6
        centre, half_width = action_scale(env)
        constants = {"mean": mean, "std": std, "centre": centre, "half_width": half_width}
        for name, value in constants.items():
            self.register_buffer(name, torch.tensor(value.reshape(-1), dtype=torch.float32))
        if not all(value.isfinite().all() for value in self.state_dict().values()):
            raise UserError(f"{path}: its weights are not finite")

    def mean_action(self, obs: torch.Tensor) -> torch.Tensor:
        """(batch, obs_dim) -> (batch, action_dim), unbounded, where [-1, 1] spans the environment's bounds."""
        obs = F.pad(obs, (0, self.num_missing))
        return (self.net((obs - self.mean) / self.std) - self.centre) / self.half_width


def check_sizes(path: str, obs_dim: int, action_dim: int, env: gym.Env) -> None:
    """Raises UserError if a policy is for another environment."""
    sizes = (env.observation_space.shape[0], env.action_space.shape[0])
    if (obs_dim, action_dim) != sizes:
        raise UserError(
            f"{path}: a policy for {obs_dim} observations and {action_dim} actions, {env.spec.id} has {sizes[0]} "
            f"and {sizes[1]}"
        )


def load_expert(args: Args, env: gym.Env) -> nn.Module:
    """--expert, or experts/ENV.pt beside this script: a network with a mean_action. Raises UserError."""
    default = Path(__file__).parent / "experts" / f"{args.env_id}.pt"
    if not args.expert and not default.exists():
        raise UserError(f"--env-id {args.env_id}: there is no expert for it; give --expert")
    path = args.expert or str(default)
    if path.endswith(".pkl"):
        return PickledExpert(path, env)
    policy = load_policy(path)
    check_sizes(path, policy["obs_dim"], policy["action_dim"], env)
    if policy["env_id"] != args.env_id:
        raise UserError(f"--expert {path}: it acts in {policy['env_id']}, not in --env-id {args.env_id}")
    return policy["actor"]


# --------------------------------------------------------------------------------------------------------- losses
# Functions of the policy's mean and log_std and of the demonstrated action, (batch, action_dim) each; scalars.


def nll_loss(mean: torch.Tensor, log_std: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """E[-log pi(a|s)], the negative log-likelihood of a diagonal Gaussian, summed over the action's dimensions."""
    noise = (action - mean) * (-log_std).exp()
    return (0.5 * noise.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1).mean()


def mse_loss(mean: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """E[|a - mean|^2], summed over the action's dimensions."""
    return (action - mean).square().sum(-1).mean()


def bc_loss(actor: Actor, obs: torch.Tensor, action: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what to differentiate and the loss to report.

    Squared error says nothing about the standard deviation: it is fitted by likelihood, with the mean held fixed.
    """
    mean, log_std = actor(obs)
    if kind == "nll":
        loss = nll_loss(mean, log_std, action)
        return loss, loss.detach()
    loss = mse_loss(mean, action)
    return loss + nll_loss(mean.detach(), log_std, action), loss.detach()


def gradient_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Differentiates for this optimiser's parameters alone: no other network sees a gradient."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient.contiguous()  # as its parameter is: fused Adam does not look
    optimizer.step()


# ------------------------------------------------------------------------------------------ evaluation and rollouts

EVALUATION_SEED = 1_000  # of the first episode of every evaluation of every run


def policy_of(actor: nn.Module, noise: torch.Generator | None = None) -> Callable:
    """The actor as a function for rollout: its mean action, or with noise a sampled one."""
    device = next(actor.parameters()).device

    @torch.no_grad()
    def act(obs: torch.Tensor) -> torch.Tensor:
        if noise is None:
            return actor.mean_action(obs.to(device)).cpu()
        mean, log_std = actor(obs.to(device))
        return actor.to_action(mean + log_std.exp() * torch.randn(mean.shape, generator=noise).to(device)).cpu()

    return act


def evaluate(actor: nn.Module, envs: list[gym.Env], noise: torch.Generator | None = None, first: int = 0) -> dict:
    """One episode in each environment of the mean action, or with noise of sampled ones.

    Episode i starts from the seed EVALUATION_SEED + first + i. Returns, per episode: returns, lengths and
    observations (T, obs_dim).
    """
    seeds = [EVALUATION_SEED + first + i for i in range(len(envs))]
    episodes = rollout(policy_of(actor, noise), envs, seeds)
    returns = np.array([episode["rewards"].sum() for episode in episodes])
    lengths = np.array([len(episode["rewards"]) for episode in episodes])
    return {"returns": returns, "lengths": lengths, "observations": [episode["observations"] for episode in episodes]}


def distance_from_demonstrations(episodes: list[np.ndarray], demonstrated: torch.Tensor) -> np.ndarray:
    """How far each episode strays: the mean over its states of the distance to the nearest demonstrated state.

    episodes: observations (T, obs_dim) each; demonstrated: observations (N, obs_dim). Distances are Euclidean and
    without unit: each dimension is standardised by the demonstrated ones' mean and standard deviation, or by the mean
    alone if it is the same in all of them. Returns (num_episodes,).
    """
    std, mean = torch.std_mean(demonstrated, dim=0, correction=0)
    std = torch.where(std > 1e-6, std, 1.0)
    demonstrated = (demonstrated - mean) / std
    distances = []
    for episode in episodes:
        chunks = ((torch.from_numpy(episode) - mean) / std).split(1_000)  # bounds the memory: 8 MB for 2,000 of them
        exact = "donot_use_mm_for_euclid_dist"
        nearest = [torch.cdist(chunk, demonstrated, compute_mode=exact).amin(1) for chunk in chunks]
        distances.append(torch.cat(nearest).mean().item())
    return np.array(distances)


def rollouts(actor: Actor, expert: nn.Module, env: gym.Env, args: Args, iteration: int) -> Iterator[dict]:
    """Whole episodes of the learner's sampled actions, until there are at least --rollout-steps of them.

    In each step the expert acts instead with probability beta_i: pi_i = beta_i pi* + (1 - beta_i) pi^_i of the
    paper's algorithm 3.1, beta_i = beta^i.
    """
    seeds, coins, noise = (stream(purpose, iteration, args.seed) for purpose in (ROLLOUTS, COINS, NOISE))
    learner, expert, beta = policy_of(actor, noise), policy_of(expert), args.expert_mixing**iteration

    def mixture(obs: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.rand(len(obs), 1, generator=coins) < beta, expert(obs), learner(obs))

    steps = 0
    while steps < args.rollout_steps:
        seed = torch.randint(2**31, (1,), generator=seeds).tolist()
        [episode] = rollout(mixture if beta > 0 else learner, [env], seed)
        steps += len(episode["rewards"])
        yield episode


def make_drawn_env(args: Args) -> gym.Env:
    """An environment to record. Raises UserError if nothing can be drawn here."""
    env = FrameText(make_env(args, render_mode="rgb_array"))
    try:
        env.reset()
        env.render()
    except Exception as error:  # every simulator has its own way to say that it cannot draw
        opengl = "; MuJoCo needs OpenGL (Debian, Ubuntu: apt-get install libegl1 libgl1)"
        needs = opengl if hasattr(env.unwrapped, "mujoco_renderer") else ""
        reason = " ".join(str(error).split())
        raise UserError(f"--capture-video: {args.env_id} cannot be drawn ({reason}){needs}") from None
    return env


def record_video(actor: Actor, args: Args, folder: Path, name: str) -> list[np.ndarray]:
    """Plays episodes from an evaluation's first seeds, into folder/NAME-*.mp4. Returns the frames of the first.

    Its environments are its own, so that recording changes nothing else.
    """
    frames = []
    for i in range(args.video_episodes):
        env = make_drawn_env(args)
        env = gym.wrappers.RecordVideo(env, str(folder), episode_trigger=lambda _: True, name_prefix=f"{name}-{i}")
        evaluate(actor, [env], first=i)
        frames = frames or list(env.recorded_frames)
        env.close()
    return frames


def draw_rollout(actor: Actor, expert: nn.Module, args: Args, iteration: int) -> list[np.ndarray]:
    """Every fourth frame of the first episode that `iteration` rolls out.

    Its environment and random streams are its own, so that drawing changes nothing else.
    """
    env = EveryFourthFrame(make_drawn_env(args))
    next(rollouts(actor, expert, env, args, iteration))
    env.close()
    return env.frames


# --------------------------------------------------------------------------------------------- saving and loading

POLICY_FORMAT, CHECKPOINT_FORMAT = "policy/1", "dagger-checkpoint/1"


@contextlib.contextmanager
def replacing(path: Path, keep_previous: bool = False):
    """A binary file to write, which takes path's place once it is whole and on the disk.

    Whenever this is cut off, path is the old file or the new one, or, with keep_previous, at least its
    predecessor stands at STEM.previous.SUFFIX.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch.save makes a RuntimeError of a full disk
            raise error.__context__ from None
        raise
    if keep_previous and path.exists():
        os.replace(path, path.with_suffix(".previous" + path.suffix))
    os.replace(beside, path)


def load_file(path: Path, expected_format: str) -> dict:
    """A file that torch.save wrote. Runs no code from it. Raises UserError if it is damaged or something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not notice a flipped byte
                raise zipfile.BadZipFile("checksum does not match")
        data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: damaged, cut short or not a file of this program ({reason})") from None
    found = data.get("format") if isinstance(data, dict) else None
    if found != expected_format:
        raise UserError(f"{path}: its format is {found!r}, expected {expected_format!r}")
    return data


POLICY_SHAPE = ("obs_dim", "action_dim", "hidden_size", "num_layers", "activation", "actor_std", "squash")


def save_policy(actor: Actor, args: Args, env: gym.Env, path: Path) -> None:
    """policy.pt: plain values and tensors. The network's [-1, 1] maps linearly onto action_low..action_high."""
    bounds = env.unwrapped.action_space
    data = {
        "format": POLICY_FORMAT,
        "algorithm": "dagger",
        "action_low": bounds.low.tolist(),
        "action_high": bounds.high.tolist(),
    }
    data |= {"obs_dim": env.observation_space.shape[0], "action_dim": bounds.shape[0]}
    settings = ("env_id", "env_kwargs", "max_episode_steps", "hidden_size", "num_layers", "activation")
    data |= {name: getattr(args, name) for name in settings} | {"actor_std": "shared", "squash": False}
    data["state_dict"] = {name: value.cpu() for name, value in actor.state_dict().items()}
    with replacing(path) as file:
        torch.save(data, file)


def load_policy(path: str) -> dict:
    """policy.pt, or that of a run folder, with its network under "actor". Raises UserError."""
    file = Path(path) / "policy.pt" if Path(path).is_dir() else Path(path)
    policy = load_file(file, POLICY_FORMAT)
    try:
        policy["actor"] = Actor(**{name: policy[name] for name in POLICY_SHAPE})
        policy["actor"].load_state_dict(policy["state_dict"])
        Args(env_id=policy["env_id"], env_kwargs=policy["env_kwargs"], max_episode_steps=policy["max_episode_steps"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{file}: no policy can be built from it ({' '.join(str(error).split())[:200]})") from None
    if not all(value.isfinite().all() for value in policy["state_dict"].values()):
        raise UserError(f"{file}: its weights are not finite")
    return policy


def write_args(args: Args, run_dir: Path) -> None:
    packages = ("torch", "numpy", "gymnasium", "mujoco", "tyro", "tensorboard")
    versions = {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        revision = None
    data = dataclasses.asdict(args) | {"versions": versions, "git_revision": revision}
    with replacing(run_dir / "args.json") as file:
        file.write(json.dumps(data, indent=2).encode() + b"\n")


def read_args(run_dir: Path) -> Args:
    """The settings of a run folder, checked. Raises UserError."""
    path = run_dir / "args.json"
    try:
        saved = json.loads(path.read_text())
        args = Args(**{field.name: saved[field.name] for field in dataclasses.fields(Args)})
        check_args(args)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is {run_dir} a run folder?") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: not the settings of a run of this version ({type(error).__name__}: {error})"
        ) from None
    return args


def cut_rows(path: Path, last_step: int) -> None:
    """Drops the rows of progress.csv after last_step, and one that was cut off in the middle of a line."""
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        rows = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",")[0]) <= last_step]
    except ValueError:
        raise UserError(f"{path}: damaged; mend it or move it away, then resume again") from None
    with replacing(path) as file:
        file.write("".join(lines[:1] + rows if rows else []).encode())


def open_run_dir(args: Args) -> tuple[Path, filelock.FileLock]:
    """The run folder, made if it is new, and the lock that keeps a second process out. Raises UserError."""
    started = time.strftime("%Y%m%d-%H%M%S")
    name = f"{args.env_id.replace('/', '_')}__{args.exp_name.replace('/', '_')}__{args.seed}__{started}"
    run_dir = Path(args.resume or args.run_dir or Path("runs", name))
    try:
        leftovers = {".lock", "args.json.tmp"}  # of a run killed before it wrote anything
        taken = run_dir.exists() and (not run_dir.is_dir() or any(p.name not in leftovers for p in run_dir.iterdir()))
        if taken and not args.resume:
            raise UserError(f"--run-dir {run_dir}: exists already; resume it with --resume {run_dir} or name another")
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{run_dir}: another process is working on this run; wait for it or stop it") from None
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another folder") from None
    return run_dir, lock


def load_checkpoint(run_dir: Path) -> dict | None:
    """The newest whole checkpoint, or None before the first. Raises UserError if there are only damaged ones."""
    problems = []
    for path in (run_dir / "checkpoint.pt", run_dir / "checkpoint.previous.pt"):
        if path.exists():
            try:
                checkpoint = load_file(path, CHECKPOINT_FORMAT)
                for problem in problems:
                    print(f"warning: {problem}; going on from the one before", file=sys.stderr)
                return checkpoint
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError(f"--resume {run_dir}: no whole checkpoint is left: {'; '.join(problems)}")
    return None


# ------------------------------------------------------------------------------------------------------- training


def set_up_torch(args: Args) -> torch.device:
    """Threads and device. Raises UserError for a device that this machine does not have."""
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device}: not on this machine; take auto, cpu, cuda or cuda:N") from None

    cpu = torch.cpu.get_capabilities()
    # PyTorch hands float32 products to oneDNN, not to MKL, where bfloat16 is allowed. Without AMX oneDNN makes no use
    # of that permission and stays in float32, on AMD 1.3 to 1.6 times as fast as MKL.
    if cpu.get("cpu_name", "").startswith("AMD") and not cpu.get("amx_bf16", False):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    return device


class Stopped(Exception):
    """The run was asked to end; what the last checkpoint holds is all that it needs to go on."""


class StopSignal:
    """The first Ctrl-C or SIGTERM asks the loop to end; a second one ends the process at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number

    def check(self):
        if self.number:
            raise Stopped


def check_finite(step: int, **quantities) -> None:
    """Raises RunError if a number, array or tensor among the quantities has a NaN or an infinity."""
    for name, value in quantities.items():
        value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        if not np.isfinite(value).all():
            raise RunError(f"stopped at step {step}: {name} became NaN or infinite")


def log_settings(args: Args, writer: SummaryWriter) -> None:
    """The settings for TensorBoard's HPARAMS tab, which compares runs by them and their last evaluation return.

    SummaryWriter.add_hparams would make a folder of its own. A setting that is a number in some runs only is written
    as text in all of them, since the tab allows a column one type.
    """
    settings = {
        field.name: getattr(args, field.name) if field.type in (int, float) else str(getattr(args, field.name))
        for field in dataclasses.fields(args)
    }
    for summary in hparams(settings, {"evaluation/eval_return_mean": math.nan}):
        writer.file_writer.add_summary(summary)


class RunLog:
    """progress.csv, TensorBoard and the progress bar of a run, from its first iteration or the one it resumes at."""

    def __init__(self, args: Args, run_dir: Path, step: int, saved: dict):
        self.expert_return = saved["expert_return"]
        self.env_steps, self.expert_queries = saved["env_steps"], saved["expert_queries"]
        self.returns, self.losses = [], []
        self.started = time.perf_counter() - saved["wall_time_s"]
        self.csv_path = run_dir / "progress.csv"
        cut_rows(self.csv_path, step)
        self.tensorboard = SummaryWriter(str(run_dir), purge_step=step + 1)
        log_settings(args, self.tensorboard)
        total = args.num_iterations * args.train_steps_per_iteration
        interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file gets a line now and then
        self.bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, mininterval=interval)

    def episode(self, episode: dict) -> None:
        """An episode of the rollouts, the expert asked in each of its states."""
        self.env_steps += len(episode["rewards"])
        self.expert_queries += len(episode["rewards"])
        self.returns.append(episode["rewards"].sum())

    def evaluation(
        self, step: int, iteration: int, result: dict, sampled: dict, train_loss: float, distance: float
    ) -> None:
        """Writes a row of progress.csv. result and sampled are what evaluate returned for the two kinds of action."""
        row = {
            "step": step,
            "wall_time_s": time.perf_counter() - self.started,
            "eval_return_mean": result["returns"].mean(),
            "eval_return_std": result["returns"].std(),
            "eval_length_mean": result["lengths"].mean(),
            "iteration": iteration,
            "env_steps": self.env_steps,
            "expert_queries": self.expert_queries,
            "train_return_mean": np.mean(self.returns) if self.returns else math.nan,
            "train_return_std": np.std(self.returns) if self.returns else math.nan,
            "train_loss": train_loss,
            "eval_sampled_return_mean": sampled["returns"].mean(),
            "eval_sampled_return_std": sampled["returns"].std(),
            "expert_return_mean": self.expert_return,
            "distance_from_demonstrations": distance,
        }
        with open(self.csv_path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow({name: value if isinstance(value, int) else f"{value:.8g}" for name, value in row.items()})
            file.flush()
            os.fsync(file.fileno())  # a checkpoint may not outlive the rows before it
        self.scalars("evaluation", row, step)
        self.bar.set_postfix({"eval_return": f"{row['eval_return_mean']:.1f}"}, refresh=False)
        self.returns = []

    def video(self, step: int, tag: str, frames: list[np.ndarray]) -> None:
        """Every fourth frame of an episode at half size as a GIF, which TensorBoard plays among its images."""
        images = [Image.fromarray(frame).reduce(2) for frame in frames]
        gif = io.BytesIO()
        images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=80, loop=0)
        width, height = images[0].size
        image = Summary.Image(encoded_image_string=gif.getvalue(), height=height, width=width, colorspace=3)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self.tensorboard.file_writer.add_summary(summary, step)

    def scalars(self, group: str, values: dict, step: int) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{group}/{name}", float(value), step)

    def checkpoint(self) -> dict:
        counts = {"env_steps": self.env_steps, "expert_queries": self.expert_queries}
        return counts | {"expert_return": self.expert_return, "wall_time_s": time.perf_counter() - self.started}

    def close(self) -> None:
        self.bar.close()
        self.tensorboard.close()


def train(args: Args) -> int:
    """One run, from its first iteration or from its checkpoint to its last. Returns the exit code."""
    stop = StopSignal()
    device = set_up_torch(args)
    eval_envs = [make_env(args) for _ in range(args.eval_episodes)]
    env = make_env(args)
    if args.capture_video:
        make_drawn_env(args).close()
    expert = load_expert(args, env).to(device)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    torch.manual_seed(args.seed)  # initial weights; everything random after them has a stream of its own
    shape = (args.hidden_size, args.num_layers, args.activation)
    actor = Actor(obs_dim, action_dim, *shape, actor_std="shared", squash=False).to(device)
    optimizer = torch.optim.Adam(actor.parameters(), args.learning_rate, fused=True)
    try:
        data_set = DataSet(args.buffer_size, obs_dim, action_dim, device)
    except RuntimeError:
        raise UserError(f"--buffer-size {args.buffer_size}: does not fit into memory; take a smaller one") from None
    checkpoint = load_checkpoint(Path(args.resume)) if args.resume else None
    if not checkpoint:
        data = load_demonstrations(args, env) if args.expert_data else demonstrate(expert, env, args)
        demonstrated = some_of(data["observations"])
        data_set.add(*(torch.from_numpy(data[field]) for field in ("observations", "actions")))
        if args.batch_size > len(data_set):
            raise UserError(f"--batch-size {args.batch_size}: larger than the data, {len(data_set)} demonstrated steps")

    run_dir, lock = open_run_dir(args)
    continue_with = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
    first_iteration, saved_log = 0, None
    arithmetic = f"--device {device} with {torch.get_num_threads()} threads"
    if checkpoint:
        if checkpoint.get("arithmetic") != arithmetic:
            change = f"{checkpoint.get('arithmetic')} before, {arithmetic} now"
            print(f"warning: {change}: results will differ in the last bits", file=sys.stderr)
        try:
            first_iteration, saved_log = checkpoint["iteration"] + 1, checkpoint["log"]
            actor.load_state_dict(checkpoint["actor"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            data_set.load_checkpoint(checkpoint["data_set"])
            demonstrated = checkpoint["demonstrated"]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"--resume {run_dir}: its checkpoint does not fit its args.json ({error})") from None
    if first_iteration >= args.num_iterations:
        print(f"{run_dir} is finished: {first_iteration} iterations; a larger --num-iterations continues it")
        return 0
    args = dataclasses.replace(args, run_dir=str(run_dir), resume=None, device=str(device))
    write_args(args, run_dir)
    if not saved_log:
        expert_return = float(evaluate(expert, eval_envs)["returns"].mean())
        saved_log = {"expert_return": expert_return, "wall_time_s": 0.0, "env_steps": 0, "expert_queries": 0}
    step = first_iteration * args.train_steps_per_iteration
    log = RunLog(args, run_dir, step, saved_log)

    try:
        for iteration in range(first_iteration, args.num_iterations):
            if iteration > 0:
                for episode in rollouts(actor, expert, env, args, iteration):
                    obs = torch.from_numpy(episode["observations"])
                    action = policy_of(expert)(obs)  # one call for an episode
                    check_finite(step, observation=obs, expert_action=action, reward=episode["rewards"])
                    data_set.add(obs, action)
                    log.episode(episode)
                    stop.check()
            loss_sum = 0.0
            indices = batches(len(data_set), args.batch_size, iteration, args.seed)
            for index in itertools.islice(indices, args.train_steps_per_iteration):
                loss, reported = bc_loss(actor, data_set.obs[index], data_set.action[index], args.loss)
                gradient_step(optimizer, loss)
                loss_sum = loss_sum + reported
                step += 1
                log.bar.update()
                if step % args.log_every == 0:
                    check_finite(step, loss=reported)
                    log.scalars("learning", {"loss": reported}, step)
                stop.check()

            check_finite(step, loss=reported, **dict(actor.named_parameters()))
            result = evaluate(actor, eval_envs)
            sampled = evaluate(actor, eval_envs, noise=stream(EVALUATION, args.seed))
            stop.check()
            distance = distance_from_demonstrations(result["observations"], demonstrated).mean()
            train_loss = float(loss_sum) / args.train_steps_per_iteration
            log.evaluation(step, iteration, result, sampled, train_loss, distance)
            for name in (f"policy_iteration_{iteration}.pt", "policy.pt"):
                save_policy(actor, args, env, run_dir / name)
            if args.capture_video:
                # The first episode that the next iteration will collect.
                log.video(step, "rollout/video", draw_rollout(actor, expert, args, iteration + 1))
                if (iteration + 1) % args.video_every == 0 or iteration + 1 == args.num_iterations:
                    frames = record_video(actor, args, run_dir / "videos", f"step{step}")
                    log.video(step, "evaluation/video", frames[::4])
            parts = {"actor": actor.state_dict(), "optimizer": optimizer.state_dict(), "log": log.checkpoint()}
            parts |= {"iteration": iteration, "data_set": data_set.checkpoint(), "arithmetic": arithmetic}
            parts |= {"demonstrated": demonstrated}
            with replacing(run_dir / "checkpoint.pt", keep_previous=True) as file:
                torch.save({"format": CHECKPOINT_FORMAT, **parts}, file)
    except Stopped:
        print(f"stopped in iteration {iteration}, all before it is saved; continue with\n  {continue_with}")
        return 128 + stop.number
    except OSError as error:
        reason = f"{run_dir}: stopped by the system ({error.strerror or error})"
        raise RunError(f"{reason}; mend that, then continue from the last checkpoint: {continue_with}") from None
    except RunError as error:
        raise RunError(f"{error}; rows, policy and checkpoint from before are in {run_dir}") from None
    finally:
        log.close()
        lock.release()
    for kind, returns in (("mean action", result["returns"]), ("sampled actions", sampled["returns"])):
        share = f", {returns.mean() / log.expert_return:.1%} of the expert's" if log.expert_return > 0 else ""
        print(f"evaluation return, {kind}: {returns.mean():.1f} +- {returns.std():.1f} after {step} steps{share}")
    print_where_all_is(run_dir)
    return 0


def print_where_all_is(run_dir: Path) -> None:
    folder, plot = shlex.quote(str(run_dir)), Path(__file__).with_name("benchmark") / "plot.py"
    print(f"  run folder  {run_dir}")
    if plot.exists():  # the script may have been copied without it
        print(f"  curves      python {os.path.relpath(plot)} {folder} --out {folder}/curves.png")
    print(f"  TensorBoard tensorboard --logdir {folder}")
    print(f"  policy      python {sys.argv[0]} --evaluate {folder}")


def evaluate_policy(args: Args) -> int:
    """--evaluate: prints the mean and standard deviation of the mean action's return, shows or records episodes."""
    device, policy = set_up_torch(args), load_policy(args.evaluate)
    envs = [make_env(args) for _ in range(args.eval_episodes)]
    check_sizes(args.evaluate, policy["obs_dim"], policy["action_dim"], envs[0])
    actor = policy["actor"].to(device)
    if args.render:
        window = [RealSpeed(make_env(args, render_mode="human"))]
        returns = np.concatenate([evaluate(actor, window, first=i)["returns"] for i in range(args.eval_episodes)])
    else:
        returns = evaluate(actor, envs)["returns"]
    print(f"{args.env_id}: return {returns.mean():.2f} +- {returns.std():.2f} over {len(returns)} episodes")
    if args.capture_video:
        path = Path(args.evaluate)
        folder = (path if path.is_dir() else path.parent) / "videos"
        record_video(actor, args, folder, "evaluate")
        print(f"videos in {folder}")
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        return evaluate_policy(args) if args.evaluate else train(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
