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
"""Soft actor-critic (SAC) for continuous control, and the variants of it that the field uses, in one file.

Papers:
    Haarnoja et al. 2018a, "Soft Actor-Critic: Off-Policy Maximum Entropy Deep Reinforcement Learning with a
        Stochastic Actor", arXiv:1801.01290 (state-value network, fixed temperature)
    Haarnoja et al. 2018b, "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905 (the default here)

Example:
    python sac_continuous.py --env-id HalfCheetah-v4 --temperature 0.2

Writes a run folder, runs/ENV__EXP__SEED__TIME by default: args.json (settings), progress.csv (a row per evaluation),
events.out.tfevents.* (TensorBoard), policy.pt (the policy alone), checkpoint.pt (all that --resume needs) and, with
--capture-video, videos/*.mp4.
"""

import contextlib
import copy
import csv
import dataclasses
import difflib
import functools
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
import tempfile
import time
import unittest.mock
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    env_id: str = "HalfCheetah-v4"
    """Gymnasium environment: flat Box observations, bounded Box actions"""
    env_kwargs: str = "{}"
    """JSON for gym.make, as '{"use_contact_forces": true}' for Ant-v4"""
    max_episode_steps: int | None = None
    """replaces the environment's own limit"""
    seed: int = 1
    """seeds everything; the same seed on the same machine gives the same bytes"""
    exp_name: str = "sac_continuous"
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
    matmul_precision: Literal["exact", "bf16", "tf32"] = "exact"
    """of matrix products; bf16: CPUs with AMX, tf32: NVIDIA GPUs"""
    compile: Literal["auto", "always", "never"] = "auto"
    """on a CPU: compile the update to C++; auto: in runs of 100,000 steps or more"""
    cuda_graph: bool = True
    """on a GPU: replay the whole update as one CUDA graph"""

    total_steps: int = 1_000_000
    """environment steps"""
    random_steps: int = 5_000
    """uniform random actions at the start"""
    learning_starts: int = 5_000
    """first step with an update"""
    batch_size: int = 256
    """transitions in a batch"""
    buffer_size: int = 1_000_000
    """transitions the replay buffer holds"""
    gamma: float = 0.99
    """discount factor"""
    actor_lr: float = 3e-4
    """Adam's learning rate for the actor"""
    critic_lr: float = 3e-4
    """Adam's learning rate for the critics and the value network"""
    temperature_lr: float = 3e-4
    """Adam's learning rate for the learned temperature"""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """linear: every learning rate falls to zero at total-steps"""

    temperature: float | Literal["auto"] = "auto"
    """weight of the entropy: auto (learned) or a fixed number; 0: no entropy bonus anywhere"""
    target_entropy: float | Literal["auto"] = "auto"
    """entropy in nats that the learned temperature aims at; auto: -dim(A)"""
    backup_entropy: bool = True
    """the entropy bonus in the critics' target"""
    actor_gradient: Literal["reparametrize", "reinforce"] = "reparametrize"
    """estimator of the actor's gradient"""
    num_actor_samples: int = 1
    """actions sampled per state in the actor's loss"""
    num_critics: int = 2
    """critics in the ensemble"""
    critic_backup: Literal["min", "mean", "double-q", "redq", "value"] = "min"
    """how the target critics' values become one; value: a state-value network instead"""
    num_critic_updates: int = 1
    """critic updates, each on a fresh batch, before each actor update"""
    tau: float = 0.005
    """targets move by target <- (1 - tau) target + tau online"""
    target_update_period: int = 1
    """critic updates between two such moves; hard updates: --tau 1 and 1000 here"""

    hidden_size: int = 256
    """units of a hidden layer"""
    num_layers: int = 2
    """hidden layers"""
    activation: Literal["relu", "tanh", "leaky-relu", "selu", "silu"] = "relu"
    """non-linearity of the hidden layers"""
    actor_std: Literal["state", "shared"] | float = "state"
    """standard deviation: an output of the network, a parameter per dimension, or a fixed number"""
    squash: bool = True
    """tanh-squashed Gaussian; otherwise a Gaussian whose actions the environment clips"""

    eval_every: int = 5_000
    """steps between evaluations; the last step is always evaluated"""
    eval_episodes: int = 10
    """episodes of an evaluation"""
    log_every: int = 100
    """steps between TensorBoard points"""
    checkpoint_every: int = 10_000
    """steps between checkpoints; the last step always has one"""
    capture_video: bool = False
    """record evaluation episodes as mp4"""
    video_every: int = 10
    """evaluations between recordings; the last one is always recorded"""
    video_episodes: int = 1
    """episodes of a recording"""
    render: bool = False
    """with --evaluate: show the episodes in a window"""


