"""The error budget of a mistaken answer, for the elements in which the right one has none.

Where no key is visible the right answer is zero and nothing may differ from it. A kernel that
sees a key there rounds, and by as much as its own computation does.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.precision import Precision
from attn_reference.problem import Problem
from attn_reference.rounding import Rounding
from attn_reference.scores import ChunkScores, KeyHead
from attn_reference.sequences import Sequence

from ..budget.expectation import expectation
from .blocks import Answer, Scores, block


class Budgeted(dict[str, Tensor]):
    """An answer that knows how to come by its own error budget."""

    def __init__(
        self,
        answer: Answer,
        problem: Problem,
        inputs: Inputs,
        precision: Precision,
        scores: Scores | None,
    ) -> None:
        super().__init__(answer)
        self._problem, self._inputs = problem, inputs
        self._precision, self._scores = precision, scores

    @cached_property
    def bounds(self) -> Mapping[str, Tensor]:
        """The bound on each element of each tensor; 0 where it is not determined."""
        given = tuple(n for n in self._problem.gradients if getattr(self._inputs, n) is not None)
        numbers = itertools.count()

        def head(sequence: Sequence, problem: Problem, kv_head: int, exact: Rounding) -> KeyHead:
            if self._scores is None:
                return KeyHead(sequence, problem, kv_head, exact)
            entry = next(numbers) // problem.kv_heads
            return _OtherScores(sequence, problem, kv_head, exact, self._scores, entry)

        lse_gradient = self._problem.lse_gradient and bool(given)
        found = expectation(
            self._problem.replace(gradients=given, lse_gradient=lse_gradient),
            self._inputs,
            self._precision,
            iid=False,
            head=head,
        )
        return {n: e.bound.nan_to_num(nan=0.0, posinf=0.0) for n, e in found.items()}


class _OtherScores(KeyHead):
    """A key/value head whose scores are those of a mistake."""

    def __init__(
        self,
        sequence: Sequence,
        problem: Problem,
        kv_head: int,
        rounding: Rounding,
        other: Scores,
        entry: int,
    ) -> None:
        super().__init__(sequence, problem, kv_head, rounding)
        self._other, self._entry = other, entry

    def scores(self, rows: slice) -> ChunkScores:
        """Those that the mistake gives these rows."""
        chunk = super().scores(rows)
        other = self._other(block(self, chunk, self._entry))
        return replace(chunk, scores=other, visible=other != -torch.inf)
