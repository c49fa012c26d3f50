"""Soft actor-critic (SAC) for continuous control, and the variants of it that the field uses, in one file.

    python sac_continuous.py --env-id HalfCheetah-v4 --temperature 0.2

2018a: Haarnoja et al., "Soft Actor-Critic", arXiv:1801.01290 (state-value network, fixed temperature).
2018b: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905 (the default here).
Writes runs/ENV__EXP__SEED__TIME: args.json, progress.csv, policy.pt, checkpoint.pt, TensorBoard's events, videos/*.mp4.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from sysconfig import get_path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.utils.save_video import save_video
from PIL import Image, ImageDraw
from tensorboardX import SummaryWriter
from torch import nn
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    env_id: str = "HalfCheetah-v4"  # Gymnasium environment: flat Box observations, bounded Box actions
    env_kwargs: str = "{}"  # JSON for gym.make, as '{"use_contact_forces": true}' for Ant-v4
    max_episode_steps: int | None = None  # replaces the environment's own limit
    seed: int = 1  # seeds everything; the same seed on the same machine gives the same bytes
    exp_name: str = "sac_continuous"  # name of the experiment, part of the run folder's name
    run_dir: str | None = None  # run folder (default: runs/ENV__EXP__SEED__TIME)
    resume: str | None = None  # run folder of a stopped run: continue it as if it had never stopped
    evaluate: str | None = None  # no training: evaluate this policy file or run folder and print its return
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    torch_threads: int = 0  # CPU threads for PyTorch; 0 leaves its default
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # as torch.set_float32_matmul_precision
    compile: Literal["auto", "always", "never"] = "auto"  # auto: runs of 100,000 steps or more, where it can be done

    total_steps: int = 1_000_000  # environment steps
    random_steps: int | None = None  # uniform random actions at the start (default: 5,000, at most a tenth of the run)
    learning_starts: int | None = None  # first step with an update (default: 5,000, at most a tenth of the run)
    batch_size: int = 256  # transitions in a batch
    buffer_size: int = 1_000_000  # transitions the replay buffer holds
    gamma: float = 0.99  # discount factor
    actor_lr: float = 3e-4  # Adam's learning rate for the actor
    critic_lr: float = 1e-3  # Adam's learning rate for the critics and the value network (2018b: 3e-4)
    temperature_lr: float = 3e-4  # Adam's learning rate for the learned temperature
    lr_schedule: Literal["constant", "linear"] = "constant"  # linear: every learning rate falls to zero at total-steps
    temperature: float | Literal["auto"] = "auto"  # weight of the entropy: auto (learned), or fixed; 0: no bonus
    target_entropy: float | Literal["auto"] = "auto"  # nats a learned one aims at; auto: -dim(A) / 2 (2018b: -dim(A))
    backup_entropy: bool = True  # the entropy bonus in the critics' target
    actor_gradient: Literal["reparametrize", "reinforce"] = "reparametrize"  # estimator of the actor's gradient
    num_actor_samples: int = 1  # actions sampled per state in the actor's loss
    num_critics: int = 2  # critics in the ensemble
    critic_backup: Literal["min", "mean", "double-q", "redq", "value"] = "min"  # how values become the target
    num_critic_updates: int = 1  # critic updates, each on a fresh batch, before each actor update
    tau: float = 0.005  # targets move by target <- (1 - tau) target + tau online
    target_update_period: int = 1  # critic updates between two such moves; hard updates: --tau 1 and 1000 here

    hidden_size: int = 256  # units of a hidden layer
    num_layers: int = 2  # hidden layers
    activation: Literal["relu", "tanh", "leaky-relu", "selu", "silu"] = "relu"  # non-linearity of the hidden layers
    actor_std: Literal["state", "shared"] | float = "state"  # an output of the network, a parameter, or a fixed number
    squash: bool = True  # tanh-squashed Gaussian; otherwise a Gaussian whose actions are clipped to the bounds

    eval_every: int = 5_000  # steps between evaluations; the last step is always evaluated
    eval_episodes: int = 10  # episodes of an evaluation
    log_every: int = 100  # steps between TensorBoard points
    checkpoint_every: int = 10_000  # steps between checkpoints; the last step always has one
    capture_video: bool = False  # record an evaluation episode as mp4
    video_every: int = 10  # evaluations between recordings; the last one is always recorded
    render: bool = False  # with --evaluate: show the episodes in a window


# ------------------------------------------------------------------------------------------------------------ networks
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "leaky-relu": nn.LeakyReLU, "selu": nn.SELU, "silu": nn.SiLU}


class Actor(nn.Module):
    """Gaussian policy, squashed by tanh into [-1, 1]^action_dim unless told otherwise."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        layers = []
        for fan_in, fan_out in itertools.pairwise([obs_dim, *[args.hidden_size] * args.num_layers]):
            layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[args.activation]()]
        self.squash, self.std_from_net = args.squash, args.actor_std == "state"
        self.to_action = nn.Tanh() if args.squash else nn.Identity()
        self.net = nn.Sequential(*layers, nn.Linear(args.hidden_size, action_dim * (2 if self.std_from_net else 1)))
        for parameter in self.net.parameters():  # Glorot's weights and biases of 0, as in the papers' own code
            nn.init.xavier_uniform_(parameter) if parameter.ndim == 2 else nn.init.zeros_(parameter)
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

    def sample(self, mean, log_std, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """Reparametrised action (batch, action_dim) and its log-probability (batch,)."""
        u = mean + log_std.exp() * noise
        return self.to_action(u), self.log_prob(u, noise, log_std)

    def log_prob(self, u: torch.Tensor, noise: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
        """log pi(a|s) of the action that u = mean + exp(log_std) noise becomes (2018b, eq. 26). Returns (batch,)."""
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        if self.squash:  # log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), exact where tanh(u) rounds to 1
            log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))
        return log_prob.sum(-1)