# What --resume may change, and what --evaluate listens to.
RESUME_MAY_CHANGE = {"resume", "total_steps", "eval_every", "eval_episodes", "device", "torch_threads"}
RESUME_MAY_CHANGE |= {"capture_video", "video_every", "video_episodes", "compile", "cuda_graph"}
EVALUATE_USES = {"evaluate", "env_id", "env_kwargs", "max_episode_steps", "eval_episodes", "device", "torch_threads"}
EVALUATE_USES |= {"matmul_precision", "capture_video", "video_episodes", "render"}


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do. Exit code 2."""


class RunError(Exception):
    """Training could not go on (a full disk, a loss that became NaN). Exit code 1."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_args(args: Args) -> None:
    """Raises UserError for numbers out of range and for settings that contradict each other."""
    counts = "total_steps batch_size buffer_size num_actor_samples num_critics num_critic_updates target_update_period"
    counts += " hidden_size num_layers eval_every eval_episodes log_every checkpoint_every max_episode_steps"
    counts += " video_every video_episodes"
    ranges = [
        ("at least 1, at most 2^31", lambda x: 1 <= x <= 2**31, counts),
        ("0 or more", lambda x: 0 <= x < 2**63, "seed random_steps learning_starts"),
        ("from 0 to 1024", lambda x: 0 <= x <= 1024, "torch_threads"),
        ("above 0 and finite", lambda x: 0 < x < math.inf, "actor_lr critic_lr temperature_lr actor_std"),
        ("between 0 and 1", lambda x: 0 <= x <= 1, "gamma"),
        ("above 0 and at most 1", lambda x: 0 < x <= 1, "tau"),
        ("0 or more and finite", lambda x: 0 <= x < math.inf, "temperature"),
        ("finite", math.isfinite, "target_entropy"),
    ]
    for field in dataclasses.fields(Args):
        if getattr(args, field.name) == "":
            raise UserError(f"{flag(field.name)} is empty: give it a value or leave it out")
    for meaning, holds, names in ranges:
        for name in names.split():
            value = getattr(args, name)
            if isinstance(value, int | float) and not holds(value):
                raise UserError(f"{flag(name)} {value}: must be {meaning}")

    fixed = args.temperature != "auto"
    constant_entropy = not args.squash and isinstance(args.actor_std, float)
    silent = not args.capture_video
    wrong_number = {"double-q": args.num_critics != 2, "redq": args.num_critics < 2}.get(args.critic_backup, False)
    contradictions = [
        ("learning_starts total_steps", args.learning_starts >= args.total_steps, "nothing would be learned"),
        ("batch_size buffer_size", args.batch_size > args.buffer_size, "the buffer must hold a batch"),
        ("target_entropy temperature", fixed and args.target_entropy != "auto", "a fixed temperature has no target"),
        (
            "temperature_lr temperature",
            fixed and args.temperature_lr != Args.temperature_lr,
            "it is fixed, not learned",
        ),
        (
            "backup_entropy temperature",
            args.temperature == 0 and not args.backup_entropy,
            "0 has no bonus to leave out",
        ),
        ("actor_std temperature", constant_entropy and not fixed, "without --squash the entropy is then constant"),
        ("critic_backup num_critics", wrong_number, "double-q takes exactly 2, redq at least 2"),
        ("video_every capture_video", silent and args.video_every != Args.video_every, "nothing is recorded"),
        ("video_episodes capture_video", silent and args.video_episodes != Args.video_episodes, "nothing is recorded"),
        ("render evaluate", args.render and not args.evaluate, "a window shows evaluations of --evaluate"),
        ("render capture_video", args.render and args.capture_video, "show or record"),
    ]
    for names, wrong, why in contradictions:
        if wrong:
            pair = " and ".join(f"{flag(name)} {getattr(args, name)}" for name in names.split())
            raise UserError(f"{pair} contradict each other: {why}")


