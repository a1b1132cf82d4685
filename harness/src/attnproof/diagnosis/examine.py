"""What a deviating result looks like: it is compared with what plausible mistakes would give.

The mistakes are the functions of the modules beside this one, one table (``MISTAKES``). To add
one, add a function there that yields its words and its answer. A mistake is named only when its
answer lies within the error budget of the result where the right answer does not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.precision import Precision
from attn_reference.problem import Problem
from attn_reference.sequences import sequences

from ..backend import Capabilities
from ..budget.expectation import expectation
from ..judge.form import given
from ..judge.judging import declared_empty_rows
from ..plan import CallResult
from ..position import position
from . import (  # noqa: F401  (their functions register themselves)
    calls,
    gradients,
    masks,
    scores,
    softmax,
    storage,
)
from .blocks import Answer, Rows
from .case import BACKWARD, FORWARD, MISTAKES, Case, Mistake, Stage
from .fit import Compared, Fit, compared
from .heat_map import heat_map, where
from .own_budget import Budgeted

__all__ = ["Examined", "diagnose", "examine", "heat_map"]

PLAIN = Capabilities()
SECONDS = 5.0  # of search, for one case
NAMED = 3  # mistakes named at most
MAX_ELEMENTS = 1 << 24  # score elements of a problem that is looked at all
MAX_COMPUTED = 1 << 20  # score elements that every mistake may compute
ROWS_SHOWN = 48  # query rows that are looked at around the worst one, in a large problem


@dataclass(frozen=True)
class Examined:
    """What a deviating result looks like: sentences, best first, and a heat map as text.

    ``mistakes`` are the functions of the table behind the sentences.
    """

    looks_like: tuple[str, ...] = ()
    heat_map: str = ""
    mistakes: tuple[Mistake, ...] = ()


def diagnose(
    problem: Problem,
    inputs: Inputs,
    result: CallResult,
    precision: Precision,
    capabilities: Capabilities = PLAIN,
    earlier: Sequence[tuple[Problem, Inputs]] = (),
) -> list[str]:
    """Sentences that say what the result equals, best first; empty when nothing explains it.

    ``earlier`` are problem and inputs of calls made before in the same process. Empty also for
    problems too large to try every mistake on.
    """
    return list(examine(problem, inputs, result, precision, capabilities, earlier).looks_like)


def examine(
    problem: Problem,
    inputs: Inputs,
    result: CallResult,
    precision: Precision,
    capabilities: Capabilities = PLAIN,
    earlier: Sequence[tuple[Problem, Inputs]] = (),
    *,
    table: Sequence[Mistake] = MISTAKES,
    seconds: float = SECONDS,
) -> Examined:
    """``diagnose``, by these mistakes and for as many seconds, and the heat map of the first
    tensor that deviates."""
    came = given(problem, inputs, result, capabilities)
    inputs = came.inputs
    if came.dropout_unseen or _elements(problem, inputs) > MAX_ELEMENTS:
        return Examined()
    expected = expectation(problem, inputs, precision)
    declared_empty_rows(expected, problem, capabilities)
    tensors = (compared(name, problem, expected[name], x) for name, x in came.tensors.items())
    deviating = {tensor.name: tensor for tensor in tensors if tensor.deviates}
    if not deviating:
        return Examined()
    drawn = _drawn(problem, next(iter(deviating.values())))
    region = _region(problem, inputs, list(deviating.values()))
    if region is None or not _elements(problem, inputs):
        return Examined(heat_map=drawn)
    case = Case(
        problem=problem,
        inputs=inputs,
        wanted=frozenset(deviating),
        truth={name: e.value for name, e in expected.items()},
        actual={name: c.actual for name, c in deviating.items()},
        rows=region.rows,
        precision=precision if region.looked is None else None,
        earlier=earlier,
    )
    found = _best(_search(case, table, deviating, region.looked, seconds))
    return Examined(
        looks_like=tuple(e.sentence for e in found),
        heat_map=drawn,
        mistakes=tuple(e.mistake for e in found),
    )


def _drawn(problem: Problem, tensor: Compared) -> str:
    """The heat map and, below it, where the error lies in words."""
    lines = [heat_map(problem, tensor.ratio, tensor.name), where(tensor.ratio, tensor.name)]
    return "\n".join(line for line in lines if line)


@dataclass(frozen=True)
class _Explanation:
    """A guess that explains some of the tensors."""

    mistake: Mistake
    words: str
    fits: Mapping[str, Fit]

    @property
    def rank(self) -> tuple[int, int, float]:
        """Less is better: explains more tensors, wholly, more closely."""
        fits = self.fits.values()
        return (
            -len(fits),
            sum(not fit.whole for fit in fits),
            math.sqrt(sum(fit.distance**2 for fit in fits) / len(fits)),
        )

    @property
    def sentence(self) -> str:
        """ "out and lse equal attention with ...", and in how many rows if not in all."""
        names = [name for name in (*FORWARD, *BACKWARD) if name in self.fits]
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        text = f"{listed} {'equals' if len(names) == 1 else 'equal'} {self.words}"
        partial = [fit for fit in self.fits.values() if not fit.whole]
        if partial:
            most = max(partial, key=lambda fit: fit.rows)
            text += f", in the rows that deviate ({most.rows} of {most.of})"
        return text


def _search(
    case: Case,
    table: Sequence[Mistake],
    deviating: Mapping[str, Compared],
    looked: Tensor | None,
    seconds: float,
) -> list[_Explanation]:
    """The best explanation that each mistake offers, in that time."""
    deadline = time.monotonic() + seconds
    found: list[_Explanation] = []
    for stage in Stage:
        explained = {n for e in found for n, fit in e.fits.items() if fit.whole}
        case = replace(case, wanted=case.wanted - explained)
        if not case.wanted:
            break
        for entry in table:
            if entry.stage is stage and entry.applies(case.problem):
                offers = _offers(entry, case, deviating, looked, deadline)
                if best := min(offers, key=lambda e: e.rank, default=None):
                    found.append(best)
            if time.monotonic() > deadline:
                return found
    return found


def _offers(
    entry: Mistake,
    case: Case,
    deviating: Mapping[str, Compared],
    looked: Tensor | None,
    deadline: float,
) -> list[_Explanation]:
    """The guesses of one mistake that explain something. Those in the same words are variants of
    one guess: what each tensor would be need not come from the same variant."""
    fits: dict[str, dict[str, Fit]] = {}
    for words, answer in entry.guesses(case):
        for name, value in answer.items():
            if fit := deviating[name].fit(value, looked, partial(_own_bound, answer, name)):
                fits.setdefault(words, {}).setdefault(name, fit)
        if time.monotonic() > deadline:
            break
    return [_Explanation(entry, words, by_name) for words, by_name in fits.items()]


def _own_bound(answer: Answer, name: str) -> Tensor | None:
    """The budget of a mistaken answer, None where it has none of its own."""
    return answer.bounds.get(name) if isinstance(answer, Budgeted) else None


def _best(found: Iterable[_Explanation]) -> list[_Explanation]:
    """A few: the best one, others as good, and those that explain what it leaves open."""
    kept: list[_Explanation] = []
    covered: set[str] = set()
    for one in sorted(found, key=lambda e: e.rank):
        as_good = bool(kept) and one.rank[:2] == kept[0].rank[:2]
        if len(kept) < NAMED and (as_good or set(one.fits) - covered):
            kept.append(one)
            covered |= set(one.fits)
    return kept


@dataclass(frozen=True)
class _Region:
    """The query rows that every mistake computes, and the same as bool (B, 1, R); None: all."""

    rows: Rows
    looked: Tensor | None = None


def _elements(problem: Problem, inputs: Inputs) -> int:
    """Score elements of the problem."""
    return problem.heads_q * sum(s.len_q * s.len_k for s in sequences(inputs, problem))


def _region(problem: Problem, inputs: Inputs, tensors: Sequence[Compared]) -> _Region | None:
    """All rows, or in a large problem those around the worst row.

    None when nothing deviates, or a tensor of a large problem needs every row.
    """
    if not tensors:
        return None
    if _elements(problem, inputs) <= MAX_COMPUTED:
        return _Region(lambda entry, count: [slice(0, count)] if count else [])
    if problem.packed is not None or any(t.name not in (*FORWARD, "dq") for t in tensors):
        return None
    off = tensors[0].off.masked_fill(~tensors[0].bad, 0.0)
    worst, _, row = position(off.argmax(), off.shape)
    start = max(0, row - ROWS_SHOWN // 2)
    part = slice(start, min(off.shape[2], start + ROWS_SHOWN))
    looked = torch.zeros(off.shape[0], 1, off.shape[2], dtype=torch.bool)
    looked[worst, 0, part] = True
    return _Region(
        lambda entry, count: [part] if entry == worst and part.stop <= count else [], looked
    )
