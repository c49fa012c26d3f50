"""DAgger for continuous control, in one file: behavioural cloning, then expert labels on the learner's own states.

    python dagger.py --env-id Hopper-v4

Ross, Gordon and Bagnell 2011, "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online
Learning", arXiv:1011.0686, algorithm 3.1.
Iteration 0 here is the paper's i = 1. Unlike there, each iteration trains on from the last one's weights, and the last
policy is policy.pt, not the best on validation.
Writes runs/ENV__EXP__SEED__TIME: args.json, progress.csv (a row per iteration), policy.pt, policy_iteration_N.pt,
TensorBoard's events, videos/*.mp4.
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
    exp_name: str = "dagger"  # name of the experiment, part of the run folder's name
    run_dir: str | None = None  # run folder (default: runs/ENV__EXP__SEED__TIME)
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    torch_threads: int = 0  # CPU threads for PyTorch; 0 leaves its default

    expert_data: str | None = None  # demonstrations of the expert, a .npz (default: the expert makes them)
    expert: str | None = None  # policy.pt or run folder of the expert (default without --expert-data: experts/ENV.pt)
    num_trajectories: int | None = None  # demonstrated episodes to use (default: all; 2 where the expert makes them)

    num_iterations: int = 10  # the first clones the demonstrations, each later one rolls out the learner, then trains
    train_steps_per_iteration: int = 3_000  # gradient steps
    rollout_steps: int = 3_000  # environment steps of an iteration: whole episodes until there are at least so many
    expert_mixing: float = 0.0  # beta: in the rollouts of iteration i the expert acts with probability beta^i
    buffer_size: int = 1_000_000  # labelled steps the data set holds; the oldest leave first
    batch_size: int = 256  # labelled steps in a batch, drawn without replacement
    learning_rate: float = 3e-3  # Adam's
    lr_schedule: Literal["constant", "linear"] = "linear"  # linear: in each iteration it falls to zero again
    loss: Literal["nll", "mse"] = "mse"  # negative log-likelihood, or squared error of the mean action
    hidden_size: int = 256  # units of a hidden layer
    num_layers: int = 3  # hidden layers
    activation: Literal["relu", "tanh", "leaky-relu", "selu", "silu"] = "relu"  # non-linearity of the hidden layers

    eval_episodes: int = 10  # episodes of the evaluation after each iteration, of the mean action and of sampled ones
    log_every: int = 100  # gradient steps between TensorBoard points
    capture_video: bool = False  # record an evaluation episode as mp4
    video_every: int = 10  # iterations between recordings; the last one is always recorded


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
DEMONSTRATIONS, ROLLOUTS, NOISE, COINS, BATCHES, EVALUATION = range(6)


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


def batches(num_rows: int, batch_size: int, iteration: int, seed: int) -> Iterator[torch.Tensor]:
    """Batch after batch (batch_size,) of row numbers: each pass is in a new order, and drops what is left over."""
    for i in itertools.count():
        order = torch.randperm(num_rows, generator=stream(BATCHES, iteration, i, seed))
        yield from order.split(batch_size)[: num_rows // batch_size]


# ----------------------------------------------------------------------------------------------------------- training
def rollouts(actor: Actor, expert: Actor, env: gym.Env, args: Args, iteration: int) -> Iterator[dict[str, np.ndarray]]:
    """Whole episodes of the learner's sampled actions, until there are at least --rollout-steps of them.

    In each step the expert acts instead with probability beta_i: pi_i = beta_i pi* + (1 - beta_i) pi^_i of the
    paper's algorithm 3.1, beta_i = beta^i.
    """
    seeds, coins, noise = (stream(purpose, iteration, args.seed) for purpose in (ROLLOUTS, COINS, NOISE))
    beta, steps = args.expert_mixing**iteration, 0

    def mixture(obs: torch.Tensor) -> torch.Tensor:
        expert_acts = torch.rand(1, generator=coins) < beta
        return expert.mean_action(obs) if expert_acts else actor.sample(obs, noise)

    while steps < args.rollout_steps:
        episode = rollout(mixture, env, int(torch.randint(2**31, (1,), generator=seeds)))
        steps += len(episode["rewards"])
        yield episode


def train(args: Args) -> None:
    env = make_env(args)
    torch.manual_seed(args.seed)  # initial weights; everything random after them has a stream of its own
    shape = SimpleNamespace(**vars(args), actor_std="shared", squash=False)
    with one_line(f"--device {args.device} --hidden-size {args.hidden_size}"):
        learner = Actor(env.spaces["obs_dim"], env.spaces["action_dim"], shape).to(args.device)
    path = Path(args.expert or Path(__file__).with_name("experts") / f"{args.env_id}.pt")
    expert = load_policy(path, args, env)
    if args.expert_data:
        data = load_demonstrations(args, env)
    else:
        chance = stream(DEMONSTRATIONS, args.seed)
        seeds = torch.randint(2**31, (args.num_trajectories or 2,), generator=chance).tolist()
        episodes = [rollout(expert.mean_action, env, seed) for seed in seeds]
        data = {field: np.concatenate([episode[field] for episode in episodes]) for field in FIELDS}
    obs, action = (torch.from_numpy(data[field])[-args.buffer_size :] for field in ("observations", "actions"))
    if args.batch_size > len(obs):
        raise Failure(2, f"--batch-size {args.batch_size}: there are only {len(obs)} demonstrated steps")
    mean, std = obs.mean(0), obs.std(0, correction=0).clamp(min=1e-2)  # the learner sees (obs - mean) / std
    optimizer = torch.optim.Adam(learner.parameters(), args.learning_rate, fused=True)
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.run_dir or Path("runs", name.replace("/", "_").replace(":", "_")))
    with one_line("--run-dir"):
        run_dir.mkdir(parents=True)
    save(run_dir / "args.json", json.dumps(vars(args) | {"run_dir": str(run_dir)}, indent=2) + "\n")
    began, rows, step, env_steps, actor = time.perf_counter(), [], 0, 0, None
    total = args.num_iterations * args.train_steps_per_iteration
    bar = tqdm(total=total, desc="evaluating", dynamic_ncols=True, miniters=1, mininterval=1)
    with bar, SummaryWriter(str(run_dir)) as tensorboard:
        expert_return = evaluate(expert, env, args.eval_episodes)["return_mean"]
        for iteration in range(args.num_iterations):
            returns, losses = [], []
            bar.set_description("rolling out")
            for episode in rollouts(actor, expert, env, args, iteration) if iteration else ():
                new_obs = torch.from_numpy(episode["observations"])
                labels = expert.mean_action(new_obs)  # the expert is asked in each of the learner's states
                obs = torch.cat([obs, new_obs])[-args.buffer_size :]
                action = torch.cat([action, labels])[-args.buffer_size :]
                returns.append(episode["rewards"].sum(dtype=np.float64).item())
                env_steps += len(new_obs)
            bar.set_description("training")
            device_obs, device_action = ((obs - mean) / std).to(args.device), action.to(args.device)
            indices = batches(len(obs), args.batch_size, iteration, args.seed)
            for i, index in enumerate(itertools.islice(indices, args.train_steps_per_iteration)):
                loss, reported = bc_loss(learner, device_obs[index], device_action[index], args.loss)
                optimizer.zero_grad()
                loss.backward()
                if args.lr_schedule == "linear":
                    optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - i / args.train_steps_per_iteration)
                optimizer.step()
                losses.append(reported)
                step += 1
                bar.update()
                if step % args.log_every == 0:
                    log(tensorboard, "learning", {"loss": reported}, step)

            actor = copy.deepcopy(learner).cpu().requires_grad_(False)
            actor.net[0].weight /= std  # its first layer standardises: it takes observations as they come
            actor.net[0].bias -= actor.net[0].weight @ mean
            bar.set_description("evaluating")
            log(tensorboard, "learning", {"weight_norm": nn.utils.get_total_norm(learner.parameters())}, step)
            result = evaluate(actor, env, args.eval_episodes)
            sampled = evaluate(actor, env, args.eval_episodes, stream(EVALUATION, args.seed))
            row = {"step": step, "wall_time_s": time.perf_counter() - began}
            row |= {f"eval_{name}": value for name, value in result.items()}
            row |= {"iteration": iteration, "env_steps": env_steps, "expert_queries": env_steps}
            row["train_return_mean"] = np.mean(returns).item() if returns else math.nan  # this NaN is not logged
            row["train_return_std"] = np.std(returns).item() if returns else math.nan
            row["train_loss"] = torch.stack(losses).mean().item()
            row |= {f"eval_sampled_{name}": sampled[name] for name in ("return_mean", "return_std")}
            row["expert_return_mean"] = expert_return
            rows.append(row)
            log(tensorboard, "evaluation", {name: row[name] for name in row if row[name] is not math.nan}, step)
            table = [row.keys(), *(past.values() for past in rows)]
            save(run_dir / "progress.csv", "".join(",".join(map(str, line)) + "\n" for line in table))
            policy = {"format": POLICY, "algorithm": "dagger"} | {name: vars(shape)[name] for name in POLICY_SETTINGS}
            policy["state_dict"] = actor.state_dict()
            for name in (f"policy_iteration_{iteration}.pt", "policy.pt"):
                save(run_dir / name, policy | env.spaces)
            bar.set_postfix(eval=row["eval_return_mean"], expert=expert_return)
            if args.capture_video and ((iteration + 1) % args.video_every == 0 or step == total):
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
    "min(train_steps_per_iteration, rollout_steps, batch_size, hidden_size, num_layers) >= 1",
    "min(eval_episodes, log_every, video_every) >= 1",
    "num_trajectories is None or num_trajectories >= 1",
    "0 <= seed < 2**63 and 0 <= torch_threads <= 1024",
    "device.split(':')[0] in ('cpu', 'cuda')",
    "num_iterations >= 2  # for cloning without DAgger take bc.py",
    "batch_size <= buffer_size",
    "0 < learning_rate < math.inf and 0 <= expert_mixing <= 1",
    "video_every == 10 or capture_video",
    "'' not in (expert_data, expert, run_dir, exp_name)",
    "expert or not expert_data  # the policy that made them labels the learner's states",
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
