"""A learning curve of Stable-Baselines3's SAC, evaluated as this project's runs are: on the same initial states.

Example, with an interpreter that has Stable-Baselines3 (nothing else of this project is needed):
    ~/sb3/bin/python benchmark/peer_curve.py --env-id HalfCheetah-v4 --seed 4 --out benchmark/results/peers

Writes OUT/sb3_ENV_SEED.csv, whole after every evaluation.
"""

import argparse
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

EVERY, EPISODES = 10_000, 10


class Evaluation(BaseCallback):
    """Episodes of the deterministic policy on an environment of their own, from the seeds 1000, 1001, ..."""

    def __init__(self, env_id: str, path: Path):
        super().__init__()
        self.env, self.path, self.began = gym.make(env_id), path, time.perf_counter()
        self.lines = ["step,wall_time_s,eval_return_mean,eval_return_std"]

    def _on_step(self) -> bool:
        if self.num_timesteps % EVERY == 0:
            returns = [self.play(seed) for seed in range(1000, 1000 + EPISODES)]
            row = self.num_timesteps, time.perf_counter() - self.began, np.mean(returns), np.std(returns)
            self.lines.append("{},{:.1f},{:.2f},{:.2f}".format(*row))
            beside = self.path.with_suffix(".tmp")
            beside.write_text("\n".join(self.lines) + "\n")
            beside.replace(self.path)
        return True

    def play(self, seed: int) -> float:
        obs, _ = self.env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            action, _ = self.model.predict(obs, deterministic=True)
            obs, reward, terminated, truncated, _ = self.env.step(action)
            total, over = total + reward, terminated or truncated
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env-id", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(args.env_id, args.out / f"sb3_{args.env_id}_{args.seed}.csv")
    model = SAC("MlpPolicy", gym.make(args.env_id), batch_size=256, learning_starts=5_000, seed=args.seed, device="cpu")
    model.learn(args.steps, callback=evaluation)


if __name__ == "__main__":
    main()