def parse_args(argv: list[str] | None = None) -> Args:
    """The command line as checked settings. --resume starts from the saved ones, --evaluate from the policy's."""
    args = tyro.cli(Args, args=argv, description="Soft actor-critic for continuous control.")
    if args.resume and args.evaluate:
        raise UserError("--resume and --evaluate contradict each other: give one of them")
    if args.resume:
        saved = read_args(Path(args.resume))
        args = tyro.cli(Args, args=argv, default=dataclasses.replace(saved, resume=args.resume))
        may_change = RESUME_MAY_CHANGE - ({"total_steps"} if saved.lr_schedule == "linear" else set())
        differ = [
            f"{flag(field.name)} {getattr(args, field.name)} (saved: {getattr(saved, field.name)})"
            for field in dataclasses.fields(Args)
            if field.name not in may_change and getattr(args, field.name) != getattr(saved, field.name)
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
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env if args.squash else gym.wrappers.ClipAction(env)


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


class RealSpeed(gym.Wrapper):
    """Steps no faster than time passes in the simulation, for a window."""

    def reset(self, **kwargs):
        self.due = time.perf_counter()
        return self.env.reset(**kwargs)

    def step(self, action):
        self.due += 1 / self.metadata.get("render_fps", 30)
        time.sleep(max(0, self.due - time.perf_counter()))
        return self.env.step(action)


class TrainingEnv:
    """The environment in training, with what it takes to rebuild it in the middle of an episode.

    No simulator state is saved: an episode is its generator's state before the reset and its actions, and playing
    them again leads to the same place.
    """

    def __init__(self, args: Args):
        self.env = make_env(args)
        self.env.reset(seed=args.seed)
        self.reset()

    @property
    def generator(self) -> np.random.BitGenerator:
        return self.env.unwrapped.np_random.bit_generator

    def reset(self) -> None:
        self.generator_state = self.generator.state
        self.actions = []
        self.episode_return = 0.0
        self.obs = np.asarray(self.env.reset()[0], dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Returns next_obs (obs_dim,), reward, terminated, truncated."""
        next_obs, reward, terminated, truncated, _ = self.env.step(action)
        self.actions.append(action)
        self.episode_return += float(reward)
        self.obs = np.asarray(next_obs, dtype=np.float32)
        return self.obs, float(reward), bool(terminated), bool(truncated)

    def checkpoint(self) -> dict:
        return {
            "generator_state": self.generator_state,
            "actions": [torch.from_numpy(action) for action in self.actions],
            "obs": torch.from_numpy(self.obs),
        }

    def load_checkpoint(self, state: dict) -> None:
        self.generator.state = state["generator_state"]
        self.reset()
        for action in state["actions"]:
            self.step(action.numpy())
        if not np.array_equal(self.obs, state["obs"].numpy()):
            print(
                "warning: the environment is not deterministic, so the run goes on with a new episode", file=sys.stderr
            )
            self.reset()


# ------------------------------------------------------------------------------------------------------- networks

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "leaky-relu": nn.LeakyReLU, "selu": nn.SELU, "silu": nn.SiLU}
ACTIVATIONS["relu"] = functools.partial(nn.ReLU, inplace=True)  # one pass over memory less
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


class Actor(nn.Module):
    """Gaussian policy, squashed by tanh into [-1, 1]^action_dim unless told otherwise.

    The log standard deviation is clamped to [-20, 2], as in the papers' own code.
    """

    def __init__(
        self, obs_dim, action_dim, hidden_size=256, num_layers=2, activation="relu", actor_std="state", squash=True
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

    def log_prob(self, u: torch.Tensor, noise: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
        """log pi(a|s) of the action a that u = mean + exp(log_std) noise becomes (2018b, eq. 26). Returns (batch,).

        All arguments are (batch, action_dim). The tanh's log(1 - tanh(u)^2) is written as
        2 (log 2 - u - softplus(-2 u)), which stays exact where tanh(u) rounds to 1.
        """
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        if self.squash:
            log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))
        return log_prob.sum(-1)

    def sample(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reparametrised action (batch, action_dim) and its log-probability (batch,)."""
        mean, log_std = self(obs)
        u = mean + log_std.exp() * noise
        return self.to_action(u), self.log_prob(u, noise, log_std)

    def mean_action(self, obs: torch.Tensor) -> torch.Tensor:
        """The deterministic policy that evaluations follow. Returns (batch, action_dim)."""
        return self.to_action(self(obs)[0])


class Ensemble(nn.Module):
    """Networks of one shape with a scalar output each, side by side: one product a layer serves them all.

    Layer weights are (num_members, fan_in, fan_out).
    """

    def __init__(self, num_members: int, in_dim: int, hidden_size: int, num_layers: int, activation: str):
        super().__init__()
        sizes = [in_dim, *[hidden_size] * num_layers, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            bound = fan_in**-0.5  # as nn.Linear
            self.weights.append(torch.empty(num_members, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(num_members, 1, fan_out).uniform_(-bound, bound))
        self.activation = ACTIVATIONS[activation]()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Inputs (batch, dim), concatenated: obs, action for Q(s, a), obs for V(s). Returns (num_members, batch)."""
        x = torch.cat(inputs, dim=-1).expand(len(self.weights[0]), -1, -1)
        *hidden_layers, (last_weight, last_bias) = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden_layers:
            x = self.activation(torch.baddbmm(bias, x, weight))
        # One column: products and a sum are faster than a matrix product, forwards and backwards.
        return torch.linalg.vecdot(x, last_weight.mT) + last_bias.squeeze(-1)


# -------------------------------------------------------------------------------------------------- replay buffer


class ReplayBuffer:
    """The last `capacity` transitions, a row each: obs, action, reward, next_obs, terminated, as float32.

    On a CPU memory is taken as rows are filled, on a GPU all at once.
    """

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = torch.empty(capacity, sum(self.sizes), device=device)
        self.num_added = 0

    def __len__(self) -> int:
        return min(self.num_added, len(self.rows))

    def add(self, obs, action, reward: float, next_obs, terminated: bool) -> None:
        """A truncated episode is not terminated: its last state has a value, and the target bootstraps from it."""
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        self.rows[self.num_added % len(self.rows)] = torch.from_numpy(row)
        self.num_added += 1

    def draw(self, index: torch.Tensor, generator: torch.Generator) -> None:
        """Fills index with numbers of rows, uniform with replacement."""
        torch.randint(len(self), index.shape, generator=generator, out=index)

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows index (batch,). Returns obs, action, reward (batch,), next_obs, terminated (batch,)."""
        obs, action, reward, next_obs, terminated = self.rows.index_select(0, index).split(self.sizes, dim=1)
        return obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1)

    def checkpoint(self) -> dict:
        # The view from NumPy has a storage of its own extent, so that only filled rows are saved, without a copy.
        return {"rows": torch.from_numpy(self.rows[: len(self)].cpu().numpy()), "num_added": self.num_added}

    def load_checkpoint(self, state: dict) -> None:
        self.rows[: len(state["rows"])] = state["rows"]
        self.num_added = state["num_added"]


# --------------------------------------------------------------------------------------------------------- losses
# Pure functions of tensors. q: (num_critics, batch); log_prob, reward, terminated: (batch,).


def backup(q: torch.Tensor, kind: str) -> torch.Tensor:
    """What the target critics' values become: (num_critics, batch) -> (1, batch), for double-q (num_critics, batch)."""
    if kind == "mean":
        return q.mean(0, keepdim=True)
    if kind == "double-q":  # each critic's target comes from the other one (van Hasselt 2010)
        return q.flip(0)
    return q.min(0, keepdim=True).values  # clipped double Q (Fujimoto et al. 2018); for redq over a random pair


def actor_objective(q: torch.Tensor, kind: str) -> torch.Tensor:
    """The value that the actor maximises: min over critics for min and value, else their mean. Returns (batch,)."""
    return q.min(0).values if kind in ("min", "value") else q.mean(0)


def soft_value(q: torch.Tensor, log_prob: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    """V(s) = E[Q(s, a) - temperature log pi(a|s)], from one action (2018b, eq. 3)."""
    return q - temperature * log_prob


def critic_target(
    reward: torch.Tensor, terminated: torch.Tensor, next_value: torch.Tensor, gamma: float
) -> torch.Tensor:
    """y = r + gamma (1 - d) V(s') (2018b, eq. 2). d marks termination only, never truncation."""
    return reward + gamma * (1 - terminated) * next_value


def critic_loss(q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over critics of E[(Q_j(s, a) - y_j)^2] / 2 (2018b, eq. 5). target has no gradient."""
    return 0.5 * (q - target).square().mean(1).sum()


def actor_loss(log_prob: torch.Tensor, q: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    """J = E[temperature log pi(a|s) - Q(s, a)], a reparametrised (2018b, eq. 9). q: (batch,)."""
    return (temperature * log_prob - q).mean()


def reinforce_loss(
    score: torch.Tensor, log_prob: torch.Tensor, q: torch.Tensor, temperature: torch.Tensor | float
) -> torch.Tensor:
    """The same objective by the score function (Williams 1992): its gradient in Q is E[grad log pi(a|s) Q(s, a)].

    score: log pi of actions held fixed; q: (batch,), no gradient, no baseline taken off. The entropy keeps its
    reparametrised gradient.
    """
    return (temperature * log_prob - score * q).mean()


def temperature_loss(log_temperature: torch.Tensor, log_prob: torch.Tensor, target_entropy: float) -> torch.Tensor:
    """J(temperature) = E[-temperature (log pi(a|s) + target_entropy)] (2018b, eq. 18). log_prob has no gradient.

    The paper's form, in the temperature itself. Its gradient in log_temperature carries a factor temperature, which
    Adam's scaling takes out; codes that put log_temperature in its place have the same sign and fixed point. If the
    policy cannot reach the target (its entropy's ceiling in [-1, 1]^n is n log 2), the temperature grows without end.
    """
    return -(log_temperature.exp() * (log_prob + target_entropy)).mean()


# ---------------------------------------------------------------------------------------------------------- agent


@torch.no_grad()
def move_target(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


class Agent(nn.Module):
    """The networks, their optimisers, and one training step."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int, device: torch.device):
        super().__init__()
        shape = (args.hidden_size, args.num_layers, args.activation)
        self.args, self.device, self.action_dim = args, device, action_dim
        self.actor = Actor(obs_dim, action_dim, *shape, args.actor_std, args.squash)
        self.critic = Ensemble(args.num_critics, obs_dim + action_dim, *shape)
        self.value = Ensemble(1, obs_dim, *shape) if args.critic_backup == "value" else None
        self.learned_temperature = args.temperature == "auto"
        log_temperature = 0.0 if self.learned_temperature or args.temperature == 0 else math.log(args.temperature)
        self.log_temperature = nn.Parameter(torch.tensor(log_temperature), requires_grad=self.learned_temperature)
        self.target_entropy = -float(action_dim) if args.target_entropy == "auto" else args.target_entropy
        # The network that the critics' target reads, and its slow copy.
        self.online = self.value or self.critic
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.to(device)

        self.graphs = {} if args.cuda_graph and device.type == "cuda" else None
        self.cuda_stream = None if self.graphs is None else torch.cuda.Stream()

        def group(name: str, parameters: Iterable[nn.Parameter], lr: float) -> dict:
            rate = torch.tensor(lr, device=device)  # a tensor: a captured update sees it change
            return {"name": name, "params": list(parameters), "lr": rate, "initial_lr": lr}

        groups = {"critic": [group("critic", self.critic.parameters(), args.critic_lr)]}
        groups["actor"] = [group("actor", self.actor.parameters(), args.actor_lr)]
        if self.learned_temperature:
            groups["actor"].append(group("temperature", [self.log_temperature], args.temperature_lr))
        if self.value:
            groups["value"] = [group("value", self.value.parameters(), args.critic_lr)]
        self.optimizers = {  # fused: one pass over a parameter and its state
            name: torch.optim.Adam(of_one, fused=True, capturable=self.graphs is not None)
            for name, of_one in groups.items()
        }
        self.parameters_of = {
            name: [parameter for group in of_one for parameter in group["params"]] for name, of_one in groups.items()
        }
        self.gradients_of = {"critic": self.critic_gradients, "actor": self.actor_gradients}
        if self.value:
            self.gradients_of["value"] = self.value_gradients
        self.num_critic_updates = 0
        self.gradients = {}
        self.index = torch.empty(args.num_critic_updates, args.batch_size, dtype=torch.int64, device=device)

        # One stream per purpose: drawing from one never shifts another.
        names = ("explore", "replay", "update")
        seeds = np.random.SeedSequence(args.seed).generate_state(len(names)).tolist()
        self.streams = {
            name: torch.Generator(device).manual_seed(seed) for name, seed in zip(names, seeds, strict=True)
        }
        self.compiled = args.compile == "always" and self.compile_gradients(obs_dim)

    @property
    def temperature(self) -> torch.Tensor | float:
        return self.log_temperature.detach().exp() if self.args.temperature != 0 else 0.0

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """A sampled action (action_dim,) for one observation (obs_dim,)."""
        mean, log_std = self.actor(torch.from_numpy(obs).to(self.device))
        noise = torch.randn(mean.shape, generator=self.streams["explore"], device=self.device)
        return self.actor.to_action(mean + log_std.exp() * noise).cpu().numpy()

    def random_action(self) -> np.ndarray:
        """Uniform in [-1, 1]^action_dim."""
        uniform = torch.rand(self.action_dim, generator=self.streams["explore"], device=self.device)
        return (2 * uniform - 1).cpu().numpy()

    @torch.no_grad()
    def q_mean(self, obs: np.ndarray, action: np.ndarray) -> float:
        """Mean over critics and batch of Q(s, a), for the first states and actions of evaluation episodes."""
        obs, action = (torch.from_numpy(x).to(self.device) for x in (obs, action))
        return self.critic(obs, action).mean().item()

    def random(self, draw, *shape: int) -> torch.Tensor:
        """torch.randn or torch.rand for a loss."""
        return draw(*shape, generator=self.streams["update"], device=self.device)

    def update(self, buffer: ReplayBuffer, progress: float) -> dict[str, torch.Tensor]:
        """num_critic_updates critic updates on fresh batches, then one of the actor and one of the temperature.

        progress: the share of the run that is over, for the learning rates. Returns tensors whose means are logged.
        """
        if self.args.lr_schedule == "linear":
            for group in self.parameter_groups():
                group["lr"].fill_(group["initial_lr"] * (1 - progress))
        buffer.draw(self.index, self.streams["replay"])
        if self.graphs is None:
            metrics, self.gradients = self.run_updates(buffer)
            return metrics
        first = self.num_critic_updates + 1
        counts = range(first, first + self.args.num_critic_updates)
        target_moves = tuple(count % self.args.target_update_period == 0 for count in counts)
        if target_moves not in self.graphs:
            arguments = self.streams["update"], self.cuda_stream
            self.graphs[target_moves] = CudaGraph(lambda: self.run_updates(buffer), *arguments)
        metrics, self.gradients = self.graphs[target_moves]()
        self.num_critic_updates = counts[-1]  # a replay runs no Python
        return metrics

    def run_updates(self, buffer: ReplayBuffer) -> tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]]]:
        """Returns update's metrics and the last gradients."""
        for index in self.index:
            batch = buffer[index]
            metrics = self.update_critics(*batch)
        metrics |= self.update_actor(batch[0])
        return metrics, {group["name"]: [p.grad for p in group["params"]] for group in self.parameter_groups()}

    def parameter_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def update_critics(self, obs, action, reward, next_obs, terminated) -> dict[str, torch.Tensor]:
        """A step of the critics, one of the value network if there is one, and the targets' move."""
        args, kind = self.args, self.args.critic_backup
        noise = None if kind == "value" else self.random(torch.randn, *action.shape)
        # A random pair of the critics (Chen et al. 2021, algorithm 1).
        pair = self.random(torch.rand, args.num_critics).topk(2).indices if kind == "redq" else None
        metrics = self.step("critic", obs, action, reward, next_obs, terminated, noise, pair)
        if kind == "value":
            metrics |= self.step("value", obs, self.random(torch.randn, *action.shape))
        self.num_critic_updates += 1
        if self.num_critic_updates % args.target_update_period == 0:
            move_target(self.target, self.online, args.tau)
        return metrics

    def update_actor(self, obs) -> dict[str, torch.Tensor]:
        """A step of the actor and, if it is learned, of the temperature."""
        samples = self.args.num_actor_samples * len(obs)
        return self.step("actor", obs, self.random(torch.randn, samples, self.action_dim))

    def step(self, name: str, *inputs: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """A step of one optimiser. Returns what is logged."""
        gradients, metrics = self.gradients_of[name](*inputs)
        for parameter, gradient in zip(self.parameters_of[name], gradients, strict=True):
            parameter.grad = gradient.contiguous()  # as its parameter is: fused Adam does not look
        self.optimizers[name].step()
        return metrics

    # What follows changes nothing and draws nothing. Each loss is differentiated for its own parameters alone: no other
    # network sees a gradient.

    def critic_gradients(self, obs, action, reward, next_obs, terminated, noise, pair) -> tuple[tuple, dict]:
        args, kind = self.args, self.args.critic_backup
        entropy_weight = self.temperature if args.backup_entropy else 0.0
        with torch.no_grad():
            if kind == "value":
                next_value = self.target(next_obs)  # (1, batch)
            else:
                next_action, next_log_prob = self.actor.sample(next_obs, noise)
                next_q = self.target(next_obs, next_action)  # (num_critics, batch)
                next_q = backup(next_q if pair is None else next_q[pair], kind)  # (1, batch); all for double-q
                next_value = soft_value(next_q, next_log_prob, entropy_weight)
            target = critic_target(reward, terminated, next_value, args.gamma)
        q = self.critic(obs, action)  # (num_critics, batch)
        loss = critic_loss(q, target)
        metrics = {"critic_loss": loss.detach(), "q_values": q.detach(), "target_values": target}
        return torch.autograd.grad(loss, self.parameters_of["critic"]), metrics

    def value_gradients(self, obs, noise) -> tuple[tuple, dict]:
        """V(s) regresses on min_j Q_j(s, a) - temperature log pi(a|s) (2018a, eq. 5)."""
        entropy_weight = self.temperature if self.args.backup_entropy else 0.0
        with torch.no_grad():
            action, log_prob = self.actor.sample(obs, noise)
            target = soft_value(backup(self.critic(obs, action), "value"), log_prob, entropy_weight)
        loss = critic_loss(self.value(obs), target)
        return torch.autograd.grad(loss, self.parameters_of["value"]), {"value_loss": loss.detach()}

    def actor_gradients(self, obs, noise) -> tuple[tuple, dict]:
        args = self.args
        obs, mean, log_std = (  # (samples * batch, ...), copied only for several samples
            x.expand(args.num_actor_samples, -1, -1).flatten(0, 1) for x in (obs, *self.actor(obs))
        )
        u = mean + log_std.exp() * noise
        action, log_prob = self.actor.to_action(u), self.actor.log_prob(u, noise, log_std)
        temperature = self.temperature
        if args.actor_gradient == "reparametrize":
            q = actor_objective(self.critic(obs, action), args.critic_backup)
            loss = actor_loss(log_prob, q, temperature)
        else:
            with torch.no_grad():
                q = actor_objective(self.critic(obs, action), args.critic_backup)
            u = u.detach()
            score = self.actor.log_prob(u, (u - mean) / log_std.exp(), log_std)
            loss = reinforce_loss(score, log_prob, q, temperature)
        log_prob, both = log_prob.detach(), loss
        if self.learned_temperature:  # the two losses share no parameter, so that one step can take both
            both = loss + temperature_loss(self.log_temperature, log_prob, self.target_entropy)
        metrics = {"actor_loss": loss.detach(), "entropy": -log_prob, "temperature": temperature}
        metrics |= {"policy_std": log_std.detach().exp(), "action_saturation": action.detach().abs() > 0.99}
        return torch.autograd.grad(both, self.parameters_of["actor"]), metrics

    def gradient_norms(self) -> dict[str, torch.Tensor]:
        """Of the last update, by network."""
        norm = torch.nn.utils.get_total_norm
        return {f"{name}_gradient_norm": norm(gradients) for name, gradients in self.gradients.items()}

    def checkpoint(self) -> dict:
        return {
            "networks": self.state_dict(),
            "optimizers": {name: optimizer.state_dict()["state"] for name, optimizer in self.optimizers.items()},
            "streams": {name: stream.get_state() for name, stream in self.streams.items()},
            "num_critic_updates": self.num_critic_updates,
        }

    def load_checkpoint(self, saved: dict) -> None:
        self.load_state_dict(saved["networks"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["optimizers"][name]})
        self.num_critic_updates = saved["num_critic_updates"]
        for name, stream in self.streams.items():
            if stream.get_state().shape == saved["streams"][name].shape:
                stream.set_state(saved["streams"][name])
            else:  # from another kind of device: start a new sequence rather than the first one again
                stream.manual_seed(stream.initial_seed() + self.num_critic_updates)

    def compile_gradients(self, obs_dim: int) -> bool:
        """Makes C++ of gradients_of. Returns whether that worked; if not, all stays as it is."""
        empty = ReplayBuffer(1, obs_dim, self.action_dim, self.device)
        batch = obs, *_ = empty[torch.zeros_like(self.index[0])]
        noise = torch.zeros(len(obs), self.action_dim, device=self.device)
        pair = torch.tensor([0, 1], device=self.device) if self.args.critic_backup == "redq" else None
        inputs = {"critic": (*batch, None if self.value else noise, pair), "value": (obs, noise)}
        inputs["actor"] = obs, noise.repeat(self.args.num_actor_samples, 1)
        compiled = compile_functions(self.gradients_of, inputs)
        self.gradients_of = compiled or self.gradients_of
        return compiled is not None


# ----------------------------------------------------------------------------------------------------- evaluation

EVALUATION_SEED = 1_000  # of the first episode of every evaluation of every run


@torch.no_grad()
def evaluate(actor: Actor, envs: list[gym.Env], gamma: float = 1.0, first: int = 0) -> dict[str, np.ndarray]:
    """One episode of the mean action in each environment, side by side so that the network sees them as a batch.

    Episode i starts from the seed EVALUATION_SEED + first + i. Returns, per episode: returns, lengths,
    discounted_returns, first_obs and first_action.
    """
    device = next(actor.parameters()).device
    seed = EVALUATION_SEED + first
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)]).astype(np.float32)
    first_obs, first_action = obs.copy(), None
    returns, discounted, lengths = np.zeros(len(envs)), np.zeros(len(envs)), np.zeros(len(envs), dtype=int)
    running = np.arange(len(envs))
    while len(running):
        actions = actor.mean_action(torch.from_numpy(obs[running]).to(device)).cpu().numpy()
        first_action = actions if first_action is None else first_action
        still_running = []
        for i, action in zip(running, actions, strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            discounted[i] += gamma ** lengths[i] * reward
            lengths[i] += 1
            if not (terminated or truncated):
                still_running.append(i)
        running = np.array(still_running, dtype=int)
    result = {"returns": returns, "lengths": lengths, "discounted_returns": discounted}
    return result | {"first_obs": first_obs, "first_action": first_action}


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


# --------------------------------------------------------------------------------------------- saving and loading

POLICY_FORMAT, CHECKPOINT_FORMAT = "policy/1", "sac-checkpoint/2"


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
        "algorithm": "sac",
        "action_low": bounds.low.tolist(),
        "action_high": bounds.high.tolist(),
    }
    data |= {"obs_dim": env.observation_space.shape[0], "action_dim": bounds.shape[0]}
    settings = ("env_id", "env_kwargs", "max_episode_steps", *POLICY_SHAPE[2:])
    data |= {name: getattr(args, name) for name in settings}
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


def compile_functions(functions: dict[str, Callable], inputs: dict[str, tuple]) -> dict[str, Callable] | None:
    """The functions, made C++ by torch.compile for inputs of these shapes; None, and a warning, if one can't be.

    They must change nothing, since each is called once.
    """
    import torch._dynamo.config

    torch._dynamo.config.trace_autograd_ops = True  # the gradients belong to what is compiled
    # No processes of its own; no header for later runs, which costs more than it saves.
    options = {"cpp_wrapper": True, "compile_threads": 1, "cpp_cache_precompile_headers": False}
    compiled = {
        name: torch.compile(function, fullgraph=True, dynamic=False, options=options)
        for name, function in functions.items()
    }
    # Ctrl-C waits: the C++ compiler, which would get it too, would end, and the run go on with other rounding.
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        # A folder that other runs share may hold what a killed one left, or what another processor needs.
        with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.dict(os.environ):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
            for name, function in compiled.items():
                function(*inputs[name])
    except Exception as error:  # no compiler, no room for its files, an operation that it does not know
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line for line in lines if "error:" in line), lines[0])[:300]
        hint = "it needs a C++ compiler and Python's headers (Debian, Ubuntu: apt-get install g++ python3-dev)"
        hint += "; --compile never trains without"
        print(f"warning: not compiled, and slower ({reason}); {hint}", file=sys.stderr)
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    return compiled


