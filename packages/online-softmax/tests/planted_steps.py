"""Targets for ``attnproof check``: attention by a state that is right, or has one fault planted.

``planted_steps.py:correct`` conforms; every name in ``FAULTS`` is a function of this module that
does not, and ``IMPLEMENTATIONS`` holds the operations of states that it is made of, for the laws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from softmax_laws import Implementation
from torch import Tensor

from online_softmax import state
from online_softmax.arithmetic import TWO, Base, E, finite
from online_softmax.state import State

FAULTS = {
    "no_rescale": "o is not rescaled when m rises; d is",
    "m_starts_at_zero": "the state of no key has m = 0",
    "d_starts_at_one": "the state of no key has d = 1",
    "merge_forgets_one_exponent": "of two states that merge, the second is not rescaled",
    "bases_mixed": "what a key weighs is exp2, what a state is rescaled by is exp",
}


def merge(fault: str | None, a: State, b: State, base: Base = E) -> State:
    """``state.merge``, with a fault."""
    m = base.maximum(a.m, b.m)
    of_a, of_b = _rescale(fault, a.m, m, base), _rescale(fault, b.m, m, base)
    if fault == "merge_forgets_one_exponent":
        of_b = of_b * 0 + 1
    d = a.d * of_a + b.d * of_b
    if a.o is None or b.o is None:
        return State(m=m, d=d)
    if fault == "no_rescale":
        return State(m=m, d=d, o=a.o + b.o)
    return State(m=m, d=d, o=a.o * of_a[..., None] + b.o * of_b[..., None])


def absorb(
    fault: str | None,
    running: State,
    scores: Tensor,
    product: Callable[[Tensor], Tensor] | None = None,
    base: Base = E,
) -> State:
    """``state.absorb``, with a fault."""
    m = base.maximum(running.m, scores.amax(-1)) if scores.shape[-1] else running.m
    p = base.rescale(scores, m[..., None])
    rescale = _rescale(fault, running.m, m, base)
    o = None
    if product is not None:
        of_o = torch.ones_like(rescale) if fault == "no_rescale" else rescale
        o = running.o * of_o[..., None] + product(p)
    return State(m=m, d=running.d * rescale + p.sum(-1), o=o)


def _rescale(fault: str | None, old: Any, new: Any, base: Base) -> Any:
    """What a state is rescaled by."""
    mixed = fault == "bases_mixed" and base is TWO
    return E.rescale(old, new) if mixed else base.rescale(old, new)


def identity(fault: str | None, *shape: Any, **like: Any) -> State:
    """``state.identity``, with a fault."""
    nothing = state.identity(*shape, **like)
    m = torch.zeros_like(nothing.m) if fault == "m_starts_at_zero" else nothing.m
    d = torch.ones_like(nothing.d) if fault == "d_starts_at_one" else nothing.d
    return State(m=m, d=d, o=nothing.o)


def lse(final: State, base: Base = E) -> Tensor:
    """``state.lse`` as kernels write it that have replaced m = -inf by 0: -inf comes from d = 0.

    It is here that d = 1 at the start shows: where there is a key, b^(-inf - m) = 0 removes it.
    """
    return base.nats(finite(final.m) + base.logarithm(final.d))


def implementation(fault: str | None) -> Implementation:
    """The operations of states, with one of FAULTS or without."""
    return Implementation(
        identity=partial(identity, fault),
        merge=partial(merge, fault),
        absorb=partial(absorb, fault),
        lse=lse,
    )


IMPLEMENTATIONS = {name: implementation(name) for name in FAULTS}
CORRECT = implementation(None)
# So few that short problems, too, absorb several blocks and merge several splits.
SPLIT, BLOCK = 40, 16


def _cut(start: int, stop: int, size: int) -> Iterator[slice]:
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))


def _attend(impl: Implementation, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> State:
    """Split-KV in base 2, made of these operations: blocks are absorbed, splits are merged.

    q (H, Lq, D) in base 2, k (H, Lk, D), v (H, Lk, Dv), seen bool (H or 1, Lq, Lk).
    """
    nothing = partial(impl.identity, q.shape[:2], v.shape[-1], like=q)
    whole = nothing()
    for split in _cut(0, k.shape[1], SPLIT):
        part = nothing()
        for keys in _cut(split.start, split.stop, BLOCK):
            scores = q @ k[:, keys].float().mT
            scores = scores.masked_fill(~seen[..., keys], -math.inf)
            values = v[:, keys]

            def product(p: Tensor, values: Tensor = values) -> Tensor:
                return p.to(values.dtype).float() @ values.float()

            part = impl.absorb(part, scores, product, TWO)
        whole = impl.merge(whole, part, TWO)
    return whole


def kernel(impl: Implementation) -> Callable[..., Any]:
    """Attention, a batch entry after the other, made of these operations."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        causal: str = "none",
        mask: Tensor | None = None,
        key_lengths: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        batch, heads, len_q, _ = q.shape
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        out = q.new_empty((batch, heads, len_q, v.shape[-1]))
        logs = q.new_empty((batch, heads, len_q), dtype=torch.float32)
        for b in range(batch):
            n = k.shape[2] if key_lengths is None else int(key_lengths[b])
            seen = torch.ones(1, len_q, n, dtype=torch.bool, device=q.device)
            if causal != "none":
                seen = seen.tril(0 if causal == "top-left" else n - len_q)
            if mask is not None:
                seen = seen & mask.expand(batch, heads, len_q, k.shape[2])[b, ..., :n]
            group = heads // k.shape[1]
            keys, values = (x[b, :, :n].repeat_interleave(group, 0) for x in (k, v))
            final = _attend(impl, TWO.scores(scale * q[b].float()), keys, values, seen)
            out[b], logs[b] = impl.output(final), impl.lse(final, TWO)
        return (out, logs) if return_lse else out

    attention.attnproof_capabilities = {"gradients": []}
    return attention


correct = kernel(CORRECT)
for name, faulty in IMPLEMENTATIONS.items():
    globals()[name] = kernel(faulty)
