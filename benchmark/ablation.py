"""Measures what each trick in sac_continuous.py buys: the time of an update with it and with it undone.

Example:
    python benchmark/ablation.py --threads 1 2 --out ablation.json

A trick is undone in a copy of the script, by putting other text in place of its own. Script and copy take turns every
few updates in one process, so that a machine whose speed drifts is as fast for both; the median of the ratios counts.
(Adam that is not fused reads its learning rate out of a tensor at every parameter, which is part of its cost here.)
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
UNDONE = {
    "one ensemble of critics": [
        (
            "torch.baddbmm(bias, x, weight)",
            "torch.stack([torch.addmm(b, y, w) for b, y, w in zip(bias, x, weight, strict=True)])",
        )
    ],
    "gradients of the parameters at hand alone": [
        (
            "for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):\n"
            "        parameter.grad = gradient",
            "for parameter in parameters:\n        parameter.grad = None\n    loss.backward()",
        )
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
            "gradient_step(self.optimizers['temperature'],"
            " temperature_loss(self.log_temperature, log_prob, self.target_entropy))",
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


def trainer(script: Path, threads: int):
    """A function that makes an update, and one that sets PyTorch up as the script does."""
    import torch

    sac = runpy.run_path(str(script), run_name="sac_continuous")
    args = sac["Args"](device="cpu", torch_threads=threads)
    torch.manual_seed(1)
    agent = sac["Agent"](args, OBS_DIM, ACTION_DIM, torch.device("cpu"))
    buffer = sac["ReplayBuffer"](100_000, OBS_DIM, ACTION_DIM, torch.device("cpu"))
    buffer.rows.normal_()
    buffer.rows[:, -1] = 0  # terminated
    buffer.num_added = len(buffer.rows)

    def set_up():
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        sac["set_up_torch"](args)

    return lambda: agent.update(buffer, 0.0), set_up


def compare(script: Path, other: Path, threads: int, turns: int) -> tuple[list[float], list[float]]:
    """Milliseconds an update of each, turn by turn."""
    trainers = [trainer(path, threads) for path in (script, other)]
    times = [], []
    for turn in range(-5, turns):  # the first ones allocate
        for (update, set_up), result in zip(trainers, times, strict=True):
            set_up()
            update()  # the caches are the other's
            started = time.perf_counter()
            for _ in range(TURN):
                update()
            if turn >= 0:
                result.append(1000 * (time.perf_counter() - started) / TURN)
    return times


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
        for trick in UNDONE:
            other.write_text(undo(trick))
            for threads in args.threads:
                ours, without = compare(SCRIPT, other, threads, args.turns)
                ratio = statistics.median(b / a for a, b in zip(ours, without, strict=True))
                medians = {"ms": statistics.median(ours), "ms_without": statistics.median(without)}
                record.add({"trick": trick, "threads": threads, **medians, "ratio": ratio})
    print("| Trick |", " | ".join(f"{n} thread{'s' * (n > 1)}" for n in args.threads), "|")
    print("| --- |", " | ".join("---:" for _ in args.threads), "|")
    for trick in UNDONE:
        ratios = [one["ratio"] for one in record.results if one["trick"] == trick]
        print(f"| {trick} |", " | ".join(f"{ratio - 1:+.1%}" for ratio in ratios), "|")


if __name__ == "__main__":
    run_main(main)