class CudaGraph:
    """A function without arguments: called as it is a few times, then captured and replayed as one CUDA graph.

    A replay launches all its kernels at once. It reads and writes the same tensors as the call that was captured, so
    whatever changes from one call to the next must be in a tensor that stays where it is.
    """

    EAGER_CALLS = 3  # in which optimisers and libraries allocate what they keep

    def __init__(self, function: Callable, generator: torch.Generator, stream: torch.cuda.Stream):
        """generator: the one that the function draws from; stream: where it runs until it is captured."""
        self.function, self.generator, self.stream = function, generator, stream
        self.calls, self.graph = 0, None

    def __call__(self):
        """What the function returned; after the capture always the same tensors, filled anew."""
        self.calls += 1
        if self.calls <= self.EAGER_CALLS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.function()
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.graph.register_generator_state(self.generator)
            try:
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.result = self.function()
            except RuntimeError as error:
                first_error = error.__context__ or error  # the end of a broken capture fails too
                reason = " ".join(str(first_error).split())[:200]
                raise RunError(f"no CUDA graph of the update ({reason}); --no-cuda-graph trains without") from None
        self.graph.replay()
        return self.result


def set_up_torch(args: Args) -> torch.device:
    """Threads, device and precision of matrix products. Raises UserError for what this machine does not have."""
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError
        device = torch.zeros(1, device=device).device  # with its number
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device}: not on this machine; take auto, cpu, cuda or cuda:N") from None

    cpu = torch.cpu.get_capabilities()
    has_amx = cpu.get("amx_bf16", False)
    possible = {"exact": True, "bf16": device.type == "cpu" and has_amx, "tf32": device.type == "cuda"}
    if not possible[args.matmul_precision]:
        raise UserError(f"--matmul-precision {args.matmul_precision}: not on this {device.type}; take exact")
    if args.matmul_precision == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    # PyTorch hands float32 products to oneDNN, not to MKL, where bfloat16 is allowed. Without AMX oneDNN makes no use
    # of that permission and stays in float32, on AMD 1.3 to 1.6 times as fast as MKL.
    if args.matmul_precision == "bf16" or (cpu.get("cpu_name", "").startswith("AMD") and not has_amx):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    return device


