"""Whether an answer explains a tensor that came out, within the error budget, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_reference.precision import UNIT_ROUNDOFF
from attn_reference.problem import Problem

from ..budget.expected import Expected, compare
from .heat_map import canonical

CLOSER = 0.5  # a guess must leave at most this share of the truth's residual, in every bad row
BAD_ROW = 2.0  # rms of error over sigma of a row that deviates although it is within its bound
SCREEN = 32.0  # times the tolerance: what is further off is not worth a budget of its own
TINY = 1e-300


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How well a guess explains one tensor."""

    whole: bool  # every row, not only the rows that deviate
    rows: int  # rows that deviate
    of: int  # rows there are
    distance: float  # rms of the residual over the tolerance


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One tensor that came out: which rows the truth does not explain, and what it takes to.

    Rows are the last dimension but one of out, dq, dk, dv and dbias, and every element of lse
    and dsinks.
    """

    name: str
    actual: Tensor
    ratio: Tensor  # like actual: error over budget
    tolerance: Tensor  # (B, H, R, E): how far another answer may be from it
    size: float  # rms of the truth
    largest: float  # finite number of its dtype; beyond it is infinite
    bad: Tensor  # bool (B, H, R): the truth does not explain the row
    fine: Tensor  # bool (B, H, R): the row is within its bound
    residual: Tensor  # (B, H, R, E): what the truth leaves
    unbudgeted: Tensor  # bool (B, H, R, E): where nothing may differ from the truth

    @property
    def off(self) -> Tensor:
        """The truth's residual over the tolerance, rms of each row, (B, H, R)."""
        return _rms(self.residual, self.tolerance)

    @property
    def deviates(self) -> bool:
        """Whether some row is not what it should be."""
        return bool(self.bad.any())

    def fit(
        self,
        answer: Tensor,
        looked: Tensor | None = None,
        own_bound: Callable[[], Tensor | None] = lambda: None,
    ) -> Fit | None:
        """How ``answer`` explains every row that deviates, or None when it does not.

        Only rows ``looked`` at count, bool (B, 1, R). Rows that do not deviate may follow the
        truth instead: a mistake that a kernel makes in some tiles only. ``own_bound`` computes
        the budget of the answer itself, which counts where that of the truth is smaller or none.
        """
        looked = torch.ones_like(self.bad) if looked is None else looked.expand_as(self.bad)
        answer = torch.where(answer.abs() > self.largest, answer.sign() * math.inf, answer)
        error = canonical(difference(self.actual, answer))
        # Rounding grows with what is added up: a larger answer has a larger budget.
        growth = max(1.0, size_of(answer) / self.size) if self.size else 1.0
        allowed = growth * self.tolerance
        found = self._fit(error, allowed, self.tolerance, looked)
        if found is not None and found.whole:
            return found
        # That budget takes long: it is asked for where little else speaks against the answer.
        roomy = (SCREEN * allowed).masked_fill(self.unbudgeted, math.inf)
        unit = self.tolerance.masked_fill(self.unbudgeted, 1.0)
        if not self._fit(error, roomy, unit, looked, self.unbudgeted.all(-1)):
            return found
        own = own_bound()
        if own is None or own.shape != answer.shape:  # an answer that was put together afterwards
            return found
        own = 2 * canonical(own)
        unit = torch.maximum(self.tolerance, own)
        # Where both answers are zero, this one no nearer, its rounding may be what is there.
        rounded = (self.residual <= own).all(-1)
        return self._fit(error, torch.maximum(allowed, own), unit, looked, rounded) or found

    def _fit(
        self,
        error: Tensor,
        allowed: Tensor,
        unit: Tensor,
        looked: Tensor,
        rounded: Tensor | None = None,
    ) -> Fit | None:
        """How an answer explains this tensor that leaves ``error``, where so much is ``allowed``;
        sizes of errors are compared in that ``unit``, but not in rows that are only ``rounded``.
        """
        within = (error <= allowed).all(-1)
        rms = _rms(error, unit)
        bad = self.bad & looked
        closer = within & (rms <= CLOSER * _rms(self.residual, unit))
        explained = closer if rounded is None else closer | within & rounded
        if not bool(closer[bad].any()) or not bool(explained[bad].all()):
            return None
        whole = bool(within[looked].all())
        if not whole and not bool((within | self.fine)[looked].all()):
            return None
        return Fit(
            whole=whole,
            rows=int(bad.sum()),
            of=int(looked.sum()),
            distance=rms[looked if whole else bad].square().mean().sqrt().item(),
        )


def compared(name: str, problem: Problem, expected: Expected, actual: Tensor) -> Compared:
    """``actual`` beside the truth.

    A mistake's own rounding is not known exactly, so a guess gets twice the budget of the truth,
    and at least the median budget where the truth is exact.
    """
    actual = actual.double()
    truth = compare(expected, actual)
    broken = truth.wrong | truth.wrong_zero | truth.wrong_exact | truth.wrong_pattern
    bound = expected.bound.nan_to_num(nan=0.0)
    budgeted = bound[bound > 0]
    typical = budgeted.median() if budgeted.numel() else bound.new_zeros(())
    rounding = 4 * UNIT_ROUNDOFF[problem.dtype] * expected.value.abs().nan_to_num(posinf=0.0)
    tolerance = canonical(2 * torch.maximum(bound, typical) + rounding).clamp_min(TINY)
    error = canonical(difference(actual, expected.value))
    over = canonical(broken).any(-1)
    bad = over
    if not bool(over.any()) and expected.sigma is not None:
        noise = canonical(expected.sigma).clamp_min(TINY)
        bad = _rms(error, noise) > BAD_ROW
    return Compared(
        name=name,
        actual=actual,
        ratio=truth.ratio,
        tolerance=tolerance,
        size=size_of(expected.value),
        largest=torch.finfo(expected.dtype).max,
        bad=bad,
        fine=~over,
        residual=error,
        unbudgeted=canonical(bound == 0),
    )


def difference(actual: Tensor, answer: Tensor) -> Tensor:
    """|actual - answer|: 0 where both are NaN or the same infinity, infinite where one is."""
    same = (actual == answer) | (actual.isnan() & answer.isnan())
    error = (actual - answer).abs().masked_fill(same, 0.0)
    return error.nan_to_num(nan=math.inf, posinf=math.inf)


def size_of(values: Tensor) -> float:
    """rms of the finite elements, 0 without any."""
    finite = values[values.isfinite()]
    return finite.square().mean().sqrt().item() if finite.numel() else 0.0


def _rms(error: Tensor, unit: Tensor) -> Tensor:
    """rms of error over unit in each row, (B, H, R)."""
    return (error / unit).square().mean(-1).sqrt().nan_to_num(nan=math.inf)
