"""Measures what each trick in sac_continuous.py buys: the time of an update with it and with it undone.

Example:
    python benchmark/ablation.py --threads 1 2 --out ablation.json

A trick is undone in a copy of the script, by putting other text in place of its own. Script and copy take turns every
few updates in one process, so that a machine whose speed drifts is as fast for both; the median of the ratios counts.
Each trick is measured in the compiled update and in the plain one. (Adam that is not fused reads its learning rate out
of a tensor at every parameter, which is part of its cost here.)
"""

import runpy
import statistics
import tempfile
import time
from pathlib import Path

from errors import Parser, UserError, run_main
from grid import ROOT
from throughput import Record, machine

SCRIPT = ROOT / "sac_continuous.py"
OBS_DIM, ACTION_DIM = 17, 6  # HalfCheetah-v4
TURN = 20  # updates
COMPILED = "compiled to C++"
UNDONE = {
    "one ensemble of critics": [
        (
            "torch.baddbmm(bias, x, weight)",
            "torch.stack([torch.addmm(b, y, w) for b, y, w in zip(bias, x, weight, strict=True)])",
        )
    ],
    "gradients of the parameters at hand alone": [
        ('torch.autograd.grad(loss, self.parameters_of["critic"])', 'backward(loss, self.parameters_of["critic"])'),
        ('torch.autograd.grad(both, self.parameters_of["actor"])', 'backward(both, self.parameters_of["actor"])'),
        (
            "@torch.no_grad()\ndef move_target(",
            "def backward(loss, parameters):\n"
            "    for parameter in parameters:\n        parameter.grad = None\n"
            "    loss.backward()\n    return [parameter.grad for parameter in parameters]\n\n\n"
            "@torch.no_grad()\ndef move_target(",
        ),
    ],
    "fused Adam": [("fused=True, ", "")],
    "one pass over all targets": [
        (
            "torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)",
            "for t, p in zip(target.parameters(), online.parameters(), strict=True):\n        t.lerp_(p, tau)",
        )
    ],
    "one step for actor and temperature": [
        ('groups["actor"].append(group("temperature"', 'groups["temperature"] = (group("temperature"'),
        ("args.temperature_lr))", "args.temperature_lr),)"),
        (
            "both = loss + temperature_loss(self.log_temperature, log_prob, self.target_entropy)",
            "(self.log_temperature.grad,) = torch.autograd.grad("
            "temperature_loss(self.log_temperature, log_prob, self.target_entropy), self.log_temperature)\n"
            "            self.optimizers['temperature'].step()",
        ),
    ],
    "ReLU in place": [("functools.partial(nn.ReLU, inplace=True)", "nn.ReLU")],
    "last layer without a matrix product": [
        (
            "torch.linalg.vecdot(x, last_weight.mT) + last_bias.squeeze(-1)",
            "torch.baddbmm(last_bias, x, last_weight).squeeze(-1)",
        )
    ],
    "no copies for a single sample": [
        (
            "x.expand(args.num_actor_samples, -1, -1).flatten(0, 1) for x in",
            "x.repeat(args.num_actor_samples, 1) for x in",
        )
    ],
    "oneDNN's matrix products on AMD": [('torch.backends.mkldnn.matmul.fp32_precision = "bf16"', "pass")],
}


def undo(trick: str) -> str:
    """The script's text without the trick. Raises UserError if the trick is not where it was."""
    text = SCRIPT.read_text()
    for own, other in UNDONE[trick]:
        if text.count(own) != 1:
            raise UserError(f"{SCRIPT.name}: {trick}: {own!r} is not in it once; mend UNDONE in {Path(__file__).name}")
        text = text.replace(own, other)
    return text


class Trainer:
    """An agent of a script, which updates itself on random data."""

    def __init__(self, script: Path, threads: int, compiled: bool):
        import torch

        self.sac = runpy.run_path(str(script), run_name="sac_continuous")
        self.args = self.sac["Args"](device="cpu", torch_threads=threads, compile="always" if compiled else "never")
        torch.manual_seed(1)
        self.agent = self.sac["Agent"](self.args, OBS_DIM, ACTION_DIM, torch.device("cpu"))
        self.buffer = self.sac["ReplayBuffer"](100_000, OBS_DIM, ACTION_DIM, torch.device("cpu"))
        self.buffer.rows.normal_()
        self.buffer.rows[:, -1] = 0  # terminated
        self.buffer.num_added = len(self.buffer.rows)

    def set_up(self) -> None:
        """PyTorch as the script sets it up."""
        import torch

        torch.backends.mkldnn.matmul.fp32_precision = "none"
        self.sac["set_up_torch"](self.args)

    def update(self) -> None:
        self.agent.update(self.buffer, 0.0)


def compare(trainers: list[Trainer], turns: int) -> list[list[float]]:
    """Milliseconds an update of each, turn by turn."""
    times = [[] for _ in trainers]
    for turn in range(-5, turns):  # the first ones compile and allocate
        for trainer, result in zip(trainers, times, strict=True):
            trainer.set_up()
            trainer.update()  # the caches are the other's
            started = time.perf_counter()
            for _ in range(TURN):
                trainer.update()
            if turn >= 0:
                result.append(1000 * (time.perf_counter() - started) / TURN)
    return times


def measure(trick: str, other: Path, threads: int, compiled: bool, turns: int) -> dict:
    """What the trick buys, or that the update without it cannot be compiled."""
    without = Trainer(SCRIPT, threads, False) if trick == COMPILED else Trainer(other, threads, compiled)
    trainers = [Trainer(SCRIPT, threads, compiled), without]
    times = compare(trainers, turns)
    what = {"trick": trick, "threads": threads, "compiled": compiled}
    if compiled and trick != COMPILED and not without.agent.compiled:
        return what | {"ratio": None}
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    ms, ms_without = (statistics.median(one) for one in times)
    return what | {"ms": ms, "ms_without": ms_without, "ratio": ratio}


def column(threads: int, compiled: bool) -> str:
    return f"{threads} thread{'s' * (threads > 1)}, {'compiled' if compiled else 'plain'}"


def main() -> None:
    parser = Parser("Measure what each trick in sac_continuous.py buys.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="CPU threads, each count in turn")
    parser.add_argument("--turns", type=int, default=50, help=f"of {TURN} updates each, per trick")
    args = parser.parse_args()
    if args.turns < 1 or not all(1 <= threads <= machine()["cores"] for threads in args.threads):
        raise UserError(f"--turns {args.turns} --threads {args.threads}: at least 1, and at most a thread a core")
    record = Record(args.out, {"machine": machine(), "settings": {"threads": args.threads, "turns": args.turns}})
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "undone.py")
        for trick in (COMPILED, *UNDONE):
            if trick != COMPILED:
                other.write_text(undo(trick))
            for threads in args.threads:
                for compiled in (True, False)[: 1 if trick == COMPILED else 2]:
                    record.add(measure(trick, other, threads, compiled, args.turns))
    columns = [(threads, compiled) for threads in args.threads for compiled in (True, False)]
    names = [column(*one) for one in columns]
    print("| Trick |", " | ".join(names), "|\n| --- |", " | ".join("---:" for _ in columns), "|")
    ratios = {(one["trick"], one["threads"], one["compiled"]): one["ratio"] for one in record.results}
    for trick in (COMPILED, *UNDONE):
        cells = [ratios.get((trick, *column)) for column in columns]
        print(f"| {trick} |", " | ".join(f"{ratio - 1:+.1%}" if ratio else "" for ratio in cells), "|")


if __name__ == "__main__":
    run_main(main)