class Ensemble(nn.Module):
    """Networks with a scalar output each, side by side: one product a layer serves all. Weights: (members, in, out)."""

    def __init__(self, num_members: int, in_dim: int, args: Args):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise([in_dim, *[args.hidden_size] * args.num_layers, 1]):
            bound = math.sqrt(6 / (fan_in + fan_out))  # Glorot's
            self.weights.append(torch.empty(num_members, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.zeros(num_members, 1, fan_out))
        self.activation = ACTIVATIONS[args.activation]()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Inputs (batch, dim), concatenated: obs, action for Q(s, a), obs for V(s). Returns (num_members, batch)."""
        x = torch.cat(inputs, dim=-1).expand(len(self.weights[0]), -1, -1)
        *hidden_layers, (last_weight, last_bias) = zip(self.weights, self.biases, strict=True)
        for weight, bias in hidden_layers:
            x = self.activation(torch.baddbmm(bias, x, weight))  # (num_members, batch, hidden_size)
        return torch.baddbmm(last_bias, x, last_weight).squeeze(-1)


# ------------------------------------------------------------------------------------------------------- replay buffer
class ReplayBuffer:
    """The last `capacity` transitions, a row each: obs, action, reward, next_obs, terminated, as float32."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = torch.empty(capacity, sum(self.sizes), device=device)
        self.num_added = 0

    def __len__(self) -> int:
        return min(self.num_added, len(self.rows))

    def add(self, obs, action, reward: float, next_obs, terminated: bool) -> None:
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]], dtype=np.float32)
        self.rows[self.num_added % len(self.rows)] = torch.from_numpy(row)
        self.num_added += 1

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows index (batch,). Returns obs, action, reward (batch,), next_obs, terminated (batch,)."""
        obs, action, reward, next_obs, terminated = self.rows.index_select(0, index).split(self.sizes, dim=1)
        return obs, action, reward.squeeze(1), next_obs, terminated.squeeze(1)


# ------------------------------------------------------------------------------------------------------------- losses
# Pure functions of tensors. q: (num_critics, batch); log_prob, reward, terminated: (batch,).
def backup(q: torch.Tensor, kind: str) -> torch.Tensor:
    """What the target critics' values become: (num_critics, batch) -> (1, batch), for double-q (num_critics, batch)."""
    if kind == "mean":
        return q.mean(0, keepdim=True)
    if kind == "double-q":  # each critic's target comes from the other one (van Hasselt 2010)
        return q.flip(0)
    return q.min(0, keepdim=True).values  # clipped double Q (Fujimoto et al. 2018); for redq over a random pair


def critic_target(reward, terminated, next_q, next_log_prob, temperature, gamma: float) -> torch.Tensor:
    """y = r + gamma (1 - d) (Q'(s', a') - temperature log pi(a'|s')), d: terminated, not truncated (2018b, eq. 2-3)."""
    return reward + gamma * (1 - terminated) * (next_q - temperature * next_log_prob)


