"""Writes a table of the critics' over-estimation: Q at the first state of evaluation episodes against their return.

Example:
    python benchmark/overestimation.py benchmark/results/hopper*

Both are means over the second half of training, then over seeds, with the deviation over seeds. With a fixed
temperature and --no-backup-entropy, Q estimates the plain discounted return, so that the difference is an error.
"""

import numpy as np
from curves import Curve, group, read_curves
from errors import Parser, run_main
from table import print_table, spread

HEADER = ("environment", "runs", "seeds", "final return", "Q at the start", "discounted return", "over-estimation")


def second_half(curve: Curve, column: str) -> float:
    return float(np.nanmean(curve[column][len(curve["step"]) // 2 :]))


def main() -> None:
    parser = Parser("Write a table of how far the critics over-estimate.")
    parser.add_argument("paths", nargs="+", help="run folders, or folders above them; or LABEL=PATH")
    groups = group(read_curves(parser.parse_args().paths))
    rows = []
    for env_id, by_label in groups.items():
        for label, curves in by_label.items():
            q = [second_half(curve, "eval_q_mean") for curve in curves]
            returns = [second_half(curve, "eval_discounted_return_mean") for curve in curves]
            errors = [a - b for a, b in zip(q, returns, strict=True)]
            finals = [float(curve["eval_return_mean"][-1]) for curve in curves]
            rows.append([env_id, label, str(len(curves)), *map(spread, (finals, q, returns, errors))])
    print_table(HEADER, rows)


if __name__ == "__main__":
    run_main(main)
