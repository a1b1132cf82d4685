"""How much each rounding of one problem may err, under a declared precision.

Symbols as in docs/error-budget.md: u is a unit roundoff (the largest relative error of one
rounding), eta the largest absolute error of an underflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_reference.precision import (
    INPUT,
    SMALLEST_NORMAL_FP32,
    UNDERFLOW,
    UNIT_ROUNDOFF,
    Precision,
)
from attn_reference.problem import Problem

# A probabilistic bound (Higham and Mary 2019) takes lambda sqrt(n) u where the worst case is
# n u; the chance that one sum exceeds it is below 2 exp(-lambda² / 2).
LAMBDA = 4.0
SMALLEST_NORMAL = {"fp64": 2.0**-1022, "fp32": 2.0**-126, "fp16": 2.0**-14, "bf16": 2.0**-126}
LARGEST = {"fp64": math.inf, "fp32": 3.4028234e38, "fp16": 65504.0, "bf16": 3.3895314e38}
SIXTEEN_BITS = ("fp16", "bf16")
OVERFLOW = 0.99  # of the largest number, from which on an intermediate may overflow
NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
# tf32 hardware reads the upper bits of an fp32 operand where nothing rounds it first.
TRUNCATION = 2.0


class Units:
    """The roundings of one problem under one precision."""

    def __init__(self, problem: Problem, precision: Precision) -> None:
        def named(role: str) -> str:
            return precision.dtype_of(role, problem.dtype)

        wide = problem.dtype == "fp64"
        flush = SMALLEST_NORMAL_FP32 if precision.flushes_subnormals and not wide else 0.0
        # Everything between two declared roundings. An fp64 oracle errs as much as its subject.
        self.u = 2 * UNIT_ROUNDOFF["fp64"] if wide else UNIT_ROUNDOFF["fp32"]
        self.exp = precision.exp_error if problem.dtype in SIXTEEN_BITS else 0.0
        self.tanh = precision.tanh_error
        self.flush = flush
        # Exponentials give 0 rather than subnormals on most hardware.
        self.exp_underflow = SMALLEST_NORMAL["fp64" if wide else "fp32"]

        self.u_out = UNIT_ROUNDOFF[problem.dtype]
        self.eta_out = max(UNDERFLOW[problem.dtype], flush)

        probabilities = named("probabilities")
        self.u_p = self.u if probabilities in ("fp32", "fp64") else UNIT_ROUNDOFF[probabilities]
        self.eta_p = max(UNDERFLOW.get(probabilities, 0.0), flush, self.exp_underflow)
        self.largest_p = LARGEST.get(probabilities, LARGEST["fp32"])
        self.normal_p = SMALLEST_NORMAL.get(probabilities, self.exp_underflow)

        # Some fused kernels form dS from the P that they stored for dV.
        gradient_p = named("gradient_probabilities")
        narrow_p = gradient_p in SIXTEEN_BITS
        self.u_gradient_p = UNIT_ROUNDOFF[gradient_p] if narrow_p else 0.0
        self.eta_gradient_p = max(UNDERFLOW[gradient_p], flush) if narrow_p else 0.0
        self.normal_gradient_p = SMALLEST_NORMAL[gradient_p] if narrow_p else 0.0

        scores = named("scores")
        # Unfused attention writes every step to memory in the dtype of its scores.
        self.unfused = scores in SIXTEEN_BITS
        self.u_s = UNIT_ROUNDOFF[scores] if self.unfused else 0.0
        self.eta_s = UNDERFLOW[scores] if self.unfused else 0.0
        self.largest_score = LARGEST[scores] if self.unfused else math.inf

        # Operands of products: q, k, v and dOut; and P and dS when they are kept wide.
        products = named("products")
        narrow = UNIT_ROUNDOFF[products]
        self.u_operand = TRUNCATION * narrow if narrow > self.u_out else 0.0
        declared = precision.products != INPUT
        self.u_operand_p = TRUNCATION * narrow if declared and narrow > self.u_p else 0.0

        def accumulator(role: str) -> float:
            return UNIT_ROUNDOFF[named(role)] if named(role) in SIXTEEN_BITS else 0.0

        self.u_sum = {name: accumulator(f"accumulate_{name}") for name in ("out", "dq", "dk", "dv")}
        self.eta_sum = {
            name: UNDERFLOW[named(f"accumulate_{name}")] if u else 0.0
            for name, u in self.u_sum.items()
        }
        self.largest_sum = {
            name: LARGEST[named(f"accumulate_{name}")] if u else math.inf
            for name, u in self.u_sum.items()
        }
        self.block = precision.accumulate_rows

        dropout = problem.dropout > 0
        softcap = problem.softcap > 0
        self.scale = abs(problem.softmax_scale)
        self.keep = 1 / (1 - problem.dropout)
        # Unfused: P is stored, and stored again after dropout, whose factor is rounded too. Some
        # fused kernels do the same where they keep a tile of P.
        drops_stored = self.unfused or precision.drops_stored_probabilities
        self.p_roundings = 3 if drops_stored and dropout else 1
        self.p_underflows = 2 if drops_stored and dropout else 1  # of P, and of the product
        self.dp_roundings = 3 if self.unfused and dropout else 1
        # Unfused: dS, then its scaling, and the three steps of the softcap are stored.
        self.ds_roundings = (2 + 3 * softcap) if self.unfused else 1
        self.u_ds = max(self.u_s, self.u_p)

    def gamma(self, count: int, slack: float) -> float:
        """Relative error, to the sum of magnitudes, of a sum of ``count`` numbers; ``slack``
        counts the single operations (scale, division, rescaling) that go with it."""
        return LAMBDA * (math.sqrt(count) + slack) * self.u


def block_sums(
    left: Tensor, right: Tensor, block: int, u: float, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a narrow accumulator loses on left @ right, and the largest sum that it holds.

    left (..., m, n), right (n, p) or (..., n, p); it is rounded, by u, after every ``block``
    terms of the sum over n, which goes on from ``start``. Both results are (..., m, p).
    """
    total = left[..., :0] @ right[..., :0, :] if start is None else start
    lost, largest = torch.zeros_like(total), torch.zeros_like(total)
    for first in range(0, left.shape[-1], block):
        part = slice(first, first + block)
        total = total + left[..., part] @ right[..., part, :]
        lost = lost + u * total.abs()
        largest = torch.maximum(largest, total.abs())
    return lost, largest
