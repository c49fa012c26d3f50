"""Tests whether the final returns of the first group of runs are significantly below those of the second.

Example:
    python benchmark/compare.py ours=benchmark/results/sac_100k sb3=benchmark/results/peers

One-sided Welch test over seeds, per environment, of their last evaluations, or of the means of their last N: p below
0.05 would mean significantly below. Beside it the 95 % interval of the difference, first group minus second.
"""

from curves import group, read_curves
from errors import Parser, UserError, run_main
from scipy import stats
from table import print_table, spread


def main() -> None:
    parser = Parser("One-sided Welch test: are the first runs' final returns below the second's?")
    parser.add_argument("paths", nargs=2, help="LABEL=PATH, the second one the group to compare with")
    parser.add_argument("--last", type=int, default=1, metavar="N", help="compare means of the last N evaluations")
    args = parser.parse_args()
    if args.last < 1:
        raise UserError(f"--last {args.last}: must be at least 1")
    found = read_curves(args.paths)
    groups = {env_id: by_label for env_id, by_label in group(found).items() if len(by_label) == 2}
    if not groups or len({curve.label for curve in found}) > 2:
        raise UserError("no environment has runs of both groups, or there is a third one: give each as LABEL=PATH")
    rows = []
    for env_id, by_label in groups.items():
        last_steps = sorted({int(curve["step"][-1]) for curves in by_label.values() for curve in curves})
        if len(last_steps) > 1:
            raise UserError(f"{env_id}: the runs end at different steps, {last_steps}")
        finals = [[curve["eval_return_mean"][-args.last :].mean() for curve in curves] for curves in by_label.values()]
        if min(map(len, finals)) < 2:
            raise UserError(f"{env_id}: a Welch test needs two seeds or more of each group")
        p = stats.ttest_ind(*finals, equal_var=False, alternative="less").pvalue
        low, high = stats.ttest_ind(*finals, equal_var=False).confidence_interval()
        shown = [f"{p:.2f}", f"{low:.0f} to {high:.0f}"], ["", ""]
        for label, values, of_both in zip(by_label, finals, shown, strict=True):
            rows.append([env_id, label, str(len(values)), spread(values, 0), *of_both])
    print_table(("environment", "group", "seeds", "final return", "p of the Welch test", "difference"), rows)


if __name__ == "__main__":
    run_main(main)
