"""How much work a problem is: operations of its visible pairs, and bytes that must move.

A rate is always this work over the time, whatever a kernel did besides: it may compute scores
that the mask hides, or read a key more than once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attn_reference.inputs import key_count, output_shape
from attn_reference.masks import diagonal_offset
from attn_reference.problem import Problem

from .suites import Cell

# Two products forward (Q Kᵀ, P V), five backward (Q Kᵀ again, dP, dV, dQ, dK).
BACKWARD_PRODUCTS = 2.5
LSE_BYTES = 4
LARGEST_MEASURED = 1.1  # a rate above this many times the ceiling is no measurement


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations (a multiplication and an addition are two) and bytes of one call."""

    flops: float
    bytes: int

    def seconds(self, matmul: float, memory: float) -> float:
        """The roofline: at least how long it takes at ``matmul`` FLOP/s and ``memory`` B/s."""
        return max(self.flops / matmul, self.bytes / memory)


def work(cell: Cell) -> Work:
    """The work of one call of a cell; ValueError for a mask that is no rule of positions."""
    problem = cell.problem
    pairs, keys = _visible(problem)
    dims = problem.head_dim + problem.value_dim
    forward = 2.0 * problem.heads_q * pairs * dims
    size = problem.torch_dtype.itemsize
    batch, heads, rows, value_dim = output_shape(problem)
    count = batch * heads * rows
    queries, out = count * problem.head_dim * size, count * value_dim * size
    kv = problem.kv_heads * keys * dims * size
    lse = count * LSE_BYTES
    once = Work(flops=forward, bytes=queries + kv + out)
    # In: q, k, v, out, dOut, LSE. Out: dQ, dK, dV.
    back = Work(flops=BACKWARD_PRODUCTS * forward, bytes=2 * (queries + kv + out) + lse)
    if cell.direction == "forward":
        return once
    if cell.direction == "backward":
        return back
    return Work(flops=once.flops + back.flops, bytes=once.bytes + back.bytes)


def visible_pairs(problem: Problem) -> int:
    """Pairs of a query and a key that it sees, over the batch, of one query head."""
    return _visible(problem)[0]


def _visible(problem: Problem) -> tuple[int, int]:
    """Visible pairs, and keys that some query sees, over the batch."""
    if problem.mask is not None:
        raise ValueError(f"mask={problem.mask!r}: accepted are causal masks, windows and lengths")
    if problem.packed is not None:
        lengths = list(problem.packed)
    else:
        keys = problem.key_lengths or (key_count(problem),) * problem.batch
        lengths = [(problem.seqlen_q, length) for length in keys]
    pairs = seen = 0
    for len_q, len_k in lengths:
        first, last = _ranges(problem, len_q, len_k)
        counts = np.maximum(last - first, 0)
        pairs += int(counts.sum())
        # From one query to the next a range moves by one key: together they have no gap.
        if counts.any():
            seen += int(last[counts > 0].max() - first[counts > 0].min())
    return pairs, seen


def _ranges(
    problem: Problem, len_q: int, len_k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first key that each query sees, and the first behind the last one."""
    diagonal = np.arange(len_q, dtype=np.int64) + diagonal_offset(problem, len_q, len_k)
    first, last = np.zeros_like(diagonal), np.full_like(diagonal, len_k)
    left, right = problem.window or (None, None)
    if problem.causal != "none":
        last = np.minimum(last, diagonal + 1)
    if right is not None:
        last = np.minimum(last, diagonal + right + 1)
    if left is not None:
        first = np.maximum(first, diagonal - left)
    return first, last
