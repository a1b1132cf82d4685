"""The ledger of one tensor of the answer: its value, its bound by term, what it rests on."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_reference.precision import UNDERFLOW, UNIT_ROUNDOFF

from .expected import Expected
from .units import NAMES, SMALLEST_NORMAL

Terms = dict[str, Tensor]


def sum_of(terms: Terms) -> Tensor:
    """The sum of all terms, of which there is at least one."""
    first, *others = terms.values()
    for term in others:
        first = first + term
    return first


class Ledger:
    """Value, bound and masks of one tensor, entered chunk by chunk through views.

    ``by_term`` keeps the terms of the bound apart; otherwise all go into one tensor.
    """

    def __init__(self, shape: torch.Size, device: torch.device, *, by_term: bool) -> None:
        self.shape, self.device, self.by_term = shape, device, by_term
        self.value = self._zeros()
        self.terms: Terms = {}
        self.touched = self._zeros(torch.bool)  # something visible contributes
        self.exact = self._zeros(torch.bool)
        self.excused = self._zeros(torch.bool)  # not determined by the declared precision

    def _zeros(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(self.shape, dtype=dtype, device=self.device)

    def term(self, name: str) -> Tensor:
        """The tensor that this term is added into."""
        name = name if self.by_term else "total"
        if name not in self.terms:
            self.terms[name] = self._zeros()
        return self.terms[name]

    def grouped(self, terms: Terms) -> list[tuple[str, Tensor]]:
        """These terms, or their sum where nobody asks which is which: it saves products."""
        return list(terms.items()) if self.by_term else [("total", sum_of(terms))]

    def stored(self, dtype: torch.dtype, flush: float) -> Expected:
        """With the rounding of the final store in ``dtype``; unbounded where undetermined.

        flush: magnitude below which a store may give zero.
        """
        name = NAMES[dtype]
        before = sum_of(self.terms) if self.terms else self._zeros()
        smallest = self.value.abs() - before
        # A bool times a number is in fp32, which has no 2^-150: 0 but for the conversion.
        subnormal = (smallest < 2 * SMALLEST_NORMAL[name]).double()
        eta = max(UNDERFLOW[name], flush) * subnormal
        self.term("store").add_(UNIT_ROUNDOFF[name] * (self.value.abs() + before) + eta)
        bound = sum_of(self.terms).nan_to_num(nan=torch.inf, posinf=torch.inf)
        # An infinite answer is compared exactly.
        bound = bound.masked_fill(self.value.isinf(), 0.0).masked_fill(self.excused, torch.inf)
        zero = ~self.touched & ~self.excused
        exact = (self.exact | zero) & ~self.excused
        return Expected(
            value=self.value,
            bound=bound.masked_fill(exact, 0.0),
            zero=zero,
            exact=exact,
            dtype=dtype,
            terms=self.terms if self.by_term else {},
        )
