"""Measures what each trick in sac_continuous.py buys: training steps a second with it and with it undone.

Example:
    python benchmark/ablation.py --threads 1 2 --out ablation.json

A trick is undone in a copy of the script, by putting other text in place of its own. The script as it is and all the
copies take turns; medians count.
"""

import tempfile
from pathlib import Path

from errors import UserError, run_main
from throughput import OURS, SCRIPT, Record, make_parser, measure_into_record, measure_ours, median_of

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


def measure_all(args, record: Record) -> None:
    with tempfile.TemporaryDirectory() as copies:
        scripts = {OURS: SCRIPT}
        for i, trick in enumerate(UNDONE):
            scripts[trick] = Path(copies, f"{i}.py")
            scripts[trick].write_text(undo(trick))
        for repeat in range(args.repeats):
            for threads in args.threads:
                for trick, script in scripts.items():
                    with tempfile.TemporaryDirectory() as folder:
                        result = measure_ours(args, threads, Path(folder), {}, script)
                    record.add({"without": trick, "threads": threads, "repeat": repeat, **result})


def main() -> None:
    args = make_parser("Measure what each trick in sac_continuous.py buys.").parse_args()
    results = measure_into_record(args, measure_all).results
    print("| Without |", " | ".join(f"{n} thread{'s' * (n > 1)}, steps/s | it buys" for n in args.threads), "|")
    print("| --- |", " | ".join("---: | ---:" for _ in args.threads), "|")
    for trick in (OURS, *UNDONE):
        cells = []
        for n in args.threads:
            whole, rate = (median_of(results, "steps_per_s", without=name, threads=n) for name in (OURS, trick))
            cells.append(f"{rate:.0f} | " + ("" if trick == OURS else f"{whole / rate - 1:+.0%}"))
        print(f"| {'nothing' if trick == OURS else trick} |", " | ".join(cells), "|")


if __name__ == "__main__":
    run_main(main)