def critic_loss(q: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Sum over critics of E[(Q_j(s, a) - y_j)^2] / 2 (2018b, eq. 5). target has no gradient."""
    return 0.5 * (q - target).square().mean(1).sum()


def actor_objective(q: torch.Tensor, kind: str) -> torch.Tensor:
    """The value that the actor maximises: min over critics for min and value, else their mean. Returns (batch,)."""
    return q.min(0).values if kind in ("min", "value") else q.mean(0)


def actor_loss(log_prob: torch.Tensor, q: torch.Tensor, temperature: torch.Tensor | float) -> torch.Tensor:
    """J = E[temperature log pi(a|s) - Q(s, a)], a reparametrised (2018b, eq. 9). q: (batch,)."""
    return (temperature * log_prob - q).mean()


def temperature_loss(log_temperature: torch.Tensor, log_prob: torch.Tensor, target_entropy: float) -> torch.Tensor:
    """J(temperature) = E[-temperature (log pi(a|s) + target_entropy)] (2018b, eq. 18). log_prob has no gradient."""
    return -(log_temperature.exp() * (log_prob + target_entropy)).mean()


# -------------------------------------------------------------------------------------------------------------- agent
class Agent(nn.Module):
    """The networks, their optimiser, and one training step. No network sees the gradient of another one's loss."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args, self.action_dim, self.device = args, action_dim, torch.device(args.device)
        self.actor = Actor(obs_dim, action_dim, args)
        self.critic = Ensemble(args.num_critics, obs_dim + action_dim, args)
        self.value = Ensemble(1, obs_dim, args) if args.critic_backup == "value" else None
        self.target = copy.deepcopy(self.value or self.critic)  # what the critics' target reads
        log_temperature = 0.0 if args.temperature in ("auto", 0) else math.log(args.temperature)
        self.log_temperature = nn.Parameter(torch.tensor(log_temperature), requires_grad=args.temperature == "auto")
        self.actor_and_temperature = [p for p in (*self.actor.parameters(), self.log_temperature) if p.requires_grad]
        self.target_entropy = -action_dim / 2 if args.target_entropy == "auto" else args.target_entropy
        self.to(self.device)
        trained = [(self.critic, args.critic_lr), (self.actor, args.actor_lr), (self.value, args.critic_lr)]
        rates = [(net.parameters(), lr) for net, lr in trained if net] + [([self.log_temperature], args.temperature_lr)]
        self.optimizer = torch.optim.Adam([{"params": p, "lr": lr, "initial_lr": lr} for p, lr in rates], fused=True)
        # A stream for exploration, one for replay and one for losses: drawing from one never shifts another.
        seeds = np.random.SeedSequence(args.seed).generate_state(3).tolist()
        self.streams = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        if args.compile == "always":  # the gradients, which change and draw nothing, become one program each
            self.cache = tempfile.TemporaryDirectory()  # a shared one can hold what a killed run left
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.cache.name
            torch._dynamo.config.trace_autograd_ops = True
            cpp = {"cpp_wrapper": True, "compile_threads": 1, "cpp_cache_precompile_headers": False}
            how = {"mode": "reduce-overhead"} if self.device.type == "cuda" else {"options": cpp}
            for name in ("critic_gradients", "value_gradients", "actor_gradients"):
                setattr(self, name, torch.compile(getattr(self, name), fullgraph=True, dynamic=False, **how))

    @property
    def temperature(self) -> torch.Tensor | float:
        return self.log_temperature.detach().exp() if self.args.temperature != 0 else 0.0

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """A sampled action (action_dim,) for one observation (obs_dim,)."""
        noise = torch.randn(self.action_dim, generator=self.streams[0], device=self.device)
        return self.actor.sample(*self.actor(torch.from_numpy(obs).to(self.device)), noise)[0].cpu().numpy()

    def random_action(self) -> np.ndarray:
        """Uniform in [-1, 1]^action_dim."""
        return (2 * torch.rand(self.action_dim, generator=self.streams[0], device=self.device) - 1).cpu().numpy()

    def update(self, buffer: ReplayBuffer, step: int) -> dict[str, torch.Tensor]:
        """Critic updates on fresh batches, then one of actor and temperature. Returns what is logged."""
        args, pair, (_, replay, random) = self.args, None, self.streams
        if args.lr_schedule == "linear":
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - step / args.total_steps)
        shape = (args.num_critic_updates, args.batch_size)
        indices = torch.randint(len(buffer), shape, generator=replay, device=self.device)
        first = (step - args.learning_starts) * args.num_critic_updates + 1  # they are counted over the whole run
        for num_updates, index in enumerate(indices, start=first):
            batch = obs, *_ = buffer[index]
            noise = torch.randn(len(obs), self.action_dim, generator=random, device=self.device)
            if args.critic_backup == "redq":  # a random pair of the critics (Chen et al. 2021, algorithm 1)
                pair = torch.rand(args.num_critics, generator=random, device=self.device).topk(2).indices
            gradients, metrics = self.critic_gradients(*batch, noise, pair)
            metrics = {name: value.clone() for name, value in metrics.items()}  # the next CUDA graph overwrites them
            self.step(self.critic.parameters(), gradients)
            if self.value:
                self.step(self.value.parameters(), self.value_gradients(obs, noise))
            if num_updates % args.target_update_period == 0:  # target <- (1 - tau) target + tau online
                online = (self.value or self.critic).parameters()
                torch._foreach_lerp_([p.data for p in self.target.parameters()], [p.data for p in online], args.tau)
        noise = torch.randn(args.num_actor_samples * len(obs), self.action_dim, generator=random, device=self.device)
        gradients, of_actor = self.actor_gradients(obs, noise)
        self.step(self.actor_and_temperature, gradients)
        return metrics | of_actor

    def step(self, parameters, gradients) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.contiguous()  # fused Adam takes it to lie in memory as its parameter does
        self.optimizer.step()
        self.optimizer.zero_grad()  # parameters without a gradient stay as they are

    def critic_gradients(self, obs, action, reward, next_obs, terminated, noise, pair) -> tuple[tuple, dict]:
        with torch.no_grad():
            if self.value:
                next_q, next_log_prob = self.target(next_obs), 0.0  # (1, batch), the entropy bonus is in V
            else:
                next_action, next_log_prob = self.actor.sample(*self.actor(next_obs), noise)
                next_q = self.target(next_obs, next_action)  # (num_critics, batch)
                next_q = backup(next_q if pair is None else next_q[pair], self.args.critic_backup)
            temperature = self.temperature if self.args.backup_entropy else 0.0
            target = critic_target(reward, terminated, next_q, next_log_prob, temperature, self.args.gamma)
        q = self.critic(obs, action)  # (num_critics, batch)
        loss = critic_loss(q, target)
        metrics = {"critic_loss": loss, "q_values": q, "q_values_std": q.mean(0).std(0, False), "target_values": target}
        return torch.autograd.grad(loss, list(self.critic.parameters())), {k: v.detach() for k, v in metrics.items()}

    def value_gradients(self, obs, noise) -> tuple:
        """V(s) regresses on min_j Q_j(s, a) - temperature log pi(a|s) (2018a, eq. 5)."""
        with torch.no_grad():
            action, log_prob = self.actor.sample(*self.actor(obs), noise)
            temperature = self.temperature if self.args.backup_entropy else 0.0
            target = self.critic(obs, action).min(0, keepdim=True).values - temperature * log_prob  # (1, batch)
        return torch.autograd.grad(critic_loss(self.value(obs), target), list(self.value.parameters()))

    def actor_gradients(self, obs, noise) -> tuple[tuple, dict]:
        obs, mean, log_std = (x.repeat(self.args.num_actor_samples, 1) for x in (obs, *self.actor(obs)))
        action, log_prob = self.actor.sample(mean, log_std, noise)  # (num_samples * batch, action_dim)
        objective = actor_objective(self.critic(obs, action), self.args.critic_backup)
        if self.args.actor_gradient == "reinforce":  # E[grad log pi(a|s) Q(s, a)] (Williams 1992), without a baseline
            u = (mean + log_std.exp() * noise).detach()
            objective = objective.detach() * self.actor.log_prob(u, (u - mean) / log_std.exp(), log_std)
        loss = actor_loss(log_prob, objective, self.temperature)
        metrics = {"actor_loss": loss.detach(), "entropy": -log_prob.detach(), "temperature": self.temperature}
        metrics |= {"policy_std": log_std.detach().exp(), "action_saturation": action.detach().abs() > 0.99}
        if self.args.temperature == "auto":  # one sum, of which either part has a gradient for its own parameters alone
            loss = loss + temperature_loss(self.log_temperature, log_prob.detach(), self.target_entropy)
        return torch.autograd.grad(loss, self.actor_and_temperature), metrics


