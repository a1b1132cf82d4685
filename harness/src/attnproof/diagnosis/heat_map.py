"""Where the error lies: error over budget as text, blocks of rows down and heads across."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_reference.problem import Problem

MAX_ROWS = 24
MAX_COLUMNS = 64
WIDE_COLUMNS = 24  # up to so many columns, each is three glyphs wide
NOT_FINITE = "!"


@dataclass(frozen=True)
class Shade:
    """One level of the map: a glyph for values up to ``limit`` (error over budget)."""

    glyph: str
    limit: float
    meaning: str
    colour: str  # of the HTML report


SHADES = (
    Shade("·", 0.5, "up to 0.5", "#e8eef4"),
    Shade("░", 1.0, "up to 1 (honest)", "#b5cfe3"),
    Shade("▒", 4.0, "up to 4", "#f2c879"),
    Shade("▓", 32.0, "up to 32", "#e07b39"),
    Shade("█", math.inf, "more", "#a31621"),
    Shade(NOT_FINITE, math.nan, "not finite", "#5b0f7a"),
)


def glyph(value: float) -> str:
    """The shade of one value; a NaN or an infinity is '!'."""
    if not math.isfinite(value):
        return NOT_FINITE
    return next(shade.glyph for shade in SHADES if value <= shade.limit)


def canonical(error: Tensor) -> Tensor:
    """Any judged tensor as (batch, heads, rows, elements of a row).

    Accepts out and gradients (4 dimensions), lse (batch, heads, rows) and dsinks (heads,).
    """
    if error.dim() == 4:
        return error
    if error.dim() == 3:
        return error[..., None]
    if error.dim() == 1:
        return error[None, :, None, None]
    raise ValueError(f"error has {error.dim()} dimensions; accepted are 4, 3 (lse) and 1 (dsinks)")


def by_row(error: Tensor) -> Tensor:
    """The worst error of each row, (batch, heads, rows); a NaN counts as infinite."""
    values = torch.nan_to_num(canonical(error).double(), nan=math.inf, posinf=math.inf)
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    return values.amax(-1)


def heat_map(problem: Problem, error_over_budget: Tensor, tensor: str = "out") -> str:
    """Blocks of rows down, heads across, shaded by the worst error over budget in the block.

    ``error_over_budget`` is (B, H, S, D), or (B, H, S) for lse, of the tensor named: out, lse,
    dq and dbias have a row per query, dk and dv a row per key. Blocks are powers of two high, so
    that the tiles of a kernel show. Empty text when there is nothing to draw.
    """
    worst = by_row(error_over_budget)
    batch, heads, rows = worst.shape
    if worst.numel() == 0:
        return ""
    height = _power_of_two(rows, MAX_ROWS)
    merged = batch > 1 and batch * heads > MAX_COLUMNS
    if merged:
        worst = worst.amax(0, keepdim=True)
    width = _power_of_two(heads, MAX_COLUMNS // worst.shape[0])
    cells = _pool(_pool(worst, 2, height), 1, width)  # (batch, heads / width, rows / height)

    kind = "key" if tensor in ("dk", "dv") else "query"
    packed = " (sequences packed one after another)" if problem.packed is not None else ""
    lines = [f"error over budget of {tensor}: {kind} rows down{packed}, heads across"]
    stretch = 3 if cells.shape[0] * cells.shape[1] <= WIDE_COLUMNS else 1
    labels = [_range(start, min(start + height, rows) - 1) for start in range(0, rows, height)]
    margin = max(len(label) for label in [*labels, "head"])

    def line(label: str, blocks: list[str]) -> str:
        return f"  {label:>{margin}}  {'  '.join(blocks)}".rstrip()

    if cells.shape[0] > 1:
        span = cells.shape[1] * stretch
        lines.append(line("", [f"b{b}".ljust(span) for b in range(batch)]))
    names = [str(h * width).rjust(len(str(heads - 1))) for h in range(cells.shape[1])]
    for place in range(len(names[0])):
        digits = "".join(name[place].center(stretch) for name in names)
        last = place == len(names[0]) - 1
        lines.append(line("head" if last else "", [digits] * cells.shape[0]))
    for r, label in enumerate(labels):
        lines.append(
            line(label, ["".join(glyph(v) * stretch for v in b[:, r].tolist()) for b in cells])
        )
    notes = [f"the worst of {batch} batch entries"] if merged else []
    notes += [f"each column {width} heads"] if width > 1 else []
    legend = "  ".join(f"{shade.glyph} {shade.meaning}" for shade in SHADES)
    lines.append("  " + legend + "".join(f"; {note}" for note in notes))
    return "\n".join(lines)


def where(error_over_budget: Tensor, tensor: str = "out") -> str:
    """The same in a line: which batch entries, heads, rows and columns are over budget.

    Empty text when no element is.
    """
    over = canonical(error_over_budget)
    over = ~(over <= 1)  # NaN is over budget too
    if not bool(over.any()):
        return ""
    heads = "kv heads" if tensor in ("dk", "dv") else "heads"
    rows = "keys" if tensor in ("dk", "dv") else "rows"
    parts = []
    for dim, name in enumerate(("batch entries", heads, rows, "columns")):
        size = over.shape[dim]
        hit = over.transpose(0, dim).reshape(size, -1).any(1).nonzero()[:, 0].tolist()
        if size == 1 or (dim == 3 and len(hit) == size):
            continue
        parts.append(
            f"all {size} {name}" if len(hit) == size else f"{name} {_spans(hit)} of {size}"
        )
    share = over.double().mean().item()
    return f"over budget: {', '.join(parts) or 'everywhere'} ({100 * share:.3g} % of its elements)"


def _spans(numbers: list[int], most: int = 4) -> str:
    """Runs of numbers: '0-3, 7'; the tail of many runs is counted."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    said = [_range(a, b) for a, b in runs[:most]]
    if len(runs) > most:
        said.append(f"… {numbers[-1]} ({len(numbers)} in all)")
    return ", ".join(said)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _power_of_two(size: int, most: int) -> int:
    """The smallest power of two that divides ``size`` into at most ``most`` blocks."""
    block = 1
    while -(-size // block) > most:
        block *= 2
    return block


def _pool(values: Tensor, dim: int, block: int) -> Tensor:
    """The maximum over blocks of that size along ``dim``; the last block may be shorter."""
    parts = torch.split(values, block, dim)
    return torch.stack([part.amax(dim) for part in parts], dim)
