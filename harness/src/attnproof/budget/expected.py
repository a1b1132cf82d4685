"""What one tensor of an answer should be, and the comparison of what came with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Expected:
    """The fp64 answer for one tensor, and how far an honest result may be from it.

    All tensors have the shape of ``value`` unless said otherwise. A bound of infinity means
    that the declared precision leaves the element undetermined: it is not judged.
    """

    value: Tensor  # fp64: the oracle, not rounded
    bound: Tensor  # fp64: the largest honest |error|
    zero: Tensor  # bool: structurally zero (nothing visible contributes)
    exact: Tensor  # bool: known without rounding, so that the comparison is exact
    dtype: torch.dtype  # in which the result is stored
    sigma: Tensor | None = None  # fp64: standard deviation of the honest error, iid inputs only
    # Degrees of freedom of a row's mean square error, shape of ``value`` less the last dimension.
    freedom: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)  # the bound by term, when asked for

    @property
    def judged(self) -> Tensor:
        """Bool: the elements that the declared precision determines."""
        return torch.isfinite(self.bound) | ~torch.isfinite(self.value)


@dataclass(kw_only=True)
class Comparison:
    """An actual tensor beside the expected one; all tensors have their shape."""

    error: Tensor  # fp64: |actual - value|, NaN where the pattern of non-finite values differs
    ratio: Tensor  # fp64: error over bound; 0 where not judged, infinite where nothing is allowed
    wrong: Tensor  # bool: over the bound
    wrong_zero: Tensor  # bool: not zero where structurally zero
    wrong_exact: Tensor  # bool: not equal where the answer is exact
    wrong_pattern: Tensor  # bool: NaN or infinite where it should not be, or the reverse

    @property
    def worst(self) -> float:
        """The largest error over budget, 0 for an empty tensor."""
        return self.ratio.max().item() if self.ratio.numel() else 0.0

    @property
    def conforms(self) -> bool:
        """Whether every element does."""
        broken = self.wrong | self.wrong_zero | self.wrong_exact | self.wrong_pattern
        return not bool(broken.any())


def compare(expected: Expected, actual: Tensor) -> Comparison:
    """Element by element; ``actual`` has the shape of ``expected.value``, any floating dtype.

    A finite answer may overflow in the dtype that it is stored in: an infinity is right where
    value and bound reach beyond the largest number, and required where value less bound does.
    """
    value, bound = expected.value, expected.bound
    actual = actual.to(value.device, torch.float64)
    judged = expected.judged
    reach = bound.nan_to_num(nan=0.0, posinf=0.0)
    low = (value - reach).to(expected.dtype).double()
    high = (value + reach).to(expected.dtype).double()

    infinite = actual.isinf() & ((actual == low) | (actual == high))
    undefined = actual.isnan() & value.isnan()
    must_not_be_finite = ~low.isfinite() & (low == high) | value.isnan()
    finite = actual.isfinite() & ~must_not_be_finite
    wrong_pattern = judged & ~(infinite | undefined | finite)

    # What is exact is rounded once, where it is stored: 1e-60 of another key's value is no part.
    stored = torch.where(expected.exact, value.to(expected.dtype).double(), value)
    error = (actual - stored).abs()
    error = error.masked_fill(infinite | undefined, 0.0)
    comparable = judged & finite
    ratio = torch.where(error > 0, error / reach, 0.0)
    ratio = ratio.masked_fill(~comparable, 0.0).masked_fill(wrong_pattern, math.inf)
    wrong_zero = comparable & expected.zero & (error > 0)
    wrong_exact = comparable & expected.exact & ~expected.zero & (error > 0)
    wrong = comparable & (ratio > 1) & ~wrong_zero & ~wrong_exact
    return Comparison(
        error=error.masked_fill(wrong_pattern, math.nan),
        ratio=ratio,
        wrong=wrong,
        wrong_zero=wrong_zero,
        wrong_exact=wrong_exact,
        wrong_pattern=wrong_pattern,
    )
