"""Behavioural cloning (BC) for continuous control, in one file: a Gaussian policy fitted to demonstrations.

    python bc.py --env-id Hopper-v4

Pomerleau 1991, "Efficient Training of Artificial Neural Networks for Autonomous Navigation". Why a clone drifts from
its demonstrations: Ross, Gordon and Bagnell 2011, arXiv:1011.0686, whose remedy is dagger.py.
Writes runs/ENV__EXP__SEED__TIME: args.json, progress.csv, policy.pt, TensorBoard's events, videos/*.mp4.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro
from gymnasium.utils.save_video import save_video
from tensorboardX import SummaryWriter
from torch import nn
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium environment: flat Box observations, bounded Box actions
    env_kwargs: str = "{}"  # JSON for gym.make, as '{"use_contact_forces": true}' for Ant-v4
    max_episode_steps: int | None = None  # replaces the environment's own limit
    seed: int = 1  # seeds everything; the same seed on the same machine gives the same bytes
    exp_name: str = "bc"  # name of the experiment, part of the run folder's name
    run_dir: str | None = None  # run folder (default: runs/ENV__EXP__SEED__TIME)
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    torch_threads: int = 0  # CPU threads for PyTorch; 0 leaves its default

    expert_data: str | None = None  # demonstrations, a .npz (default: the expert makes them)
    expert: str | None = None  # policy.pt or run folder of the expert (default without --expert-data: experts/ENV.pt)
    num_trajectories: int | None = None  # demonstrated episodes to use (default: all; 2 where the expert makes them)
    validation_fraction: float = 0.1  # held out for the validation loss: whole episodes if it makes one, else steps

    train_steps: int = 5_000  # gradient steps
    batch_size: int = 256  # demonstrated steps in a batch, drawn without replacement
    learning_rate: float = 1e-3  # Adam's
    loss: Literal["nll", "mse"] = "nll"  # negative log-likelihood, or squared error of the mean action
    hidden_size: int = 256  # units of a hidden layer
    num_layers: int = 3  # hidden layers
    activation: Literal["relu", "tanh", "leaky-relu", "selu", "silu"] = "relu"  # non-linearity of the hidden layers

    eval_every: int = 500  # gradient steps between evaluations; the last step is always evaluated
    eval_episodes: int = 10  # episodes of an evaluation, for the mean action and for sampled actions each
    log_every: int = 100  # gradient steps between TensorBoard points
    capture_video: bool = False  # record an evaluation episode as mp4
    video_every: int = 10  # evaluations between recordings; the last one is always recorded


# ------------------------------------------------------------------------------------------------------------ network
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "leaky-relu": nn.LeakyReLU, "selu": nn.SELU, "silu": nn.SiLU}


class Actor(nn.Module):
    """Gaussian policy, squashed by tanh into [-1, 1]^action_dim if args.squash is set, as experts of SAC are."""

    def __init__(self, obs_dim: int, action_dim: int, args: SimpleNamespace):
        super().__init__()
        layers = []
        for fan_in, fan_out in itertools.pairwise([obs_dim, *[args.hidden_size] * args.num_layers]):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[args.activation]()]
        self.std_from_net = args.actor_std == "state"
        self.to_action = nn.Tanh() if args.squash else nn.Identity()
        self.net = nn.Sequential(*layers, nn.Linear(args.hidden_size, action_dim * (2 if self.std_from_net else 1)))
        if args.actor_std == "shared":
            self.log_std = nn.Parameter(torch.zeros(action_dim))
        elif args.actor_std != "state":
            self.register_buffer("log_std", torch.full((action_dim,), math.log(args.actor_std)))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """obs (batch, obs_dim) -> mean and log_std of the Gaussian before the tanh, each (batch, action_dim)."""
        out = self.net(obs)
        mean, log_std = out.chunk(2, dim=-1) if self.std_from_net else (out, self.log_std.expand_as(out))
        return mean, log_std.clamp(-20, 2)  # as in the SAC papers' own code

    def mean_action(self, obs: torch.Tensor) -> torch.Tensor:
        """The deterministic policy that evaluations follow. Returns (batch, action_dim)."""
        return self.to_action(self(obs)[0])

    def sample(self, obs: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
        """Sampled actions (batch, action_dim)."""
        mean, log_std = self(obs)
        return self.to_action(mean + log_std.exp() * torch.randn(mean.shape, generator=noise))


# ------------------------------------------------------------------------------------------------------------- losses
# Functions of the policy's mean and log_std and of the demonstrated action, (batch, action_dim) each; scalars.
def nll_loss(mean: torch.Tensor, log_std: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """E[-log pi(a|s)], the negative log-likelihood of a diagonal Gaussian, summed over the action's dimensions."""
    noise = (action - mean) * (-log_std).exp()
    return (0.5 * noise.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1).mean()


