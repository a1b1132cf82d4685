"""Masks as functions of positions: they compose with & and |, say what they are, and draw.

A mask answers, for query positions i (R, 1) and key positions j (1, C) of one sequence,
which keys are visible: a bool tensor that broadcasts to (R, C). To add a mask, add a
function here that returns a ``Mask``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem


@dataclass(frozen=True)
class Mask:
    """A visibility rule and the sentence that describes it."""

    visible: Callable[[Tensor, Tensor], Tensor]
    description: str

    def __call__(self, i: Tensor, j: Tensor) -> Tensor:
        """Visibility of keys j (1, C) for queries i (R, 1), broadcasting to (R, C)."""
        return self.visible(i, j)

    def __and__(self, other: Mask) -> Mask:
        return Mask(
            lambda i, j: self(i, j) & other(i, j), f"({self.description} and {other.description})"
        )

    def __or__(self, other: Mask) -> Mask:
        return Mask(
            lambda i, j: self(i, j) | other(i, j), f"({self.description} or {other.description})"
        )

    def dense(self, len_q: int, len_k: int) -> Tensor:
        """The whole mask, bool (len_q, len_k)."""
        i = torch.arange(len_q)[:, None]
        j = torch.arange(len_k)[None, :]
        return self(i, j).expand(len_q, len_k)

    def draw(self, len_q: int, len_k: int) -> str:
        """The mask as text, a line per query: ■ visible, · hidden."""
        rows = self.dense(len_q, len_k).tolist()
        return "\n".join(" ".join("■" if seen else "·" for seen in row) for row in rows)


def full() -> Mask:
    """Every key is visible."""
    return Mask(lambda i, j: torch.ones_like(i + j, dtype=torch.bool), "every key")


def causal(offset: int = 0) -> Mask:
    """Key j is visible to query i when j <= i + offset."""
    shift = f" + {offset}" if offset > 0 else f" - {-offset}" if offset < 0 else ""
    return Mask(lambda i, j: j <= i + offset, f"keys j <= i{shift}")


def window(left: int | None, right: int | None, offset: int = 0) -> Mask:
    """Key j is visible when i + offset - left <= j <= i + offset + right (inclusive)."""

    def visible(i: Tensor, j: Tensor) -> Tensor:
        seen = torch.ones_like(i + j, dtype=torch.bool)
        if left is not None:
            seen = seen & (j >= i + offset - left)
        if right is not None:
            seen = seen & (j <= i + offset + right)
        return seen

    sides = ", ".join("unbounded" if w is None else str(w) for w in (left, right))
    return Mask(visible, f"a window ({sides}) around j = i{offset:+d}")


def diagonal_offset(problem: Problem, len_q: int, len_k: int) -> int:
    """Where the diagonal lies: key i + offset belongs to query i."""
    return 0 if problem.causal == "top-left" else len_k - len_q


def positional_mask(problem: Problem, len_q: int, len_k: int) -> Mask:
    """The causal and window rule of a problem, for one sequence of these true lengths."""
    offset = diagonal_offset(problem, len_q, len_k)
    rule = full()
    if problem.causal != "none":
        rule = causal(offset)
    if problem.window is not None:
        left, right = problem.window
        span = window(left, right, offset)
        rule = span if problem.causal == "none" else rule & span
    return rule


