"""The two numbers systems that a softmax state lives in: base e and base 2.

Kernels work in base 2, because a GPU has exp2 and no exp: with scores multiplied by log2(e)
beforehand, exp2(x log2 e) = exp(x), and only the LSE has to be brought back at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a state needs of the numbers that it is made of (torch tensors, unless noted)."""

    name: str
    power: Callable[[Any], Any]  # b^x
    logarithm: Callable[[Any], Any]  # log_b(x)
    maximum: Callable[[Any, Any], Any] = torch.maximum
    per_nat: float | None = None  # log_b(e); None: 1, and nothing is multiplied

    def scores(self, natural: Any) -> Any:
        """Natural scores as scores of this base."""
        return natural if self.per_nat is None else natural * self.per_nat

    def nats(self, value: Any) -> Any:
        """A logarithm of this base as a natural one."""
        return value if self.per_nat is None else value / self.per_nat

    def rescale(self, old: Any, new: Any) -> Any:
        """b^(old - new): what a sum taken relative to the maximum ``old`` is worth under ``new``.

        Where ``new`` is -inf no key was seen, and -inf - -inf would be NaN: there it is 0.
        """
        return self.power(old - finite(new))


def finite(m: Any) -> Any:
    """The running maximum as something that can be subtracted: 0 where no key was seen."""
    return m.masked_fill(m == -math.inf, 0.0)


E = Base(name="e", power=torch.exp, logarithm=torch.log)
TWO = Base(name="2", power=torch.exp2, logarithm=torch.log2, per_nat=math.log2(math.e))