# ----------------------------------------------------------------------------------------------------------- training
def train(agent: Agent, buffer: ReplayBuffer, env: "Episode", args: Args, checkpoint: dict) -> None:
    """One run, from its first step or from its checkpoint to its last."""
    with one_line("checkpoint.pt" if checkpoint else args.env_id):
        first_step, wall_time_s, rows, episodes = checkpoint.get("progress", (0, 0.0, [], []))
        obs = restore(checkpoint, agent, buffer, env) if checkpoint else env.reset(seed=args.seed)[0]
    eval_env, name = make_env(args), f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(args.resume or args.run_dir or Path("runs", name.replace("/", "_").replace(":", "_")))
    with one_line("--run-dir"):
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    args.run_dir, args.resume = str(run_dir), None
    save(run_dir / "args.json", json.dumps(vars(args), indent=2) + "\n")
    began, step_times, metrics = time.perf_counter() - wall_time_s, [], {}
    bar = tqdm(total=args.total_steps, initial=first_step, dynamic_ncols=True, miniters=1, mininterval=1)
    with bar, SummaryWriter(str(run_dir), purge_step=first_step + 1, filename_suffix=f".{first_step}") as tensorboard:
        for step in range(first_step, args.total_steps):
            step_began = time.perf_counter()
            action = agent.random_action() if step < args.random_steps else agent.act(obs)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            buffer.add(obs, action, reward, next_obs, terminated)  # a truncated episode still bootstraps
            obs = next_obs
            if terminated or truncated:
                episodes.append({"return": sum(env.episode["rewards"]), "length": len(env.episode["rewards"])})
                log(tensorboard, "train", episodes[-1], step + 1)
                obs, _ = env.reset()
            if step >= args.learning_starts:
                if args.compile == "always" and not metrics:
                    bar.set_description("compiling")
                metrics = agent.update(buffer, step)
            step_times.append(time.perf_counter() - step_began)  # neither evaluating nor saving is counted
            bar.set_description("training", refresh=False)
            bar.update()
            steps, last = step + 1, step + 1 == args.total_steps
            if last or any(steps % every == 0 for every in (args.log_every, args.eval_every, args.checkpoint_every)):
                weight_norm = nn.utils.get_total_norm(agent.parameters())
                log(tensorboard, "learning", {**metrics, "weight_norm": weight_norm, "reward": reward}, steps)
            if steps % args.eval_every == 0 or last:
                bar.set_description("evaluating")
                columns = evaluate(agent, eval_env, args.eval_episodes)
                log(tensorboard, "evaluation", columns, steps)
                row = {"step": steps, "wall_time_s": time.perf_counter() - began, **columns}
                row |= {f"train_{name}_mean": mean([one[name] for one in episodes]) for name in ("return", "length")}
                row["episodes"] = len(episodes) + (rows[-1]["episodes"] if rows else 0)
                row["steps_per_s"] = 1 / mean(step_times)
                for name in ("critic_loss", "actor_loss", "q_values", "entropy", "temperature"):
                    row[name] = mean(metrics.get(name, []))
                rows.append(row)
                episodes, step_times = [], []
                bar.set_postfix(train=row["train_return_mean"], eval=row["eval_return_mean"])
                table = [row.keys(), *(past.values() for past in rows)]
                save(run_dir / "progress.csv", "".join(",".join(map(str, line)) + "\n" for line in table))
                policy = {"format": POLICY, "algorithm": "sac"} | {name: vars(args)[name] for name in POLICY_SETTINGS}
                policy["state_dict"] = copy.deepcopy(agent.actor).cpu().state_dict()
                save(run_dir / "policy.pt", policy | env.spaces)
                if args.capture_video and (steps // args.eval_every % args.video_every == 0 or last):
                    bar.set_description("recording")
                    video = record(agent, args, run_dir / "videos", f"step{steps}")
                    tensorboard.add_video("evaluation/video", video, steps, fps=8)
            if steps % args.checkpoint_every == 0 or last:
                state = {"networks": agent.state_dict(), "optimizer": agent.optimizer.state_dict(), "obs": obs.tolist()}
                state |= {"episode": env.episode, "streams": [stream.get_state() for stream in agent.streams]}
                state["buffer"] = torch.from_numpy(buffer.rows[: len(buffer)].cpu().numpy())  # filled rows alone
                state["progress"] = steps, time.perf_counter() - began, rows, episodes
                save(run_dir / "checkpoint.pt", {"format": CHECKPOINT, **vars(args), **state})
    print(f"{run_dir} finished after {rows[-1]['step']} steps, evaluation return {rows[-1]['eval_return_mean']:.1f}")
    print(f"  curves      python {Path(sys.argv[0]).parent}/benchmark/plot.py {run_dir} --out {run_dir}/curves.png")
    print(f"  TensorBoard tensorboard --logdir {run_dir}")
    print(f"  policy      python {sys.argv[0]} --evaluate {run_dir}")


def mean(values) -> float:  # of a tensor, a list or a number; NaN of nothing
    return torch.as_tensor(values, dtype=torch.float64).mean().item()


def log(tensorboard: SummaryWriter, group: str, values: dict, step: int) -> None:
    """Into TensorBoard. A NaN or an infinity among the values ends the run."""
    for name, value in values.items():
        if not math.isfinite(value := mean(value)):
            raise Failure(1, f"step {step}: {name} became NaN or infinite; what was saved before is whole")
        tensorboard.add_scalar(f"{group}/{name}", value, step)


# ---------------------------------------------------------------------------------------- environment and evaluation
class Episode(gym.Wrapper):
    """Observations as float32 copies, rewards as numbers; knows what it takes to play the episode under way again."""

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        seed = np.random.default_rng(self.episode["seed"]).integers(2**63).item() if seed is None else seed
        self.unwrapped.action_space.seed(seed)  # an environment may sample from it
        self.episode = {"seed": seed, "actions": [], "rewards": []}
        obs, info = self.env.reset(seed=seed % 2**31, options=options)  # old generators take no more bits
        return np.array(obs, dtype=np.float32), info

    def step(self, action: np.ndarray):
        obs, reward, *rest = self.env.step(action)
        self.episode["actions"].append(action.tolist())
        self.episode["rewards"].append(np.asarray(reward).item())
        return np.array(obs, dtype=np.float32), self.episode["rewards"][-1], *rest


def make_env(args: Args, render_mode: str | None = None) -> Episode:
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
        env = Episode(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))
        env.spaces = {"obs_dim": obs_space.shape[0], "action_dim": space.shape[0]}
        env.spaces |= {"action_low": space.low.tolist(), "action_high": space.high.tolist()}
        return env


