"""Tests whether the final returns of the first group of runs are significantly below those of the second.

Example:
    python benchmark/compare.py ours=benchmark/results/sac_100k sb3=benchmark/results/peers

One-sided Welch test over seeds, per environment: p below 0.05 would mean significantly below. Beside it the 95 %
interval of the difference, first group minus second.
"""

import numpy as np
from curves import group, read_curves
from errors import Parser, UserError, run_main
from scipy import stats


def main() -> None:
    parser = Parser("One-sided Welch test: are the first runs' final returns below the second's?")
    parser.add_argument("paths", nargs=2, help="LABEL=PATH, the second one the group to compare with")
    groups = group(read_curves(parser.parse_args().paths))
    groups = {env_id: by_label for env_id, by_label in groups.items() if len(by_label) == 2}
    if not groups:
        raise UserError("no environment has runs of both groups, and of no third: give each as LABEL=PATH")
    print(
        "| environment | group | seeds | final return | p of the Welch test | difference |",
        "| --- | --- | --- | --- | --- | --- |",
        sep="\n",
    )
    for env_id, by_label in groups.items():
        finals = [[curve["eval_return_mean"][-1] for curve in curves] for curves in by_label.values()]
        if min(map(len, finals)) < 2:
            raise UserError(f"{env_id}: a Welch test needs two seeds or more of each group")
        p = stats.ttest_ind(*finals, equal_var=False, alternative="less").pvalue
        low, high = stats.ttest_ind(*finals, equal_var=False).confidence_interval()
        for label, values, shown in zip(by_label, finals, (f"{p:.2f} | {low:.0f} to {high:.0f}", " |"), strict=True):
            result = f"{np.mean(values):.0f} ± {np.std(values, ddof=1):.0f}"
            print(f"| {env_id} | {label} | {len(values)} | {result} | {shown} |")


if __name__ == "__main__":
    run_main(main)
