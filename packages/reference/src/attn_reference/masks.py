"""Masks as functions of positions: they compose with &, | and ~, say what they are, and draw.

A mask answers, for query positions i (R, 1) and key positions j (1, C) of one sequence,
which keys are visible: a bool tensor that broadcasts to (R, C). To add a mask, add a
function here that returns a ``Mask``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .drawing import beside, draw
from .problem import Problem


@dataclass(frozen=True)
class Mask:
    """A visibility rule and the words that describe it: "every key", "keys j <= i" …"""

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

    def __invert__(self) -> Mask:
        return Mask(lambda i, j: ~self(i, j), f"not {self.description}")

    def __str__(self) -> str:
        return self.description

    def dense(self, len_q: int, len_k: int, device: torch.device | str | None = None) -> Tensor:
        """The whole mask, bool (len_q, len_k)."""
        return self.rows(slice(0, len_q), len_k, device)

    def rows(self, rows: slice, len_k: int, device: torch.device | str | None = None) -> Tensor:
        """The mask of some query rows, bool (rows, len_k)."""
        i = torch.arange(rows.start, rows.stop, device=device)[:, None]
        j = torch.arange(len_k, device=device)[None, :]
        return self(i, j).expand(len(i), len_k)

    def draw(self, len_q: int, len_k: int, *, width: int = 48, height: int = 24) -> str:
        """The mask as text, a line per query: ■ visible, · hidden.

        A mask larger than ``height`` queries or ``width`` keys is drawn in cells of several
        queries and keys, ▪ where some of a cell is visible.
        """
        return draw(lambda rows: self.rows(rows, len_k), len_q, len_k, width, height)


def full() -> Mask:
    """Every key is visible."""
    return Mask(lambda i, j: torch.ones_like(i + j, dtype=torch.bool), "every key")


def causal(offset: int = 0) -> Mask:
    """Key j is visible to query i when j <= i + offset."""
    return Mask(lambda i, j: j <= i + offset, f"keys j <= {_shifted(offset)}")


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
    return Mask(visible, f"a window ({sides}) around j = {_shifted(offset)}")


def key_length(length: int) -> Mask:
    """The first ``length`` keys are visible; those behind them are padding."""
    return Mask(
        lambda i, j: (j < length) & torch.ones_like(i, dtype=torch.bool), f"keys j < {length}"
    )


def documents(lengths_q: Sequence[int], lengths_k: Sequence[int] | None = None) -> Mask:
    """Packed documents: a query sees the keys of its own document and no others.

    Document n takes the next lengths_q[n] queries and lengths_k[n] keys (the same by default).
    Positions beyond the last document belong to none: they see nothing and nothing sees them.
    Raises ValueError when the two do not list as many documents, or a length is negative.
    """
    lengths_k = lengths_q if lengths_k is None else lengths_k
    if len(lengths_q) != len(lengths_k):
        raise ValueError(
            f"lengths_k={list(lengths_k)}: accepted are {len(lengths_q)} lengths, as in lengths_q"
        )
    if any(n < 0 for n in (*lengths_q, *lengths_k)):
        raise ValueError(f"lengths {list(lengths_q)}, {list(lengths_k)}: accepted are 0 or more")
    ends_q, ends_k = (
        torch.tensor(list(n), dtype=torch.int64).cumsum(0) for n in (lengths_q, lengths_k)
    )

    def document(position: Tensor, ends: Tensor) -> Tensor:
        return torch.searchsorted(ends.to(position.device), position.contiguous(), right=True)

    def visible(i: Tensor, j: Tensor) -> Tensor:
        of_i, of_j = document(i, ends_q), document(j, ends_k)
        return (of_i == of_j) & (of_i < len(lengths_q))

    def said(lengths: Sequence[int]) -> str:
        return ", ".join(map(str, lengths))

    keys = "" if tuple(lengths_q) == tuple(lengths_k) else f" queries and {said(lengths_k)} keys"
    return Mask(visible, f"keys of the same document (lengths {said(lengths_q)}{keys})")


def from_tensor(visible: Tensor) -> Mask:
    """A boolean tensor (len_q or 1, len_k or 1), True where visible, as a mask.

    Positions beyond it are an IndexError. Raises ValueError for another dtype or rank.
    """
    if visible.dtype != torch.bool or visible.dim() != 2:
        raise ValueError(
            f"visible is {visible.dtype} {tuple(visible.shape)}: "
            "accepted is torch.bool (len_q or 1, len_k or 1)"
        )
    rows, columns = visible.shape

    def look_up(i: Tensor, j: Tensor) -> Tensor:
        return visible.to(i.device)[i if rows != 1 else i * 0, j if columns != 1 else j * 0]

    return Mask(look_up, f"a tensor of {rows} x {columns}, {int(visible.sum())} of them visible")


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


def draw_alignments(len_q: int, len_k: int) -> str:
    """The two causal alignments beside each other; they are the same when len_q == len_k."""
    figures = {
        "top-left: j <= i": causal(),
        f"bottom-right: j <= {_shifted(len_k - len_q)}": causal(len_k - len_q),
    }
    return beside(*(f"{title}\n{mask.draw(len_q, len_k)}" for title, mask in figures.items()))


def _shifted(offset: int) -> str:
    return f"i {'+' if offset > 0 else '-'} {abs(offset)}" if offset else "i"
