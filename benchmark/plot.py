"""Draws learning curves: one panel an environment, the mean or interquartile mean over seeds with its 95 % interval.

Example:
    python benchmark/plot.py runs/sac_mujoco --published benchmark/published.csv --out curves
    python benchmark/plot.py runs/sac_mujoco --normalise "Tianshou SAC" --out scores.png
    python benchmark/plot.py runs/sac_mujoco/HalfCheetah-v4__1 --out run.svg

Intervals are percentile bootstrap intervals over seeds; a single seed has none. The interquartile mean drops a
quarter of the seeds at each end, rounded down, so that below four seeds it is the mean. --normalise draws one panel
for all environments together: (return - random) / (published - random), seeds resampled within each environment, as
Agarwal et al. 2021 (arXiv:2108.13264) do. For the folder of a single run, without --column and --level, every column
of its progress.csv is drawn.
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: no window, no display needed

import matplotlib.pyplot as plt
import numpy as np
from curves import Curve, group, read_curves, read_published, without_version
from errors import Parser, UserError, run_main
from matplotlib.ticker import EngFormatter

# Okabe and Ito's colours, told apart with every kind of colour vision; dashes tell them apart in black and white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 2)))
MARKERS = "osD^v<>"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "benchmark",
}
RESAMPLES = 2000
HERE = Path(__file__).parent


def mean(*samples: np.ndarray, axis: int) -> np.ndarray:
    return np.concatenate(samples, axis=axis).mean(axis)


def interquartile_mean(*samples: np.ndarray, axis: int) -> np.ndarray:
    values = np.sort(np.concatenate(samples, axis=axis), axis=axis)
    dropped, count = values.shape[axis] // 4, values.shape[axis]
    return values.take(range(dropped, count - dropped), axis=axis).mean(axis)


STATISTICS = {"mean": mean, "iqm": interquartile_mean}


def with_interval(samples: list[np.ndarray], statistic) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The statistic over all samples, (seeds, points) each, and its 95 % bootstrap interval. Each is (points,).

    A sample is resampled within itself. Without a second seed there is no interval: low and high are the statistic.
    """
    value = statistic(*samples, axis=0)
    if min(map(len, samples)) < 2:
        return value, value, value
    rng = np.random.default_rng(0)
    draws = [sample[rng.integers(len(sample), size=(RESAMPLES, len(sample)))] for sample in samples]
    low, high = np.quantile(statistic(*draws, axis=1), [0.025, 0.975], axis=0)
    return value, low, high


def align(curves: list[Curve], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (points,) up to which all curves go, and their values there, (curves, points)."""
    first, last = max(curve["step"][0] for curve in curves), min(curve["step"][-1] for curve in curves)
    steps = np.unique(np.concatenate([curve["step"] for curve in curves]))
    steps = steps[(steps >= first) & (steps <= last)]
    if not len(steps):
        raise UserError(f"{curves[0].path} and others of {curves[0].label}: have no range of steps in common")
    return steps, np.stack([np.interp(steps, curve["step"], curve[column]) for curve in curves])


def draw(axes, index: int, label: str, steps: np.ndarray, interval: tuple) -> None:
    value, low, high = interval
    colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    marker = "o" if np.isfinite(value).sum() == 1 else None
    axes.plot(steps, value, color=colour, linestyle=dashes, marker=marker, label=label)
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def draw_levels(axes, levels: list[tuple[str, float]], labels: list[str]) -> None:
    """A grey line across the panel for each, with its label's marker on it, apart from those of its neighbours."""
    for i, (label, value) in enumerate(levels):
        axes.plot(
            [0, (i + 0.5) / len(levels), 1],  # in widths of the panel
            [value] * 3,
            transform=axes.get_yaxis_transform(),
            color="#555555",
            linewidth=0.8,
            linestyle=(0, (1, 1.5)),
            marker=MARKERS[labels.index(label) % len(MARKERS)],
            markersize=5,
            markevery=[1],
            label=label,
        )


def make_panels(count: int, width: float = 3.4, height: float = 2.6):
    """A figure of at most three panels in a row, four as a square; returns it and its axes in reading order."""
    columns = 2 if count == 4 else min(3, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    for panel in axes.flat[:count]:
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure, list(axes.flat[:count])


def add_legend(figure, panels: list) -> None:
    handles = {}
    for panel in panels:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    widest = max(map(len, handles)) * 0.075 + 0.6  # inches, about
    columns = max(1, min(len(handles), int(figure.get_figwidth() / widest)))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(handles) / columns))


def levels_of_published(path: Path) -> list[tuple[str, str, float]]:
    """(environment without its version, label, return)"""
    results = read_published(path)
    labels = [
        f"{result.source}, {'best up to' if result.is_best else 'at'} {EngFormatter(sep='')(result.steps)} steps"
        for result in results
    ]
    return [(result.env, label, result.return_mean) for result, label in zip(results, labels, strict=True)]


def levels_of_runs(argument: str, column: str) -> list[tuple[str, str, float]]:
    """LABEL=PATH[:COLUMN] -> the mean over seeds of the last row, for each environment, as above."""
    path, _, named = argument.partition(":")
    return [
        (without_version(env_id), label, float(np.mean([curve[named or column][-1] for curve in seeds])))
        for env_id, by_label in group(read_curves([path])).items()
        for label, seeds in by_label.items()
    ]


