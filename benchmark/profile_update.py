"""Where the time of a training step of sac_continuous.py goes, by PyTorch's profiler.

Example:
    python benchmark/profile_update.py --threads 1 2 --out profile.json

Profiles updates on random data, plain and compiled, and adds up what each kind of operation took by itself. The
profiler's own cost, about a microsecond an operation, makes what is not a matrix product look larger than it is. Of the
compiled losses and gradients it sees the whole alone; the products in it are those of the plain update. Acting and the
environment's step are timed by themselves.
"""

import os
import time
from pathlib import Path

from ablation import SCRIPT, Trainer, column
from errors import Parser, UserError, run_main
from throughput import Record, machine

KINDS = {
    "matrix products": "aten::mm aten::bmm aten::addmm aten::baddbmm",
    "ReLU and its backward": "aten::relu_ aten::clamp_min_ aten::threshold_backward",
    "optimisers": "Optimizer.step#Adam.step aten::_fused_adam_ aten::_foreach_add_ aten::add_",
    "sums: bias gradients, last layer, log-probabilities": "aten::sum",
    "copies, concatenation, allocation": "aten::copy_ aten::cat aten::empty aten::empty_strided aten::_to_copy",
    "other elementwise operations": "aten::mul aten::add aten::sub aten::rsub aten::exp aten::tanh aten::pow"
    " aten::neg aten::div aten::softplus aten::clamp aten::min aten::mean aten::abs aten::gt aten::tanh_backward",
    "targets' move": "aten::_foreach_lerp_ aten::lerp_",
    "sampling": "aten::random_ aten::index_select aten::normal_ aten::randint aten::randn",
}
COMPILED = "compiled losses and gradients"
REST = "autograd, views and dispatch"
PYTHON = "Python, and the profiler itself"
OUTSIDE = "acting and the environment"
WARM_UP = 50  # updates


def milliseconds(function, times: int) -> float:
    """Of one call."""
    started = time.perf_counter()
    for _ in range(times):
        function()
    return 1000 * (time.perf_counter() - started) / times


def profile(trainer: Trainer, updates: int) -> dict[str, float]:
    """Milliseconds an update by kind of operation."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        whole = milliseconds(trainer.update, updates)
    kind_of = {name: kind for kind, names in KINDS.items() for name in names.split()}
    times = dict.fromkeys([*KINDS, COMPILED, REST], 0.0)
    for event in profiler.key_averages():
        kind = COMPILED if event.key.startswith("## Call CompiledFxGraph") else kind_of.get(event.key, REST)
        times[kind] += event.self_cpu_time_total / 1000 / updates
    return times | {PYTHON: whole - sum(times.values())}


def outside(trainer: Trainer, steps: int) -> float:
    """Milliseconds that it takes to act and to step HalfCheetah-v4, a step."""
    import numpy as np

    env = trainer.sac["make_env"](trainer.args)
    obs = env.reset(seed=0)[0].astype(np.float32)

    def step():
        nonlocal obs
        obs = env.step(trainer.agent.act(obs))[0].astype(np.float32)

    return milliseconds(step, min(steps, 1000))  # an episode's length


def measure(threads: int, compiled: bool, updates: int) -> dict:
    trainer = Trainer(SCRIPT, threads, compiled)
    trainer.set_up()
    milliseconds(trainer.update, WARM_UP)
    update_ms = milliseconds(trainer.update, updates)
    kinds = profile(trainer, updates) | {OUTSIDE: outside(trainer, updates)}
    return {"threads": threads, "compiled": compiled, "update_ms": update_ms, "by_kind_ms": kinds}


def main() -> None:
    parser = Parser("Show where the time of a training step of sac_continuous.py goes.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="CPU threads, each count in turn")
    parser.add_argument("--updates", type=int, default=500, help="updates profiled, and as many timed without")
    args = parser.parse_args()
    if args.updates < 1 or not all(1 <= threads <= machine()["cores"] for threads in args.threads):
        raise UserError(f"--updates {args.updates} --threads {args.threads}: at least 1, and at most a thread a core")
    record = Record(args.out, {"machine": machine(), "settings": {"threads": args.threads, "updates": args.updates}})
    available = os.sched_getaffinity(0)
    for threads in args.threads:
        os.sched_setaffinity(0, sorted(available)[:threads])
        for compiled in (False, True):
            record.add(measure(threads, compiled, args.updates))
    names = [column(result["threads"], result["compiled"]) for result in record.results]
    print("| ms |", " | ".join(names), "|\n| --- |", " | ".join("---:" for _ in names), "|")
    for kind in (*KINDS, COMPILED, REST, PYTHON, OUTSIDE):
        values = [result["by_kind_ms"][kind] for result in record.results]
        print(f"| {kind} |", " | ".join(f"{value:.2f}" if value else "" for value in values), "|")
    print("| an update, not profiled |", " | ".join(f"{result['update_ms']:.2f}" for result in record.results), "|")


if __name__ == "__main__":
    run_main(main)