@torch.no_grad()
def evaluate(agent: Agent, env: Episode, num_episodes: int) -> dict[str, float]:
    """Episodes of the mean action, from the same states each time. Returns columns of progress.csv."""
    actor, episodes = copy.deepcopy(agent.actor).cpu(), []
    for seed in range(1_000, 1_000 + num_episodes):
        obs, _ = env.reset(seed=seed)
        first_obs = torch.from_numpy(obs).to(agent.device)[None]  # (1, obs_dim)
        q = mean(agent.critic(first_obs, agent.actor.mean_action(first_obs)))
        terminated = truncated = False
        while not (terminated or truncated):
            obs, _, terminated, truncated, _ = env.step(actor.mean_action(torch.from_numpy(obs)).numpy())
        rewards = np.array(env.episode["rewards"])
        # Q above it is over-estimation, but for its entropy bonus and what a time limit cuts off (0.99^200 is 0.13).
        discounted = agent.args.gamma ** np.arange(len(rewards)) @ rewards
        episodes.append({"return": rewards.sum(), "length": len(rewards), "q": q, "discounted_return": discounted})
    returns = [episode["return"] for episode in episodes]
    columns = {"eval_return_mean": mean(returns), "eval_return_std": np.std(returns).item()}
    return columns | {f"eval_{name}_mean": mean([episode[name] for episode in episodes]) for name in episodes[0]}


