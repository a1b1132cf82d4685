"""Masks as text for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

VISIBLE, SOME, HIDDEN = "■", "▪", "·"


def draw(
    visible: Callable[[slice], Tensor], len_q: int, len_k: int, width: int, height: int
) -> str:
    """A mask in at most ``height`` lines of at most ``width`` cells.

    visible(rows) gives the mask of some rows, bool (rows, len_k); no more rows than a line
    stands for are asked for at once.
    """
    per_line, per_cell = -(-len_q // height), -(-len_k // width)
    lines = []
    if max(per_line, per_cell) > 1:
        lines.append(
            f"{len_q} queries x {len_k} keys, {per_line} x {per_cell} to a cell "
            f"({VISIBLE} all, {SOME} some, {HIDDEN} none visible)"
        )
    for start in range(0, len_q, max(1, per_line)):
        seen = visible(slice(start, min(start + per_line, len_q)))
        cells = torch.split(seen, max(1, per_cell), dim=1) if len_k else ()
        lines.append(" ".join(_cell(cell) for cell in cells))
    return "\n".join(lines)


def _cell(seen: Tensor) -> str:
    if seen.all():
        return VISIBLE
    return SOME if seen.any() else HIDDEN


def beside(*figures: str, gap: int = 4) -> str:
    """Texts of several lines set beside each other, their tops aligned."""
    blocks = [figure.split("\n") for figure in figures]
    widths = [max(map(len, block)) for block in blocks]
    rows = itertools.zip_longest(*blocks, fillvalue="")
    return "\n".join(
        (" " * gap).join(line.ljust(w) for line, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
