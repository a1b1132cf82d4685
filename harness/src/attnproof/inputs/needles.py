"""Queries that single out keys: the key's number in binary, as signs, is its code.

Key j holds the bits of j, each repeated over head_dim / bits dimensions, as ±1; a query that
repeats the code of a key scores highest there, and lower by at least the chosen gap at every
other key. A query with zeros in place of the lowest w bits singles out an aligned run of 2^w
keys. All scores are exact in fp32. Signs drawn per head and dimension tell heads apart.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from attn_reference.masks import diagonal_offset
from attn_reference.problem import Problem

from .streams import Floats, Shape, Stream

Ints = NDArray[np.int64]

NEEDLE_GAP = 8.0  # nats to the nearest other key: the one singled out keeps over 95 %
EXACT_GAP = 112.0  # nats: every other probability is 0 even among the subnormals of fp32
_STRIDES = (7, 11, 13, 5, 3, 1)


def needles(
    problem: Problem, q_shape: Shape, k_shape: Shape, gap: float, *, share: bool
) -> tuple[Floats, Floats]:
    """q and k, float32 in these shapes, in which queries single out keys by ``gap`` nats.

    With ``share`` a query singles out a run of keys where the queries of a key/value head are
    fewer than its keys; without it head_dim must hold a code for every key: ValueError.
    """
    code = _Code(problem, gap, unique=not share)
    signs = 2.0 * Stream(problem.seed, "needles").bernoulli(
        (problem.kv_heads, 1, problem.head_dim), 0.5
    ) - np.float32(1)
    q = np.zeros(q_shape, dtype=np.float32)
    k = np.zeros(k_shape, dtype=np.float32)
    start_q = start_k = 0
    for b, (len_q, len_k) in enumerate(_lengths(problem)):
        entry = 0 if problem.packed is not None else b
        stored = len_k if problem.packed is not None else problem.keys
        k[entry, :, start_k : start_k + stored] = code(np.arange(stored)) * signs
        targets, wild = singled_out(problem, len_q, len_k, share=share)
        rows = q[entry, :, start_q : start_q + len_q].reshape(
            problem.kv_heads, problem.group * len_q, problem.head_dim
        )
        rows = code.factor * code(targets, wild) * signs
        q[entry, :, start_q : start_q + len_q] = rows.reshape(
            problem.heads_q, len_q, problem.head_dim
        )
        if problem.packed is not None:
            start_q, start_k = start_q + len_q, start_k + len_k
    return q, k


class _Code:
    """The ±1 code of key numbers, and the factor of the queries that gives the gap."""

    def __init__(self, problem: Problem, gap: float, *, unique: bool) -> None:
        longest = max((length for _, length in _lengths(problem)), default=1)
        bits = max(1, (longest - 1).bit_length())
        if unique and bits > problem.head_dim:
            raise ValueError(
                f"head_dim={problem.head_dim}: accepted is {bits} or more, a dimension for each "
                f"bit of the number of {longest} keys, with this distribution"
            )
        bits = min(bits, problem.head_dim)
        self.bit = np.arange(problem.head_dim) % bits  # which bit a dimension repeats
        per_unit = 2.0 * (problem.head_dim // bits) * abs(problem.softmax_scale)
        if per_unit == 0:
            raise ValueError("scale=0: accepted is any other number, with this distribution")
        factor = 2.0 ** math.frexp(gap / per_unit)[1]
        self.factor = np.float32(math.copysign(factor, problem.softmax_scale))

    def __call__(self, numbers: Ints, wild: int = 0) -> Floats:
        """Codes (..., head_dim) of these key numbers, 0 for the ``wild`` lowest bits."""
        signs = ((numbers[..., None] >> self.bit) & 1) * 2 - 1
        return np.where(self.bit < wild, 0, signs).astype(np.float32)


def singled_out(problem: Problem, len_q: int, len_k: int, *, share: bool) -> tuple[Ints, int]:
    """The key that each query of a sequence singles out, and how many low bits are wild.

    The keys are (kv_heads, group · len_q) and lie within what causality and window let the
    query see (key 0 for queries that see none); together they cover all that any query sees.
    """
    rows = problem.group * len_q
    low, high = _visible(problem, len_q, len_k)
    seen = low <= high
    if not seen.any():
        return np.zeros((problem.kv_heads, rows), dtype=np.int64), 0
    first, last = int(low[seen].min()), int(high[seen].max())
    wild = (-(-(last + 1 - first) // rows) - 1).bit_length() if share else 0
    run = 1 << wild
    if (low == first).all() and (high == last).all():
        blocks = last // run - first // run + 1
        stride = next(s for s in _STRIDES if math.gcd(s, blocks) == 1)
        head = np.arange(problem.kv_heads)[:, None]
        block = (stride * np.arange(rows) + 5 * head) % blocks
        return (first // run + block) * run, wild
    # The keys that can be seen move along with the queries, one by one: so do those singled
    # out. The next head of the group goes on where this one ended.
    begin = np.flatnonzero(seen)[0]
    step = run * (np.arange(len_q) - begin)
    targets = np.zeros((problem.group, len_q), dtype=np.int64)
    start = first
    for target in targets:
        target[seen] = np.clip(start // run * run + step, low, high)[seen]
        start = (int(target[seen][-1]) // run + 1) * run
        if start > last:
            start = first
    return np.tile(targets.reshape(1, rows), (problem.kv_heads, 1)), wild


def _visible(problem: Problem, len_q: int, len_k: int) -> tuple[Ints, Ints]:
    """First and last key that causality and window let each query see, (len_q,) each."""
    diagonal = np.arange(len_q) + diagonal_offset(problem, len_q, len_k)
    left, right = problem.window or (None, None)
    low = np.zeros(len_q, dtype=np.int64) if left is None else np.maximum(diagonal - left, 0)
    reach = [len_k - 1 + 0 * diagonal]
    if problem.causal != "none":
        reach.append(diagonal)
    if right is not None:
        reach.append(diagonal + right)
    return low, np.minimum.reduce(reach)


def _lengths(problem: Problem) -> tuple[tuple[int, int], ...]:
    """Queries and keys of each sequence."""
    if problem.packed is not None:
        return problem.packed
    keys = problem.key_lengths or (problem.keys,) * problem.batch
    return tuple((problem.seqlen_q, length) for length in keys)
