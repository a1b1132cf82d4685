"""Which part of a result is judged, and the problem that this part is by itself.

An fp64 answer takes too long for all of a large problem. Of a forward pass query rows are drawn,
which any mask of positions leaves independent of each other; of gradients whole key heads, since
dK and dV are sums over all queries. The draw comes after the call: no target knows it beforehand.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.masks import positional_mask
from attn_reference.problem import Problem

# Pairs of query and key that are judged of one call: some tenths of a second.
PAIRS = {"cuda": 1 << 24, "cpu": 1 << 18}
ENTRIES, HEADS = 2, 4  # of the batch and of the key heads at most, of which rows are drawn
ROWS = 8  # at least


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Batch entries, key heads (with their query heads) and query rows; None is all of them."""

    batch: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of ``as_dict``."""
        return cls(**{n: None if v is None else tuple(v) for n, v in values.items()})

    def describe(self, problem: Problem) -> str:
        """What is judged of it, in words."""
        parts = [
            f"{len(chosen)} of {count} {what}"
            for chosen, count, what in (
                (self.batch, problem.batch, "batch entries"),
                (self.kv_heads, problem.kv_heads, "key heads"),
                (self.rows, problem.seqlen_q, "query rows"),
            )
            if chosen is not None
        ]
        return ", ".join(parts) or "all of it"


def draw_sample(problem: Problem, device: str, random: random.Random) -> Sample:
    """As much as is judged of one call; all of a small problem."""
    limit = PAIRS[device]
    head = problem.group * problem.seqlen_q * problem.keys  # of one key head

    def some(count: int, chosen: int) -> tuple[int, ...] | None:
        return None if chosen >= count else tuple(sorted(random.sample(range(count), chosen)))

    if problem.batch * problem.kv_heads * head <= limit:
        return Sample()
    if problem.gradients:
        heads = max(1, min(problem.kv_heads, limit // head))
        entries = max(1, min(problem.batch, limit // (head * heads)))
        return Sample(batch=some(problem.batch, entries), kv_heads=some(problem.kv_heads, heads))
    entries, heads = min(problem.batch, ENTRIES), min(problem.kv_heads, HEADS)
    rows = max(ROWS, limit // (entries * heads * problem.group * problem.keys))
    return Sample(
        batch=some(problem.batch, entries),
        kv_heads=some(problem.kv_heads, heads),
        rows=some(problem.seqlen_q, rows),
    )


def cut(tensor: Tensor, sample: Sample, heads_per_kv: int, *, rows: bool) -> Tensor:
    """That part of a tensor (batch, heads, rows, columns); ``rows``: its rows are queries."""
    indices: list[tuple[int, Sequence[int] | None]] = [(0, sample.batch)]
    if sample.kv_heads is not None:
        heads = [h * heads_per_kv + g for h in sample.kv_heads for g in range(heads_per_kv)]
        indices.append((1, heads))
    if rows:
        indices.append((2, sample.rows))
    for dimension, chosen in indices:
        if chosen is not None:
            index = torch.tensor(chosen, device=tensor.device)
            tensor = tensor.index_select(dimension, index)
    return tensor


def part_of(problem: Problem, inputs: Inputs, sample: Sample) -> tuple[Problem, Inputs]:
    """The sample as a problem of its own, with its inputs: rows see what they saw, by a mask."""
    group = problem.group
    queries = {
        name: cut(tensor, sample, group, rows=True)
        for name in ("q", "grad_out")
        if (tensor := getattr(inputs, name)) is not None
    }
    keys = {name: cut(getattr(inputs, name), sample, 1, rows=False) for name in ("k", "v")}
    part = Inputs(**queries, **keys)
    kv_heads = part.k.shape[1]
    changes: dict[str, Any] = {
        "batch": part.q.shape[0],
        "heads_q": kv_heads * group,
        "heads_kv": kv_heads,
        "seqlen_q": part.q.shape[2],
    }
    if sample.rows is not None and (problem.causal != "none" or problem.window is not None):
        i = torch.tensor(sample.rows, device=part.q.device)[:, None]
        j = torch.arange(problem.keys, device=part.q.device)[None, :]
        rule = positional_mask(problem, problem.seqlen_q, problem.keys)
        part.mask = rule(i, j).expand(len(i), problem.keys)[None, None]
        changes |= {"causal": "none", "window": None, "mask": "rows", "mask_shape": "11qk"}
    return problem.replace(**changes), part