class StopSignal:
    """The first Ctrl-C or SIGTERM asks the loop to save and end; a second one ends the process at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.number:
            os._exit(128 + number)
        self.number = number


def check_finite(step: int, **quantities) -> None:
    """Raises RunError if a number, array or tensor among the quantities has a NaN or an infinity."""
    for name, value in quantities.items():
        value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        if not np.isfinite(value).all():
            raise RunError(f"stopped at step {step}: {name} became NaN or infinite")


def mean_of(value: torch.Tensor | float) -> float:
    return torch.as_tensor(value, dtype=torch.float32).mean().item()


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
    """progress.csv, TensorBoard and the progress bar of a run, from its first step or from the one it resumes at."""

    def __init__(self, args: Args, run_dir: Path, step: int, saved: dict | None):
        saved = saved or {"episodes": 0, "wall_time_s": 0.0, "train_returns": [], "train_lengths": []}
        self.episodes, self.returns, self.lengths = saved["episodes"], saved["train_returns"], saved["train_lengths"]
        self.started = time.perf_counter() - saved["wall_time_s"]
        self.csv_path = run_dir / "progress.csv"
        cut_rows(self.csv_path, step)
        self.tensorboard = SummaryWriter(str(run_dir), purge_step=step + 1)
        log_settings(args, self.tensorboard)
        interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file gets a line now and then
        self.bar = tqdm(total=args.total_steps, initial=step, unit="step", dynamic_ncols=True, mininterval=interval)
        self.shown = {}
        self.row_step, self.row_time = step, time.perf_counter()

    def episode(self, step: int, episode_return: float, length: int) -> None:
        self.episodes += 1
        self.returns.append(episode_return)
        self.lengths.append(length)
        self.show(train_return=f"{episode_return:.1f}")
        self.scalars("train", {"return": episode_return, "length": length}, step)

    def learning(self, step: int, agent: Agent, metrics: dict) -> None:
        """What a person debugs with, of the last update."""
        self.scalars("learning", metrics | agent.gradient_norms(), step)
        if metrics:
            self.scalars("learning", {"q_values_std": metrics["q_values"].std()}, step)
        if agent.learned_temperature:
            self.scalars("learning", {"target_entropy": agent.target_entropy}, step)
        self.scalars("speed", {"steps_per_s": self.steps_per_s(step)}, step)

    def evaluation(self, step: int, result: dict, metrics: dict, q_mean: float, steps_per_s: float) -> None:
        """Writes a row of progress.csv. result is what evaluate returned, metrics the last update's."""
        row = {
            "step": step,
            "wall_time_s": time.perf_counter() - self.started,
            "eval_return_mean": result["returns"].mean(),
            "eval_return_std": result["returns"].std(),
            "eval_length_mean": result["lengths"].mean(),
            "train_return_mean": np.mean(self.returns) if self.returns else math.nan,
            "train_length_mean": np.mean(self.lengths) if self.lengths else math.nan,
            "episodes": self.episodes,
        }
        for name in ("critic_loss", "actor_loss", "q_values", "entropy", "temperature"):
            row[name] = mean_of(metrics.get(name, math.nan))
        row["eval_q_mean"] = q_mean
        row["eval_discounted_return_mean"] = result["discounted_returns"].mean()
        row["steps_per_s"] = steps_per_s
        with open(self.csv_path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow({name: value if isinstance(value, int) else f"{value:.8g}" for name, value in row.items()})
            file.flush()
            os.fsync(file.fileno())  # a checkpoint may not outlive the rows before it
        self.scalars("evaluation", row, step)
        self.show(eval_return=f"{row['eval_return_mean']:.1f}")
        self.returns, self.lengths = [], []
        self.row_step, self.row_time = step, time.perf_counter()

    def video(self, step: int, frames: list[np.ndarray]) -> None:
        """Every fourth frame at half size as a GIF, which TensorBoard plays among its images."""
        images = [Image.fromarray(frame).reduce(2) for frame in frames[::4]]
        gif = io.BytesIO()
        images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=80, loop=0)
        width, height = images[0].size
        image = Summary.Image(encoded_image_string=gif.getvalue(), height=height, width=width, colorspace=3)
        summary = Summary(value=[Summary.Value(tag="evaluation/video", image=image)])
        self.tensorboard.file_writer.add_summary(summary, step)

    def steps_per_s(self, step: int) -> float:
        """Of training alone: since the end of the last evaluation."""
        return (step - self.row_step) / (time.perf_counter() - self.row_time)

    def scalars(self, group: str, values: dict, step: int) -> None:
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{group}/{name}", mean_of(value), step)

    def show(self, **shown: str) -> None:
        self.shown |= shown
        self.bar.set_postfix(self.shown, refresh=False)

    def checkpoint(self) -> dict:
        wall_time_s = time.perf_counter() - self.started
        returns = {"train_returns": self.returns, "train_lengths": self.lengths}
        return {"episodes": self.episodes, "wall_time_s": wall_time_s, **returns}

    def close(self) -> None:
        self.bar.close()
        self.tensorboard.close()