def record(agent: Agent, args: Args, folder: Path, name: str) -> np.ndarray:
    """The first evaluation episode as folder/NAME-episode-0.mp4; returns it as (1, frames, 3, height, width)."""
    env = make_env(args, "rgb_array_list")
    evaluate(agent, env, num_episodes=1)
    rewards, images = [0.0, *env.episode["rewards"]], [Image.fromarray(frame) for frame in env.render()]
    for i, image in enumerate(images):
        text = f"step {i}   reward {rewards[i]:.2f}   return {sum(rewards[: i + 1]):.1f}"
        ImageDraw.Draw(image).text((10, 8), text, font_size=image.width / 24, stroke_width=2, stroke_fill="black")
    save_video([*map(np.asarray, images)], str(folder), fps=env.metadata.get("render_fps", 30), name_prefix=name)
    return np.stack([np.asarray(image.reduce(2)) for image in images[::4]]).transpose(0, 3, 1, 2)[None]


# -------------------------------------------------------------------------------------------------------------- files
POLICY, CHECKPOINT = "policy/1", "sac-checkpoint/6"
POLICY_SETTINGS = "env_id env_kwargs max_episode_steps hidden_size num_layers activation actor_std squash".split()


def save(path: Path, content: dict | str) -> None:
    """The file is whole at any moment: written beside, brought to the disk, put in its place."""
    beside = path.with_name(path.name + ".tmp")
    with one_line(path, exit_code=1), open(beside, "wb") as file:
        torch.save(content, file) if isinstance(content, dict) else file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load(path: Path, expected: str) -> dict:
    """A file that save wrote. Runs no code from it."""
    with one_line(path), zipfile.ZipFile(path) as archive:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if archive.testzip() or content["format"] != expected:  # torch.load does not notice a flipped byte
            raise ValueError(f"it is damaged, or its format is not {expected}")
        return content