def plot_environments(curves: list[Curve], column: str, statistic, levels: list[tuple[str, str, float]]):
    groups = group(curves)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    names = list(dict.fromkeys(label for _, label, _ in levels))
    figure, panels = make_panels(len(groups))
    for panel, (env_id, by_label) in zip(panels, groups.items(), strict=True):
        for label, seeds in by_label.items():
            steps, values = align(seeds, column)
            draw(panel, labels.index(label), label, steps, with_interval([values], statistic))
        draw_levels(panel, [(label, value) for env, label, value in levels if env == without_version(env_id)], names)
        panel.set(title=env_id, xlabel="step", ylabel=column.replace("_", " "))
    add_legend(figure, panels)
    return figure


def plot_normalised(curves: list[Curve], column: str, statistic, source: str):
    """Scores over all environments together: 0 is the uniformly random policy, 1 the published source."""
    everything = read_published(HERE / "published.csv")
    one = {result.env: result.return_mean for result in everything if result.source == source}
    zero = {result.env: result.return_mean for result in read_published(HERE / "random_policy.csv")}
    if not one:
        raise UserError(f"--normalise {source}: not a source of {', '.join({result.source for result in everything})}")
    env_ids = sorted({curve.env_id for curve in curves})
    for env_id in env_ids:
        if without_version(env_id) not in one.keys() & zero.keys():
            raise UserError(f"--normalise {source}: has no return, or the random policy has none, for {env_id}")

    figure, panels = make_panels(1, width=4.5, height=3.4)
    for index, label in enumerate(dict.fromkeys(curve.label for curve in curves)):
        of_label = [curve for curve in curves if curve.label == label]
        steps, values = align(of_label, column)
        samples = []  # for each environment (seeds, points)
        for env_id in env_ids:
            env = without_version(env_id)
            seeds = values[[curve.env_id == env_id for curve in of_label]]
            if not len(seeds):
                raise UserError(f"--normalise: {label} has no run on {env_id}, give the same environments for all")
            samples.append((seeds - zero[env]) / (one[env] - zero[env]))
        draw(panels[0], index, label, steps, with_interval(samples, statistic))
    panels[0].set(title=f"{len(env_ids)} environments", xlabel="step", ylabel=f"score (0: random, 1: {source})")
    add_legend(figure, panels)
    return figure


def plot_run(curve: Curve):
    """Every column of one run on a page; a column NAME_std becomes the band around NAME_mean."""
    names = [name for name in curve.columns if name != "step" and not name.endswith("_std")]
    names = [name for name in names if np.isfinite(curve[name]).any()]
    if not names:
        raise UserError(f"{curve.path}: its progress.csv has nothing to draw")
    figure, panels = make_panels(len(names), height=2.2)
    for panel, name in zip(panels, names, strict=True):
        values = curve[name]
        deviation = curve.columns.get(name.removesuffix("_mean") + "_std", np.zeros_like(values))
        draw(panel, 0, name, curve["step"], (values, values - deviation, values + deviation))
        panel.set(title=name.replace("_", " "), xlabel="step")
    figure.suptitle(f"{curve.env_id}, seed {curve.seed}: {curve.path}")
    return figure


def save(figure, out: Path) -> None:
    """As the suffix says; without one, as PNG and as SVG."""
    for suffix in [out.suffix] if out.suffix else [".png", ".svg"]:
        try:
            path = out.with_suffix(suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=200)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
        except ValueError as error:
            raise UserError(f"--out {out}: {error}") from None
        print(path)


def main() -> None:
    parser = Parser("Draw learning curves, aggregated scores, or everything about one run.")
    parser.add_argument("paths", nargs="+", help="run folders, folders above them, LABEL_ENV_SEED.csv; or LABEL=PATH")
    parser.add_argument("--out", type=Path, required=True, help="figure; without a suffix both .png and .svg")
    parser.add_argument("--statistic", choices=tuple(STATISTICS), default="mean", help="over seeds")
    parser.add_argument("--column", help="of progress.csv (default: eval_return_mean; of a single run all of them)")
    parser.add_argument("--published", type=Path, help="draw the results of a CSV like benchmark/published.csv")
    parser.add_argument(
        "--level",
        action="append",
        default=[],
        metavar="LABEL=PATH[:COLUMN]",
        help="draw the last values of other runs, or of another column, as a horizontal line",
    )
    parser.add_argument(
        "--normalise",
        metavar="SOURCE",
        help="draw one panel of scores, where 1 is this source of benchmark/published.csv",
    )
    args = parser.parse_args()
    if args.normalise and (args.published or args.level):
        raise UserError("--normalise contradicts --published and --level: scores have a published source already")
    curves, statistic, column = read_curves(args.paths), STATISTICS[args.statistic], args.column or "eval_return_mean"
    is_one_run = (
        len(args.paths) == len(curves) == 1 and curves[0].path == Path(args.paths[0]) and curves[0].path.is_dir()
    )
    with plt.rc_context(STYLE):
        if args.normalise:
            figure = plot_normalised(curves, column, statistic, args.normalise)
        elif is_one_run and not (args.published or args.level or args.column):
            figure = plot_run(curves[0])
        else:
            levels = levels_of_published(args.published) if args.published else []
            levels += [level for argument in args.level for level in levels_of_runs(argument, column)]
            figure = plot_environments(curves, column, statistic, levels)
        save(figure, args.out)


if __name__ == "__main__":
    run_main(main)