def train(args: Args) -> int:
    """One run, from its first step or from its checkpoint to its last. Returns the exit code."""
    stop = StopSignal()
    device = set_up_torch(args)
    can_compile = device.type == "cpu" and os.name == "posix"
    if args.compile == "always" and not can_compile and not args.resume:
        raise UserError(f"--compile always: needs a CPU under Linux or macOS, this is {device}; leave it out")
    wanted = args.compile == "always" or (args.compile == "auto" and args.total_steps >= 100_000)
    args = dataclasses.replace(args, compile="always" if wanted and can_compile else "never")
    env = TrainingEnv(args)
    eval_envs = [make_env(args) for _ in range(args.eval_episodes)]
    obs_dim, action_dim = env.env.observation_space.shape[0], env.env.action_space.shape[0]
    torch.manual_seed(args.seed)  # initial weights; everything random after them has a stream of its own
    try:
        agent = Agent(args, obs_dim, action_dim, device)
        buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim, device)
    except RuntimeError:
        sizes = ", ".join(
            f"{flag(name)} {getattr(args, name)}" for name in ("buffer_size", "hidden_size", "num_critics")
        )
        raise UserError(f"{sizes}: do not fit into memory together; take smaller ones") from None

    if args.capture_video:
        make_drawn_env(args).close()
    run_dir, lock = open_run_dir(args)
    continue_with = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
    first_step, saved_log = 0, None
    checkpoint = load_checkpoint(run_dir) if args.resume else None
    arithmetic = f"--device {device} with {torch.get_num_threads()} threads{', compiled' * agent.compiled}"
    if checkpoint:
        if checkpoint.get("arithmetic") != arithmetic:
            change = f"{checkpoint.get('arithmetic')} before, {arithmetic} now"
            print(f"warning: {change}: results will differ in the last bits", file=sys.stderr)
        try:
            first_step, saved_log = checkpoint["step"], checkpoint["log"]
            for name, part in (("env", env), ("agent", agent), ("buffer", buffer)):
                part.load_checkpoint(checkpoint.pop(name))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--resume {run_dir}: its checkpoint does not fit its args.json ({reason})") from None
    if first_step >= args.total_steps:
        more = "" if args.lr_schedule == "linear" else "; a larger --total-steps continues it"
        print(f"{run_dir} is finished: {first_step} steps{more}")
        return 0
    args = dataclasses.replace(args, run_dir=str(run_dir), resume=None, device=str(device))
    write_args(args, run_dir)
    log = RunLog(args, run_dir, first_step, saved_log)
    metrics = {}

    try:
        for step in range(first_step, args.total_steps):
            obs = env.obs
            action = agent.random_action() if step < args.random_steps else agent.act(obs)
            if not np.isfinite(action).all():
                check_finite(step, observation=obs, **metrics)  # what broke the actor is named before the action
            next_obs, reward, terminated, truncated = env.step(action)
            check_finite(step, action=action, reward=reward, observation=next_obs)
            buffer.add(obs, action, reward, next_obs, terminated)
            if terminated or truncated:
                log.episode(step + 1, env.episode_return, len(env.actions))
                env.reset()
            if step >= args.learning_starts:
                metrics = agent.update(buffer, step / args.total_steps)
            log.bar.update()

            done = step + 1
            last = done == args.total_steps
            if done % args.log_every == 0:
                check_finite(step, **metrics)
                log.learning(done, agent, metrics)
            if done % args.eval_every == 0 or last:
                check_finite(step, **metrics, **dict(agent.named_parameters()))
                steps_per_s = log.steps_per_s(done)
                result = evaluate(agent.actor, eval_envs, args.gamma)
                q_mean = agent.q_mean(result["first_obs"], result["first_action"])
                log.evaluation(done, result, metrics, q_mean, steps_per_s)
                save_policy(agent.actor, args, eval_envs[0], run_dir / "policy.pt")
                if args.capture_video and (done // args.eval_every % args.video_every == 0 or last):
                    log.video(done, record_video(agent.actor, args, run_dir / "videos", f"step{done}"))
            if done % args.checkpoint_every == 0 or last or stop.number:
                check_finite(step, **metrics, **dict(agent.named_parameters()))
                parts = {"env": env.checkpoint(), "agent": agent.checkpoint(), "buffer": buffer.checkpoint()}
                parts |= {"step": done, "log": log.checkpoint(), "arithmetic": arithmetic}
                with replacing(run_dir / "checkpoint.pt", keep_previous=True) as file:
                    torch.save({"format": CHECKPOINT_FORMAT, **parts}, file)
            if stop.number and not last:
                log.close()
                print(f"stopped at step {done}, everything is saved; continue with\n  {continue_with}")
                return 128 + stop.number
    except torch.OutOfMemoryError:
        raise RunError(f"stopped: --device {device} has no memory left for --batch-size {args.batch_size}") from None
    except OSError as error:
        reason = f"{run_dir}: stopped by the system ({error.strerror or error})"
        raise RunError(f"{reason}; mend that, then continue from the last checkpoint: {continue_with}") from None
    except RunError as error:
        raise RunError(f"{error}; rows, policy and checkpoint from before are in {run_dir}") from None
    finally:
        log.close()
        lock.release()
    print(f"evaluation return {result['returns'].mean():.1f} +- {result['returns'].std():.1f} after {done} steps")
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
    args = dataclasses.replace(args, squash=policy["squash"])
    envs = [make_env(args) for _ in range(args.eval_episodes)]
    sizes = {"obs_dim": envs[0].observation_space.shape[0], "action_dim": envs[0].action_space.shape[0]}
    for name, size in sizes.items():
        if policy[name] != size:
            raise UserError(f"{args.evaluate}: its {name} is {policy[name]}, that of {args.env_id} is {size}")
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
