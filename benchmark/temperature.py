"""Draws what the temperature does to returns and to policies on Pendulum-v1.

Example:
    python benchmark/sweep.py benchmark/experiments/temperature_pendulum.yaml
    python benchmark/temperature.py runs/temperature_pendulum --out docs/temperature.png

One panel of learning curves, and one panel for each group of runs with the policy of its first seed: the torque against
the angle at rest, its median and the band that holds 90 % of the sampled actions.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from curves import group, read_curves
from errors import Parser, UserError, run_main
from plot import STATISTICS, STYLE, add_legend, align, draw, make_panels, save, with_interval

NINETY_PERCENT = 1.645  # standard deviations of a Gaussian to either side


def torque_quantiles(path: Path, angles: np.ndarray) -> np.ndarray:
    """The 5 %, 50 % and 95 % quantiles of the torque at rest at these angles. Returns (3, angles)."""
    try:
        policy = torch.load(path, weights_only=True)
        weights, activation = policy["state_dict"], getattr(F, policy["activation"].replace("-", "_"))
        x = torch.tensor(np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1), dtype=torch.float32)
        layers = sorted(int(name.split(".")[1]) for name in weights if name.endswith(".weight"))
        for layer in layers:
            x = F.linear(
                x if layer == 0 else activation(x), weights[f"net.{layer}.weight"], weights[f"net.{layer}.bias"]
            )
        mean, log_std = x.chunk(2, dim=1)
    except Exception as error:
        raise UserError(f"{path}: not a Pendulum-v1 policy of sac_continuous.py ({type(error).__name__})") from None
    std = log_std.clamp(-20, 2).exp()
    return np.stack([2 * torch.tanh(mean + z * std)[:, 0].numpy() for z in (-NINETY_PERCENT, 0, NINETY_PERCENT)])


def main() -> None:
    parser = Parser("Draw what the temperature does on Pendulum-v1.")
    parser.add_argument("paths", nargs="+", help="folders of runs on Pendulum-v1, a group for each temperature")
    parser.add_argument("--out", type=Path, required=True, help="figure; without a suffix both .png and .svg")
    args = parser.parse_args()
    groups = group(read_curves(args.paths))
    if list(groups) != ["Pendulum-v1"]:
        raise UserError(f"{' '.join(args.paths)}: runs on {', '.join(groups)}, this figure is for Pendulum-v1")
    angles = np.linspace(-math.pi, math.pi, 361)
    with plt.rc_context(STYLE):
        by_label = groups["Pendulum-v1"]
        figure, panels = make_panels(1 + len(by_label))
        for index, (label, curves) in enumerate(by_label.items()):
            name = f"temperature {label}"
            steps, values = align(curves, "eval_return_mean")
            draw(panels[0], index, name, steps, with_interval([values], STATISTICS["mean"]))
            low, median, high = torque_quantiles(curves[0].path / "policy.pt", angles)
            draw(panels[index + 1], index, name, np.degrees(angles), (median, low, high))
            panels[index + 1].set(title=name, xlabel="angle from upright, degrees", ylabel="torque", ylim=(-2.1, 2.1))
        panels[0].set(title="Pendulum-v1", xlabel="step", ylabel="eval return mean")
        add_legend(figure, panels)
        save(figure, args.out)


if __name__ == "__main__":
    run_main(main)
