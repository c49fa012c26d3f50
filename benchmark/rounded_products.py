"""Trains sac_continuous.py with the rounding of --matmul-precision bf16, on any CPU.

Example:
    python benchmark/sweep.py benchmark/experiments/sac_rounded_products.yaml

Both operands of every matrix product are rounded to bfloat16, forwards and backwards, and multiplied in float32: what
bfloat16 units do, which multiply exactly and add up in float32, but for the order of the sums. Small products, which
may be left to other units, are rounded here too. It shows what that rounding costs in return, not what time it gains.
"""

import runpy

import torch
import torch.nn.functional as F
from grid import ROOT


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To the nearest bfloat16, ties to even. By its bits: a compiler takes x.bfloat16().float() for x."""
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


class Product(torch.autograd.Function):
    """x @ y (batched or not), and its gradients, of rounded operands."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return rounded(x) @ rounded(y)

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        of_x = rounded(gradient) @ rounded(y).mT if ctx.needs_input_grad[0] else None
        return of_x, rounded(x).mT @ rounded(gradient) if ctx.needs_input_grad[1] else None


def main() -> None:
    torch.baddbmm = lambda bias, x, weight: bias + Product.apply(x, weight)
    F.linear = lambda x, weight, bias: (
        Product.apply(x.reshape(-1, x.shape[-1]), weight.mT).view(*x.shape[:-1], -1) + bias
    )
    runpy.run_path(str(ROOT / "sac_continuous.py"), run_name="__main__")


if __name__ == "__main__":
    import rounded_products  # by its name: __main__ will be the script, and a compiler looks Product up

    rounded_products.main()