def restore(checkpoint: dict, agent: Agent, buffer: ReplayBuffer, env: Episode) -> np.ndarray:
    """Plays the episode under way again, so that no simulator's state needs saving. Returns the observation."""
    agent.load_state_dict(checkpoint["networks"])
    agent.optimizer.load_state_dict(checkpoint["optimizer"])
    buffer.num_added, stored = checkpoint["progress"][0], checkpoint.pop("buffer")  # not held twice
    buffer.rows[: len(stored)] = stored
    for stream, state in zip(agent.streams, checkpoint["streams"], strict=True):
        stream.set_state(state)
    obs, _ = env.reset(seed=checkpoint["episode"]["seed"])
    for action in checkpoint["episode"]["actions"]:
        obs, *_ = env.step(np.float32(action))
    if (env.episode, obs.tolist()) != (checkpoint["episode"], checkpoint["obs"]):
        print("warning: the environment did not repeat its episode, the run goes on with a new one", file=sys.stderr)
        obs, _ = env.reset()
    return obs


# ------------------------------------------------------------------------------------------------------- command line
RULES = [
    "min(total_steps, batch_size, num_critics, num_critic_updates, num_actor_samples, target_update_period) >= 1",
    "min(hidden_size, num_layers, eval_every, eval_episodes, log_every, checkpoint_every, video_every) >= 1",
    "0 <= seed < 2**63 and 0 <= torch_threads <= 1024",
    "0 <= learning_starts < total_steps and random_steps >= 0",
    "batch_size <= buffer_size",
    "0 <= gamma <= 1 and 0 < tau <= 1",
    "0 < actor_lr < math.inf and 0 < critic_lr < math.inf and 0 < temperature_lr < math.inf",
    "temperature == 'auto' or (0 <= temperature < math.inf and target_entropy == 'auto' and temperature_lr == 3e-4)",
    "target_entropy == 'auto' or -math.inf < target_entropy < math.inf",
    "backup_entropy or temperature != 0",
    "actor_std in ('state', 'shared') or math.exp(-20) <= actor_std <= math.exp(2)",
    "actor_std in ('state', 'shared') or temperature != 'auto' or evaluate  # a fixed one needs a fixed temperature",
    "critic_backup != 'double-q' or num_critics == 2",
    "critic_backup != 'redq' or num_critics >= 2",
    "compile != 'always' or can_compile(device)  # on a CPU with a C++ compiler and Python's headers",
    "video_every == 10 or capture_video",
    "'' not in (resume, evaluate, run_dir, exp_name)",
    "not render or (evaluate and not capture_video and (sys.platform != 'linux' or 'DISPLAY' in os.environ))",
]
RESUME_TAKES = "resume total_steps eval_every eval_episodes log_every checkpoint_every capture_video video_every"
EVALUATE_TAKES = "evaluate env_id env_kwargs max_episode_steps eval_episodes capture_video render device torch_threads"


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


