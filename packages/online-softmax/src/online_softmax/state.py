"""The state of an online softmax, and why it can be computed in any order: it is a monoid.

Over the keys seen so far a row needs three things (Milakov & Gimelshein 2018, arXiv 1805.02867,
section 3.1; with o, Rabe & Staats 2021, arXiv 2112.05682):

    m = max_j x_j          d = Σ_j b^(x_j - m)          o = Σ_j b^(x_j - m) v_j

Two states over disjoint sets of keys merge into the state over both:

    m = max(m_a, m_b)      d = d_a b^(m_a - m) + d_b b^(m_b - m)      o likewise

``merge`` is associative and commutative, and (-inf, 0, 0), the state of no key, is neutral.
That is all that FlashAttention, split-KV decoding and ring attention rely on: one walks over
the keys in sequence, one splits them, one passes them around, and every order gives one answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .arithmetic import Base, E


@dataclass(frozen=True, kw_only=True)
class State:
    """(m, d), or (m, d, o), of rows: m and d of shape (...), o (..., Dv) or None.

    o is not divided by d before the end: ``output`` does that once.
    """

    m: Any
    d: Any
    o: Any = None


def identity(
    shape: Sequence[int], value_dim: int | None = None, like: Tensor | None = None
) -> State:
    """The state of no key, (-inf, 0, 0), for rows of that shape; dtype and device as ``like``."""
    like = torch.empty(()) if like is None else like
    return State(
        m=like.new_full(tuple(shape), -math.inf),
        d=like.new_zeros(tuple(shape)),
        o=None if value_dim is None else like.new_zeros((*shape, value_dim)),
    )


def state_of(scores: Tensor, values: Tensor | None = None, base: Base = E) -> State:
    """The state of a block of keys: scores (..., C) in the base, values (C, Dv) or (..., C, Dv).

    Scores of -inf are keys that are not seen; a row of nothing else gets the identity.
    """
    m = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    weights = base.rescale(scores, m[..., None])
    return State(m=m, d=weights.sum(-1), o=None if values is None else weights @ values)


def merge(a: State, b: State, base: Base = E) -> State:
    """The state over the keys of both."""
    m = base.maximum(a.m, b.m)
    of_a, of_b = base.rescale(a.m, m), base.rescale(b.m, m)
    o = None
    if a.o is not None and b.o is not None:
        o = a.o * of_a[..., None] + b.o * of_b[..., None]
    return State(m=m, d=a.d * of_a + b.d * of_b, o=o)


def absorb(
    state: State, scores: Tensor, product: Callable[[Tensor], Tensor] | None = None, base: Base = E
) -> State:
    """The state after a block of keys more, whose own maximum is never taken for itself.

    scores (..., C) in the base; ``product`` gives P @ V, (..., Dv), for P = b^(scores - m). This
    is what FlashAttention-2 does in its inner loop (Dao 2023, arXiv 2307.08691, algorithm 1,
    lines 8 to 10): the same state as ``merge(state, state_of(scores, values))``, with one
    rescaling where that has two.
    """
    m = base.maximum(state.m, scores.amax(-1)) if scores.shape[-1] else state.m
    p = base.rescale(scores, m[..., None])
    rescale = base.rescale(state.m, m)
    o = None if product is None else state.o * rescale[..., None] + product(p)
    return State(m=m, d=state.d * rescale + p.sum(-1), o=o)


def fold(states: Iterable[State], base: Base = E) -> State:
    """One after the other, from the left: what a kernel does that walks over its keys."""
    return reduce(lambda a, b: merge(a, b, base), states)


def fold_tree(states: Sequence[State], base: Base = E) -> State:
    """In pairs, and pairs of pairs: what a reduction over threads or splits does."""
    level = list(states)
    while len(level) > 1:
        pairs = [merge(a, b, base) for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    return level[0]


def output(state: State) -> Tensor:
    """out = o / d, (..., Dv); 0 for rows that saw no key."""
    out: Tensor = state.o / state.d.masked_fill(state.d == 0, 1.0)[..., None]
    return out


def lse(state: State, base: Base = E) -> Tensor:
    """log Σ exp of the natural scores, (...); -inf for rows that saw no key."""
    natural: Tensor = base.nats(state.m + base.logarithm(state.d))
    return natural
