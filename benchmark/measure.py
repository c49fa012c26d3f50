"""Measures another program, or the matrix products alone, in the interpreter that runs this; throughput.py starts it.

Prints one line of JSON, last.
"""

import argparse
import importlib
import itertools
import json
import statistics
import time


def peer_steps_per_s(module_name: str, env_id: str, learning_starts: int, first: int, last: int, device: str) -> float:
    """Of a package with the interface of Stable-Baselines3, from step `first` to step `last`; its defaults."""
    import gymnasium as gym
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        def __init__(self):
            super().__init__()
            self.times = {}

        def _on_step(self) -> bool:
            self.times[self.num_timesteps] = time.perf_counter()
            return True

    clock = Clock()
    model = importlib.import_module(module_name).SAC(
        "MlpPolicy",
        gym.make(env_id),
        batch_size=256,
        learning_starts=learning_starts,
        seed=1,
        **({"device": device} if module_name == "stable_baselines3" else {}),
    )
    model.learn(last, callback=clock)
    return (last - first) / (clock.times[last] - clock.times[first])


def products(sizes: list[int], batch: int, weights: bool, inputs: bool, copies: int) -> list[tuple[int, int, int]]:
    """Shapes (m, k, n) of the products of a network's forward pass and of the gradients asked for, `copies` times."""
    layers = list(itertools.pairwise(sizes))
    shapes = [(batch, fan_in, fan_out) for fan_in, fan_out in layers]
    if weights:
        shapes += [(fan_in, batch, fan_out) for fan_in, fan_out in layers]
    if weights or inputs:  # the gradient of what a layer reads, down to the first layer only if the inputs' is needed
        shapes += [(batch, fan_out, fan_in) for fan_in, fan_out in (layers if inputs else layers[1:])]
    return shapes * copies


def products_of_update(obs_dim: int, action_dim: int, batch: int, hidden: int) -> list[tuple[int, int, int]]:
    """Of one SAC update with two critics and two hidden layers."""
    actor = [obs_dim, hidden, hidden, 2 * action_dim]
    critic = [obs_dim + action_dim, hidden, hidden, 1]
    return [
        *products(actor, batch, weights=False, inputs=False, copies=1),  # the critics' target
        *products(critic, batch, weights=False, inputs=False, copies=2),
        *products(critic, batch, weights=True, inputs=False, copies=2),  # the critics' update
        *products(actor, batch, weights=True, inputs=False, copies=1),  # the actor's update
        *products(critic, batch, weights=False, inputs=True, copies=2),
    ]


def floor_ms(obs_dim: int, action_dim: int, batch: int, hidden: int, device: str, rounds: int = 100) -> dict:
    """Median time in ms of one update's matrix products in float32: all of them, and the square hidden ones alone.

    On a CPU PyTorch multiplies with MKL or oneDNN, and which is faster depends on the CPU: the floor is the faster one.
    """
    import torch

    shapes = products_of_update(obs_dim, action_dim, batch, hidden)
    square = [shape for shape in shapes if min(shape) >= min(hidden, batch)]

    def time_of(shapes) -> float:
        operands = [
            (torch.randn(m, k, device=device), torch.randn(k, n, device=device), torch.empty(m, n, device=device))
            for m, k, n in shapes
        ]
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            for a, b, out in operands:
                torch.mm(a, b, out=out)
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)

    def is_exact() -> bool:
        a, b = torch.randn(256, 256, dtype=torch.float64), torch.randn(256, 256, dtype=torch.float64)
        return (a.float() @ b.float() - a @ b).abs().max().item() < 1e-3

    results = []
    for precision in ("none", "bf16"):  # "bf16" allows oneDNN, which has no bfloat16 units to use on many CPUs
        torch.backends.mkldnn.matmul.fp32_precision = precision
        if is_exact():
            results.append({"products": len(square), "products_ms": time_of(square), "all_ms": time_of(shapes)})
    return min(results, key=lambda result: result["all_ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=("floor", "stable_baselines3", "sbx"))
    parser.add_argument("--env-id", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--steps", type=int, nargs=3, required=True, metavar=("LEARNING_STARTS", "FIRST", "LAST"))
    args = parser.parse_args()
    try:
        import gymnasium as gym
        import torch

        torch.set_num_threads(args.threads)
        if args.program == "floor":
            env = gym.make(args.env_id)
            dims = env.observation_space.shape[0], env.action_space.shape[0]
            result = floor_ms(*dims, batch=256, hidden=256, device=args.device)
        else:
            version = importlib.import_module(args.program).__version__
            rate = peer_steps_per_s(args.program, args.env_id, *args.steps, args.device)
            result = {"steps_per_s": rate, "version": version}
    except ModuleNotFoundError as error:
        result = {"missing": error.name}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