def mse_loss(mean: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """E[|a - mean|^2], summed over the action's dimensions."""
    return (action - mean).square().sum(-1).mean()


def bc_loss(actor: Actor, obs: torch.Tensor, action: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what to differentiate and what to report. With mse the deviation alone is fitted by likelihood."""
    mean, log_std = actor(obs)
    if kind == "nll":
        loss = nll_loss(mean, log_std, action)
        return loss, loss.detach()
    loss = mse_loss(mean, action)
    return loss + nll_loss(mean.detach(), log_std, action), loss.detach()


# ----------------------------------------------------------------------------------------------------- demonstrations
# Arrays, episodes in a row: observations (N, obs_dim) and actions (N, action_dim) float32, rewards (N,) float32,
# terminations and truncations (N,) bool, either of which ends an episode. In files actions are in the environment's own
# units, in memory they are scaled as the network's: [-1, 1] spans the bounds.
FIELDS = {"observations": "f4", "actions": "f4", "rewards": "f4", "terminations": "?", "truncations": "?"}
DEMONSTRATIONS, SPLIT, BATCHES, EVALUATION = range(4)


def stream(*key: int) -> torch.Generator:
    """A random stream for each purpose, so that none shifts another. key: the purpose, what counts in it, the seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def load_demonstrations(args: Args, env: gym.Env) -> dict[str, np.ndarray]:
    """The first --num-trajectories episodes of --expert-data."""
    with one_line(args.expert_data), np.errstate(over="ignore"), zipfile.ZipFile(args.expert_data) as archive:
        if sum(info.file_size for info in archive.infolist()) > 2**34:  # which a small file can hide
            raise ValueError("unpacks to more than 16 GiB")
        with np.load(args.expert_data, allow_pickle=False) as file:
            data, env_id = {name: file[name].astype(dtype) for name, dtype in FIELDS.items()}, str(file["env_id"])
        shapes = [array.shape for array in data.values()]
        length = len(data["rewards"])
        needed = [(length, env.spaces["obs_dim"]), (length, env.spaces["action_dim"]), *[(length,)] * 3]
        if env_id != args.env_id or shapes != needed:
            raise ValueError(f"of {env_id} with shapes {shapes}; {args.env_id} needs {needed}")
        data["truncations"][-1:] |= ~data["terminations"][-1:]  # an episode may be cut off there
        ends = (np.flatnonzero(data["terminations"] | data["truncations"]) + 1)[: args.num_trajectories]
        if len(ends) < (args.num_trajectories or 1):
            raise ValueError(f"it has {len(ends)} episodes, not {args.num_trajectories or 1}")
        for field in FIELDS:
            data[field] = data[field][: ends[-1]]
            if not np.isfinite(data[field]).all():
                raise ValueError(f"NaN or infinity in its {field}")
    low, high = np.float32(env.spaces["action_low"]), np.float32(env.spaces["action_high"])
    data["actions"] = (data["actions"] - (low + high) / 2) / ((high - low) / 2)
    return data


def split(data: dict[str, np.ndarray], fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows held out, whole episodes if the fraction makes one, since neighbouring steps are alike; and the others."""
    ends = torch.from_numpy(data["terminations"] | data["truncations"])
    episode = ends.cumsum(0) - ends.int()  # (N,) the number of each row's episode
    num_episodes = int(episode[-1]) + 1
    if int(fraction * num_episodes):
        chosen = torch.randperm(num_episodes, generator=stream(SPLIT, seed))[: int(fraction * num_episodes)]
        is_held_out = torch.isin(episode, chosen)
        return is_held_out.nonzero().flatten(), is_held_out.logical_not().nonzero().flatten()
    return torch.randperm(len(ends), generator=stream(SPLIT, seed)).tensor_split([int(fraction * len(ends))])


def batches(rows: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Batch after batch (batch_size,) of the rows: each pass is in a new order, and drops what is left over."""
    for i in itertools.count():
        order = torch.randperm(len(rows), generator=stream(BATCHES, i, seed))
        yield from rows[order].split(batch_size)[: len(rows) // batch_size]


# ----------------------------------------------------------------------------------------------------------- training
def train(args: Args) -> None:
    env = make_env(args)
    torch.manual_seed(args.seed)  # initial weights; everything random after them has a stream of its own
    shape = SimpleNamespace(**vars(args), actor_std="shared", squash=False)
    with one_line(f"--device {args.device} --hidden-size {args.hidden_size}"):
        learner = Actor(env.spaces["obs_dim"], env.spaces["action_dim"], shape).to(args.device)
    path = Path(args.expert or Path(__file__).with_name("experts") / f"{args.env_id}.pt")
    expert = load_policy(path, args, env) if args.expert or not args.expert_data else None
    if args.expert_data:
        data = load_demonstrations(args, env)
    else:
        chance = stream(DEMONSTRATIONS, args.seed)
        seeds = torch.randint(2**31, (args.num_trajectories or 2,), generator=chance).tolist()
        episodes = [rollout(expert.mean_action, env, seed) for seed in seeds]
        data = {field: np.concatenate([episode[field] for episode in episodes]) for field in FIELDS}
    held_out, training = (rows.to(args.device) for rows in split(data, args.validation_fraction, args.seed))
    if args.batch_size > len(training):
        raise Failure(2, f"--batch-size {args.batch_size}: there are only {len(training)} steps to train on")
    obs, action = (torch.from_numpy(data[field]) for field in ("observations", "actions"))
    mean, std = obs.mean(0), obs.std(0, correction=0).clamp(min=1e-2)  # the learner sees (obs - mean) / std
    obs, action = ((obs - mean) / std).to(args.device), action.to(args.device)
    optimizer = torch.optim.Adam(learner.parameters(), args.learning_rate, fused=True)
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or Path("runs", name.replace("/", "_").replace(":", "_")))
    with one_line("--run-dir"):
        run_dir.mkdir(parents=True)
    save(run_dir / "args.json", json.dumps(vars(args) | {"run_dir": str(run_dir)}, indent=2) + "\n")
    began, rows, losses, indices = time.perf_counter(), [], [], batches(training, args.batch_size, args.seed)
    bar = tqdm(total=args.train_steps, desc="evaluating", dynamic_ncols=True, miniters=1, mininterval=1)
    with bar, SummaryWriter(str(run_dir)) as tensorboard:
        expert_return = data["rewards"].sum().item() / (data["terminations"] | data["truncations"]).sum()
        if expert:
            expert_return = evaluate(expert, env, args.eval_episodes)["return_mean"]
        for step, index in enumerate(itertools.islice(indices, args.train_steps), start=1):
            loss, reported = bc_loss(learner, obs[index], action[index], args.loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(reported)
            bar.set_description("training", refresh=False)
            bar.update()
            last = step == args.train_steps
            if step % args.log_every == 0 or step % args.eval_every == 0 or last:
                norm = nn.utils.get_total_norm(learner.parameters())
                log(tensorboard, "learning", {"loss": reported, "weight_norm": norm}, step)
            if step % args.eval_every == 0 or last:
                bar.set_description("evaluating")
                validation_loss = bc_loss(learner, obs[held_out], action[held_out], args.loss)[1]
                actor = copy.deepcopy(learner).cpu().requires_grad_(False)
                actor.net[0].weight /= std  # its first layer standardises: it takes observations as they come
                actor.net[0].bias -= actor.net[0].weight @ mean
                result = evaluate(actor, env, args.eval_episodes)
                sampled = evaluate(actor, env, args.eval_episodes, stream(EVALUATION, args.seed))
                row = {"step": step, "wall_time_s": time.perf_counter() - began}
                row |= {f"eval_{name}": value for name, value in result.items()}
                row["train_loss"] = torch.stack(losses).mean().item()
                row["validation_loss"] = validation_loss.item() if len(held_out) else math.nan  # this NaN is not logged
                row |= {f"eval_sampled_{name}": sampled[name] for name in ("return_mean", "return_std")}
                row["expert_return_mean"] = expert_return
                rows.append(row)
                losses = []
                log(tensorboard, "evaluation", {name: row[name] for name in row if row[name] is not math.nan}, step)
                table = [row.keys(), *(past.values() for past in rows)]
                save(run_dir / "progress.csv", "".join(",".join(map(str, line)) + "\n" for line in table))
                policy = {"format": POLICY, "algorithm": "bc"} | {name: vars(shape)[name] for name in POLICY_SETTINGS}
                policy["state_dict"] = actor.state_dict()
                save(run_dir / "policy.pt", policy | env.spaces)
                bar.set_postfix(eval=row["eval_return_mean"], expert=expert_return)
                if args.capture_video and (step // args.eval_every % args.video_every == 0 or last):
                    bar.set_description("recording")
                    record(actor, args, run_dir / "videos", f"step{step}", tensorboard, step)
    print(f"{run_dir} finished: evaluation return {row['eval_return_mean']:.1f}, the expert's {expert_return:.1f}")
    print(f"  curves      python {Path(sys.argv[0]).parent}/benchmark/plot.py {run_dir} --out {run_dir}/curves.png")
    print(f"  TensorBoard tensorboard --logdir {run_dir}")
    print(f"  policy      python {Path(sys.argv[0]).parent}/sac_continuous.py --evaluate {run_dir}")


def log(tensorboard: SummaryWriter, group: str, values: dict, step: int) -> None:
    """Into TensorBoard. A NaN or an infinity among the values ends the run."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise Failure(1, f"step {step}: {name} became NaN or infinite; what was saved before is whole")
        tensorboard.add_scalar(f"{group}/{name}", float(value), step)


# ---------------------------------------------------------------------------------------- environment and evaluation
def make_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The environment with actions in [-1, 1]^action_dim, rescaled to its own bounds."""
    gym.logger.min_level = gym.logger.ERROR  # no advice to take another version than the one asked for
    mujoco.set_mju_user_warning(lambda message: None)  # nor MuJoCo's remarks, which would go to a file too
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # the way to draw without a display
    with one_line(f"--env-id {args.env_id} --env-kwargs {args.env_kwargs}"):
        drawn = {"render_mode": render_mode} if render_mode else {}
        env = gym.make(args.env_id, args.max_episode_steps, **drawn, **json.loads(args.env_kwargs))
        obs_space, space = env.observation_space, env.action_space
        flat = all(isinstance(box, gym.spaces.Box) and len(box.shape) == 1 for box in (obs_space, space))
        if not flat or space.dtype.kind != "f" or not space.is_bounded() or not (space.low < space.high).all():
            raise TypeError(f"needs flat Box observations, has {obs_space}; flat bounded Box actions, has {space}")
        if env.spec.max_episode_steps is None:
            raise ValueError("it has no time limit, so that an episode may last for ever: give --max-episode-steps")
        if renderer := getattr(env.unwrapped, "mujoco_renderer", None):  # the camera follows the robot
            follow = {"type": mujoco.mjtCamera.mjCAMERA_TRACKING, "trackbodyid": 1, "elevation": -15, "distance": 3}
            renderer.camera_id, renderer.default_cam_config = None, (renderer.default_cam_config or {}) | follow
        env = gym.wrappers.TransformAction(env, lambda action: np.clip(action, space.low, space.high), space)
        env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        if not render_mode:
            env.reset()  # where an environment meets what is wrong with its settings
        env.spaces = {"obs_dim": obs_space.shape[0], "action_dim": space.shape[0]}
        env.spaces |= {"action_low": space.low.tolist(), "action_high": space.high.tolist()}
        return env


@torch.no_grad()
def rollout(act: Callable[[torch.Tensor], torch.Tensor], env: gym.Env, seed: int) -> dict[str, np.ndarray]:
    """An episode in the form of demonstrations. act: obs (1, obs_dim) -> action (1, action_dim), on the CPU."""
    env.unwrapped.action_space.seed(seed)  # an environment may sample from it
    obs, _ = env.reset(seed=seed)
    steps, over = [], False
    while not over:
        obs = np.array(obs, dtype=np.float32)  # a copy: an environment may return the same array from every step
        action = act(torch.from_numpy(obs)[None]).numpy()[0]
        next_obs, reward, terminated, truncated, _ = env.step(action)
        steps.append((obs, action, np.float32(np.asarray(reward).item()), terminated, truncated))
        obs, over = next_obs, terminated or truncated
    return {field: np.array(values) for field, values in zip(FIELDS, zip(*steps, strict=True), strict=True)}


def evaluate(actor: Actor, env: gym.Env, num_episodes: int, noise: torch.Generator | None = None) -> dict[str, float]:
    """Episodes of the mean action, or with noise of sampled ones, from the same states each time, on the CPU."""
    act = (lambda obs: actor.sample(obs, noise)) if noise else actor.mean_action
    rewards = [rollout(act, env, 1_000 + i)["rewards"] for i in range(num_episodes)]
    returns = [of_one.sum(dtype=np.float64) for of_one in rewards]
    length = np.mean([len(of_one) for of_one in rewards]).item()
    return {"return_mean": np.mean(returns).item(), "return_std": np.std(returns).item(), "length_mean": length}


def record(actor: Actor, args: Args, folder: Path, name: str, tensorboard: SummaryWriter, step: int) -> None:
    """The first evaluation episode as folder/NAME-episode-0.mp4, and every fourth frame of it in TensorBoard."""
    env = make_env(args, "rgb_array_list")
    evaluate(actor, env, num_episodes=1)
    frames = env.render()
    save_video(frames, str(folder), fps=env.metadata.get("render_fps", 30), name_prefix=name)
    video = np.stack(frames[::4])[:, ::2, ::2].transpose(0, 3, 1, 2)  # (frames, 3, height / 2, width / 2)
    tensorboard.add_video("evaluation/video", video[None], step, fps=8)


# -------------------------------------------------------------------------------------------------------------- files
POLICY = "policy/1"
POLICY_SETTINGS = "env_id env_kwargs max_episode_steps hidden_size num_layers activation actor_std squash".split()


def save(path: Path, content: dict | str) -> None:
    """The file is whole at any moment: written beside, brought to the disk, put in its place."""
    beside = path.with_name(path.name + ".tmp")
    with one_line(path, exit_code=1), open(beside, "wb") as file:
        torch.save(content, file) if isinstance(content, dict) else file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_policy(path: Path, args: Args, env: gym.Env) -> Actor:
    """The network of a policy.pt or run folder, which must be for this environment. Runs no code from the file."""
    path = path / "policy.pt" if path.is_dir() else path
    with one_line(f"--expert {path}"), zipfile.ZipFile(path) as archive:
        policy = torch.load(path, map_location="cpu", weights_only=True)
        needed = {"format": POLICY, "env_id": args.env_id, **env.spaces}
        if archive.testzip() or any(policy[name] != value for name, value in needed.items()):
            raise ValueError(f"it is damaged, or not a policy for {needed}")  # torch.load takes a flipped byte
        actor = Actor(policy["obs_dim"], policy["action_dim"], SimpleNamespace(**policy))
        actor.load_state_dict(policy["state_dict"])
        if not all(value.isfinite().all() for value in actor.state_dict().values()):
            raise ValueError("its weights are NaN or infinite")
        return actor.requires_grad_(False)


# ------------------------------------------------------------------------------------------------------- command line
RULES = [
    "min(train_steps, batch_size, hidden_size, num_layers, eval_every, eval_episodes, log_every, video_every) >= 1",
    "num_trajectories is None or num_trajectories >= 1",
    "0 <= seed < 2**63 and 0 <= torch_threads <= 1024",
    "device.split(':')[0] in ('cpu', 'cuda')",
    "0 < learning_rate < math.inf and 0 <= validation_fraction < 1",
    "video_every == 10 or capture_video",
    "'' not in (expert_data, expert, run_dir, exp_name)",
]


class Failure(BaseException):
    """Ends the program with an exit code (2: bad input, 1: the run itself broke) and one line: its two arguments."""


@contextlib.contextmanager
def one_line(what: object, exit_code: int = 2):
    """Whatever goes wrong inside, in a library or a file, becomes a Failure with its message."""
    try:
        yield
    except Exception as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch.save hides a full disk
        raise Failure(exit_code, f"{what}: {str(cause) or type(cause).__name__}") from error


def main(argv: list[str] | None = None) -> int:
    sys.path.append(os.getcwd())  # --env-id module:Env-v0 finds a module there
    try:
        args = tyro.cli(Args, args=argv)
        args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
        args.torch_threads = args.torch_threads or torch.get_num_threads()
        for rule in RULES:
            if not eval(rule, globals(), vars(args)):
                names = compile(rule, "rule", "eval").co_names
                given = [f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name in names]
                raise Failure(2, f"{' '.join(given)}: it must hold that {rule}")
        torch.set_num_threads(args.torch_threads)
        cpu = torch.cpu.get_capabilities()
        if args.device == "cpu" and cpu.get("cpu_name", "").startswith("AMD") and not cpu.get("amx_bf16"):
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # oneDNN, not MKL: faster; no bf16 without AMX
        if args.capture_video:
            with one_line("--capture-video"):
                (drawn := make_env(args, "rgb_array_list")).reset()
                np.float32(drawn.render()).transpose(0, 3, 1, 2)  # a frame can be drawn, and is one
        train(args)
        return 0
    except (Failure, OSError) as error:
        exit_code, message = error.args if isinstance(error, Failure) else (1, str(error))
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