def can_compile(device: str) -> bool:
    """On a CPU torch.compile needs a C++ compiler and Python's headers."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) and Path(get_path("include"), "Python.h").exists()
    return device != "cpu" or bool(compiler)


def parse_args(argv: list[str] | None) -> tuple[Args, dict]:
    """The command line as settings that keep the rules, and the checkpoint of --resume or the policy of --evaluate."""
    args, content = tyro.cli(Args, args=argv), {}
    if args.resume or args.evaluate:
        path = Path(args.resume, "checkpoint.pt") if args.resume else Path(args.evaluate)
        content = load(path / "policy.pt" if path.is_dir() else path, CHECKPOINT if args.resume else POLICY)
        with one_line(path):
            base = Args(**{name: content.get(name, value) for name, value in vars(Args()).items()})
            if ":" in base.env_id and args.env_id != base.env_id:
                raise ValueError(f"runs code of a module: if you trust it, give --env-id {base.env_id}")
            args = tyro.cli(Args, args=argv, default=base)
            free = set((RESUME_TAKES if args.resume else EVALUATE_TAKES).split())
            free -= {"total_steps"} if base.lr_schedule == "linear" or args.total_steps < base.total_steps else set()
            for name, value in vars(args).items():
                if value != getattr(base, name) and name not in free:
                    raise ValueError(f"its {name} is {getattr(base, name)} and cannot become {value}")
    for name in ("random_steps", "learning_starts"):
        if getattr(args, name) is None:
            setattr(args, name, min(5_000, args.total_steps // 10))
    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if args.compile == "auto":
        args.compile = "always" if args.total_steps >= 100_000 and can_compile(args.device) else "never"
    args.torch_threads = args.torch_threads or torch.get_num_threads()
    with one_line("settings"):
        for rule in RULES:
            if not eval(rule, globals(), vars(args)):
                names = compile(rule, "rule", "eval").co_names
                given = [f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name in names]
                raise ValueError(f"{' '.join(given)}: it must hold that {rule}")
    return args, content


def main(argv: list[str] | None = None) -> int:
    sys.path.append(os.getcwd())  # --env-id module:Env-v0 finds a module there
    try:
        args, content = parse_args(argv)
        torch.set_num_threads(args.torch_threads)
        torch.set_float32_matmul_precision(args.matmul_precision)
        cpu = torch.cpu.get_capabilities()
        if args.device == "cpu" and cpu.get("cpu_name", "").startswith("AMD") and not cpu.get("amx_bf16"):
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # oneDNN, not MKL: faster; no bf16 without AMX
        env = make_env(args, "human" if args.render else None)
        if args.capture_video:
            with one_line("--capture-video"):
                (drawn := make_env(args, "rgb_array_list")).reset(seed=0)
                Image.fromarray(drawn.render()[0])  # a frame can be drawn, and is one
        torch.manual_seed(args.seed)  # initial weights; everything random after them has a stream of its own
        sizes = env.spaces["obs_dim"], env.spaces["action_dim"]
        with one_line(f"--device {args.device} --buffer-size {args.buffer_size} --hidden-size {args.hidden_size}"):
            capacity = 0 if args.evaluate else args.buffer_size
            agent, buffer = Agent(args, *sizes), ReplayBuffer(capacity, *sizes, torch.device(args.device))
        if args.evaluate:
            with one_line(args.evaluate):
                if any(content[name] != value for name, value in env.spaces.items()):
                    raise ValueError(f"the policy was made for other spaces than {args.env_id} has, {env.spaces}")
                agent.actor.load_state_dict(content["state_dict"])
                if not nn.utils.get_total_norm(agent.actor.state_dict().values()).isfinite():
                    raise ValueError("its weights are NaN or infinite")
            average, deviation, *_ = evaluate(agent, env, args.eval_episodes).values()
            print(f"{args.env_id}: return {average:.2f} +- {deviation:.2f} over {args.eval_episodes} episodes")
            if args.capture_video:
                folder = Path(args.evaluate if os.path.isdir(args.evaluate) else Path(args.evaluate).parent, "videos")
                print(f"drawing {folder}/evaluate-episode-0.mp4")
                record(agent, args, folder, "evaluate")
        else:
            train(agent, buffer, env, args, content)
        return 0
    except (Failure, OSError) as error:
        exit_code, message = error.args if isinstance(error, Failure) else (1, str(error))
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return exit_code
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
