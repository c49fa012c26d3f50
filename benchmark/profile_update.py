"""Where the time of a training step of sac_continuous.py goes, by PyTorch's profiler.

Example:
    python benchmark/profile_update.py --threads 1 --out profile.json

Trains with the profiler on and adds up what each kind of operation took by itself. The profiler's own cost, about a
microsecond an operation, makes what is not a matrix product look larger than it is. The few operations of acting and of
the two short evaluations are counted with an update's.
"""

import csv
import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

from errors import Parser, UserError, run_main
from grid import ROOT, to_arguments

SCRIPT = ROOT / "sac_continuous.py"
KINDS = {
    "matrix products": "aten::mm aten::bmm aten::addmm aten::baddbmm",
    "ReLU and its backward": "aten::relu_ aten::clamp_min_ aten::threshold_backward",
    "optimisers": "Optimizer.step#Adam.step aten::_fused_adam_ aten::_foreach_add_",
    "sums: bias gradients, last layer, log-probabilities": "aten::sum",
    "copies, concatenation, allocation": "aten::copy_ aten::cat aten::empty aten::empty_strided aten::_to_copy",
    "other elementwise operations": "aten::mul aten::add aten::sub aten::rsub aten::add_ aten::exp aten::tanh aten::pow"
    " aten::neg aten::div aten::softplus aten::clamp aten::min aten::mean aten::abs aten::gt aten::tanh_backward",
    "targets' move": "aten::_foreach_lerp_ aten::lerp_",
    "sampling": "aten::random_ aten::index_select aten::normal_ aten::randint aten::randn",
}
REST = "autograd, views and dispatch"


def profile(settings: dict, run_dir: Path) -> tuple[dict[str, float], list[dict]]:
    """Runs the script in this process. Returns microseconds by kind of operation, and the rows of progress.csv."""
    import torch

    argv, sys.argv = sys.argv, [str(SCRIPT), *to_arguments(settings | {"run-dir": run_dir})]
    stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        if end.code:  # it has said why
            raise
    finally:
        sys.argv, sys.stdout = argv, stdout
    kind_of = {name: kind for kind, names in KINDS.items() for name in names.split()}
    times = dict.fromkeys([*KINDS, REST], 0.0)
    for event in profiler.key_averages():
        times[kind_of.get(event.key, REST)] += event.self_cpu_time_total
    with open(run_dir / "progress.csv", newline="") as file:
        return times, list(csv.DictReader(file))


def main() -> None:
    parser = Parser("Show where the time of a training step of sac_continuous.py goes.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--env-id", default="HalfCheetah-v4", help="environment")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=500, help="steps without updates, and then as many with them")
    args = parser.parse_args()
    if args.steps < 1 or not 1 <= args.threads <= len(os.sched_getaffinity(0)):
        raise UserError(f"--steps {args.steps} --threads {args.threads}: at least 1, and at most a thread a core")
    settings = {
        "env-id": args.env_id,
        "total-steps": 2 * args.steps,
        "random-steps": 0,  # the first half acts without learning
        "learning-starts": args.steps,
        "eval-every": args.steps,
        "eval-episodes": 1,
        "max-episode-steps": min(args.steps, 100),
        "torch-threads": args.threads,
        "device": "cpu",
    }
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        times, (acting, learning) = profile(settings, Path(folder, "run"))
        wall_s = time.perf_counter() - started
    acting_ms, step_ms = (1000 / float(row["steps_per_s"]) for row in (acting, learning))
    milliseconds = {kind: time / 1000 / args.steps for kind, time in times.items()}
    result = {"settings": settings, "wall_s": wall_s, "acting_and_environment_ms": acting_ms, "step_ms": step_ms}
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result | {"update_ms": milliseconds}, indent=1))
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    print("| Of a step | ms | share |\n| --- | ---: | ---: |")
    python_ms = step_ms - acting_ms - sum(milliseconds.values())
    rows = milliseconds | {"acting and the environment": acting_ms, "Python, and the profiler itself": python_ms}
    for kind, value in sorted(rows.items(), key=lambda row: -row[1]):
        print(f"| {kind} | {value:.2f} | {value / step_ms:.0%} |")


if __name__ == "__main__":
    run_main(main)
