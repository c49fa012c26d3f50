"""Writes the Markdown table of results: final and best returns over seeds, speed, published numbers beside them.

Examples:
    python benchmark/table.py runs/sac_mujoco > table.md
    python benchmark/table.py runs/sac_mujoco --at 100000 500000

Deviations are those over seeds (n - 1 in the divisor). "Final" is the last evaluation of each seed, "best" its highest,
"best of the mean" the highest point of the seeds' mean, "last ten" the mean of each seed's last ten evaluations.
"""

import functools
import math
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import numpy as np
from curves import Curve, Published, group, read_curves, read_published, without_version
from errors import Parser, run_main

RETURNS = ("Final return", "Best return", "Best of the mean", "Last ten")
HEADER = ("Environment", "Program", "Seeds", "Steps", *RETURNS, "Steps/s", "Wall time", "Protocol")
OUR_PROTOCOL = "deterministic evaluation return"


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """In Markdown."""
    header = list(header)
    for row in (header, ["---"] * len(header), *rows):
        print("|", " | ".join(cell.replace("|", "\\|") for cell in row), "|")


def spread(values: list[float], digits: int = 1) -> str:
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def whole(values: list[float]) -> str:
    """One number, or the lowest and highest where they differ."""
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


def speed(curves: list[Curve]) -> list[str]:
    """Steps a second and wall time, of the files that have the time.

    Steps a second are the median over the second half of training, after learning has started; without that column
    the whole run's.
    """
    if not all("wall_time_s" in curve.columns for curve in curves):
        return ["", ""]
    of_each = [
        np.median(curve["steps_per_s"][len(curve["step"]) // 2 :])
        if "steps_per_s" in curve.columns
        else curve["step"][-1] / curve["wall_time_s"][-1]
        for curve in curves
    ]
    seconds = np.mean([curve["wall_time_s"][-1] for curve in curves])
    return [f"{np.median(of_each):.0f}", str(timedelta(seconds=round(seconds)))]


def best_of_the_mean(curves: list[Curve]) -> str:
    """Over the steps at which all seeds were evaluated."""
    steps = functools.reduce(np.intersect1d, [curve["step"] for curve in curves])
    common = [curve["eval_return_mean"][np.isin(curve["step"], steps)] for curve in curves]
    return f"{np.nanmax(np.mean(common, axis=0)):.1f}" if len(steps) else ""


def last_ten(curves: list[Curve], step: float = math.inf) -> str:
    """Each seed's mean of its last ten evaluations up to a step; "" where a seed begins later or ends before."""
    if step < math.inf and not all(curve["step"][0] <= step <= curve["step"][-1] for curve in curves):
        return ""
    return spread([curve["eval_return_mean"][curve["step"] <= step][-10:].mean() for curve in curves])


def row_of_runs(env_id: str, label: str, curves: list[Curve]) -> list[str]:
    returns = [curve["eval_return_mean"] for curve in curves]
    return [
        env_id,
        label,
        str(len(curves)),
        whole([curve["step"][-1] for curve in curves]),
        spread([values[-1] for values in returns]),
        spread([np.nanmax(values) for values in returns]),
        best_of_the_mean(curves),
        last_ten(curves),
        *speed(curves),
        OUR_PROTOCOL,
    ]


def row_of_published(env_id: str, result: Published) -> list[str]:
    deviation = "" if math.isnan(result.return_std) else f" ± {result.return_std:.1f}"
    value = f"{result.return_mean:.1f}{deviation}"
    source = f"[{result.source}]({result.url})"
    returns = ("", "", value, "") if result.is_best else (value, "", "", "")
    return [env_id, source, "", f"{result.steps:,}", *returns, "", "", result.protocol]


def main() -> None:
    parser = Parser("Write the Markdown table of final and best returns beside published numbers.")
    parser.add_argument("paths", nargs="+", help="run folders, folders above them, LABEL_ENV_SEED.csv; or LABEL=PATH")
    parser.add_argument(
        "--published", type=Path, default=Path(__file__).with_name("published.csv"), help="CSV of published results"
    )
    parser.add_argument("--at", type=int, nargs="+", metavar="STEP", help="instead, the last ten up to each step")
    args = parser.parse_args()
    groups = group(read_curves(args.paths))
    if args.at:
        rows = [
            [env_id, label, str(len(curves)), *(last_ten(curves, step) for step in args.at)]
            for env_id, by_label in groups.items()
            for label, curves in by_label.items()
        ]
        print_table(("Environment", "Program", "Seeds", *(f"{step:,}" for step in args.at)), rows)
        return
    published = read_published(args.published)
    rows = []
    for env_id, by_label in groups.items():
        rows += [row_of_runs(env_id, label, curves) for label, curves in by_label.items()]
        rows += [row_of_published(env_id, result) for result in published if result.env == without_version(env_id)]
    print_table(HEADER, rows)


if __name__ == "__main__":
    run_main(main)
