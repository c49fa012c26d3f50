"""Draws the results at the end of runs against a setting in which they differ, one panel an environment.

Example:
    python benchmark/plot_setting.py benchmark/results/bc_demonstrations --setting num_trajectories \\
        --columns eval_return_mean eval_sampled_return_mean expert_return_mean --out demonstrations

A point is the mean over seeds of a column's last row, with its 95 % bootstrap interval.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from curves import Curve, read_curves
from errors import Parser, UserError, run_main
from plot import COLOURS, DASHES, MARKERS, STYLE, mean, save, with_interval


def setting_of(curve: Curve, name: str) -> float:
    try:
        return float(json.loads((curve.path / "args.json").read_text())[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{curve.path}: its args.json has no number {name} ({type(error).__name__}: {error})") from None


def plot_against_setting(curves: list[Curve], setting: str, columns: list[str]):
    env_ids = sorted({curve.env_id for curve in curves})
    figure, panels = plt.subplots(1, len(env_ids), figsize=(4 * len(env_ids) + 2.5, 3.2), squeeze=False, layout="tight")
    for panel, env_id in zip(panels[0], env_ids, strict=True):
        of_env = [(setting_of(curve, setting), curve) for curve in curves if curve.env_id == env_id]
        values = sorted({value for value, _ in of_env})
        for i, column in enumerate(columns):
            points = []
            for value in values:
                last = [curve[column][-1:] for found, curve in of_env if found == value]
                points.append(np.concatenate(with_interval([np.array(last)], mean)))  # mean, low, high
            middle, low, high = np.transpose(points)
            style = {"color": COLOURS[i], "linestyle": DASHES[i], "marker": MARKERS[i]}
            panel.errorbar(values, middle, [middle - low, high - middle], label=column, capsize=2, **style)
        panel.set(title=env_id, xlabel=setting.replace("_", " "), ylabel="return", xscale="log")
        panel.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        panel.minorticks_off()
    panels[0][-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main() -> None:
    parser = Parser("Draw the results at the end of runs against a setting in which they differ.")
    parser.add_argument("paths", nargs="+", help="folders with run folders in them")
    parser.add_argument("--setting", required=True, help="a number of args.json")
    parser.add_argument("--columns", nargs="+", default=["eval_return_mean"], help="of progress.csv")
    parser.add_argument("--out", type=Path, required=True, help="figure; without a suffix both .png and .svg")
    args = parser.parse_args()
    curves = read_curves(args.paths)
    with plt.rc_context(STYLE):
        save(plot_against_setting(curves, args.setting, args.columns), args.out)


if __name__ == "__main__":
    run_main(main)
