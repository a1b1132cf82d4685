"""Attention one key at a time: in two passes over the keys, and in one.

The step from online softmax to FlashAttention (Ye 2023, "From Online Softmax to FlashAttention",
algorithms "multi-pass self-attention" and "FlashAttention"): two passes need the final maximum
and sum before the first value is weighted; one pass rescales what it has as the maximum rises.

``block_q`` rows go through the keys together, as lanes of one processor (None: all of them), and
``block_k`` keys are taken at a time. With one of each, as in the paper, every row loads every
key: N² d elements, twice for K in two passes.
"""

from __future__ import annotations

import math

import torch

from .memory import HbmTensor
from .operands import Operands, blocks
from .state import absorb, lse, output


def two_pass(
    x: Operands, block_q: int | None = None, block_k: int = 1
) -> tuple[HbmTensor, HbmTensor]:
    """out (Hkv, G, Lq, Dv) and lse (Hkv, G, Lq): maximum and sum first, then the values."""
    out, stored_lse = _answer(x)
    for rows in blocks(x.len_q, block_q):
        q = x.q.load(rows)
        state = x.start(rows, values=False)
        for keys in blocks(x.len_k, block_k):  # pass 1: m and d
            state = absorb(state, x.rule.tile(q @ x.k.load(keys).mT, rows, keys).scores)
        m = state.m.masked_fill(state.m == -math.inf, 0.0)
        d = state.d.masked_fill(state.d == 0, 1.0)
        o = x.start(rows).o
        for keys in blocks(x.len_k, block_k):  # pass 2: o
            scores = x.rule.tile(q @ x.k.load(keys).mT, rows, keys).scores
            p = torch.exp(scores - m[..., None]) / d[..., None]
            o = o + x.dropped(p, rows, keys) @ x.v.load(keys)
        out.store(o, rows)
        stored_lse.store(lse(state), rows)
    return out, stored_lse


def one_pass(
    x: Operands, block_q: int | None = None, block_k: int = 1
) -> tuple[HbmTensor, HbmTensor]:
    """The same in a single pass: o is rescaled with d whenever m rises."""
    out, stored_lse = _answer(x)
    for rows in blocks(x.len_q, block_q):
        q = x.q.load(rows)
        state = x.start(rows)
        for keys in blocks(x.len_k, block_k):
            scores = x.rule.tile(q @ x.k.load(keys).mT, rows, keys).scores
            v = x.v.load(keys)
            state = absorb(state, scores, lambda p: x.dropped(p, rows, keys) @ v)  # noqa: B023
        out.store(output(state), rows)
        stored_lse.store(lse(state), rows)
    return out, stored_lse


def _answer(x: Operands) -> tuple[HbmTensor, HbmTensor]:
    """Room for out, in the dtype of the inputs, and for lse."""
    out = x.allocate("O", x.len_q, x.sequence.v.shape[-1], dtype=x.dtype)
    return out, x.allocate("LSE", x.len_q, vector=True)
