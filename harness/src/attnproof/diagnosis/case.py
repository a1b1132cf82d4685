"""What a mistake starts from, a case that deviates, and the table of mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.precision import Precision
from attn_reference.problem import Problem

from .blocks import (
    Answer,
    Block,
    Rows,
    Scores,
    Softmax,
    StepEdit,
    backward,
    forward,
    maximum,
    right_softmax,
)
from .own_budget import Budgeted

FORWARD = ("out", "lse")
BACKWARD = ("dq", "dk", "dv", "dbias", "dsinks")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case that deviates, as the mistakes see it."""

    problem: Problem
    inputs: Inputs
    wanted: frozenset[str]  # the tensors that deviate
    truth: Answer
    actual: Answer
    rows: Rows  # the query rows that are looked at
    precision: Precision | None = None  # None: an answer of its own has no budget
    # Problems and inputs of calls made before this one in the same process.
    earlier: Sequence[tuple[Problem, Inputs]] = field(default=())

    def attention(
        self,
        problem: Problem | None = None,
        inputs: Inputs | None = None,
        scores: Scores | None = None,
        softmax: Softmax = right_softmax,
    ) -> dict[str, Tensor]:
        """The tensors that deviate, as another attention gives them.

        When only gradients deviate, the backward pass alone makes the mistake: it goes from the
        right out and lse.
        """
        problem = self.problem if problem is None else problem
        inputs = self.inputs if inputs is None else inputs
        answer: dict[str, Tensor] = {}
        result = self.truth
        if self.wanted & set(FORWARD):
            result = answer = forward(problem, inputs, self.rows, scores, softmax)
        if self.wanted & set(BACKWARD):
            answer = answer | backward(problem, inputs, self.rows, result, scores)
        answer = self._only_wanted(answer)
        if self.precision is None or softmax is not right_softmax or result is self.truth:
            return answer
        return Budgeted(answer, problem, inputs, self.precision, scores)

    def changed(self, **fields: object) -> dict[str, Tensor]:
        """Attention with other values of the problem."""
        return self.attention(problem=self.problem.replace(**fields))

    def given(self, **tensors: Any) -> dict[str, Tensor]:
        """Attention on other inputs."""
        return self.attention(inputs=replace(self.inputs, **tensors))

    def seeing(self, visible: Callable[[Block], Tensor]) -> dict[str, Tensor]:
        """Attention to other keys: bool, broadcasting to (G, R, Lk)."""
        return self.attention(
            scores=lambda block: block.unmasked.masked_fill(~visible(block), -torch.inf)
        )

    def backward(self, edit: StepEdit) -> dict[str, Tensor]:
        """The gradients that deviate, with a mistake in the backward pass alone."""
        if not self.wanted & set(BACKWARD):
            return {}
        return self._only_wanted(
            backward(self.problem, self.inputs, self.rows, self.truth, edit=edit)
        )

    def edited(self, edit: Callable[[Tensor], Tensor], *names: str) -> dict[str, Tensor]:
        """The right values of the named tensors, changed afterwards."""
        return {n: edit(self.truth[n]) for n in names if n in self.wanted and n in self.truth}

    def _only_wanted(self, answer: Answer) -> dict[str, Tensor]:
        return {name: value for name, value in answer.items() if name in self.wanted}


def row_maximum(case: Case) -> Tensor:
    """The largest score of each row, (B, Hq, Sq); 0 for rows with nothing visible."""
    with_maximum = forward(
        case.problem,
        case.inputs,
        case.rows,
        softmax=lambda block, scores: (right_softmax(block, scores)[0], maximum(scores)),
    )
    return with_maximum["lse"]


Guess = tuple[str, Answer]  # what it would be ("attention with ..."), and its values
Function = Callable[[Case], Iterator[Guess]]


class Stage(IntEnum):
    """When a mistake is tried: each stage on those tensors alone that the one before it does not
    explain in every row."""

    CONCLUSIVE = 0  # nothing else needs to be asked
    USUAL = 1
    LAST_RESORT = 2  # costly, or flexible enough to explain too much


@dataclass(frozen=True)
class Mistake:
    """One entry of the table: a generator of guesses and the problems it makes sense for."""

    guesses: Function
    applies: Callable[[Problem], bool]
    stage: Stage


MISTAKES: list[Mistake] = []


def mistake(
    applies: Callable[[Problem], bool] = lambda problem: True, stage: Stage = Stage.USUAL
) -> Callable[[Function], Function]:
    """Register a plausible mistake. The function yields (words, answer): the words complete
    "out equals ...", the answer holds what each deviating tensor would be."""

    def register(function: Function) -> Function:
        MISTAKES.append(Mistake(function, applies, stage))
        return function

    return register
