"""Dropout whose keep mask is a function of seed and position, so that it need not be stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .sequences import locate
from .tensors import score_offsets


class Dropout(NamedTuple):
    """What is dropped; None in every place: nothing."""

    seed: Any  # pointer to one int64
    threshold: Any  # dropped where a random uint32 is smaller: p * 2^32
    factor: Any  # 1 / (1 - p)


SIZES = ["seqlen_q", "seqlen_k", "heads", "blocks_q", "blocks_k"]
NO_DROPOUT = Dropout(None, None, None)


@triton.jit
def kept(i, j, head, place, dropout):
    """Whether dropout keeps the probability of query i and key j, which broadcast.

    Philox-4x32-10 (Salmon et al. 2011) with the position as its counter: every kernel, whatever
    its tiles, draws the same.
    """
    zero = i * 0 + j * 0
    seed = tl.load(dropout.seed)
    random, _, _, _ = tl.philox(seed, zero + j, zero + i, zero + head, zero + place.batch)
    return random.to(tl.int64) >= dropout.threshold


@triton.jit
def dropped(probabilities, i, j, head, place, dropout):
    """A tile after dropout: times factor where kept, 0 elsewhere."""
    return tl.where(kept(i, j, head, place, dropout), probabilities * dropout.factor, 0.0)


@triton.jit(do_not_specialize=SIZES)
def keep_mask(
    out,
    sequences,
    dropout,
    seqlen_q,
    seqlen_k,
    heads,
    blocks_q,
    blocks_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write what is kept, bool (batch, head, query, key): one program per tile."""
    program = tl.program_id(0)
    block_k, rest = program % blocks_k, program // blocks_k
    block_q, rest = rest % blocks_q, rest // blocks_q
    head, batch = rest % heads, rest // heads
    place = locate(sequences, batch, seqlen_q, seqlen_k, 0, 0, 0)
    i = (block_q * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    j = (block_k * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    pointers = out.ptr + score_offsets(place, head, i, j, out.batch, out.head, out.row, out.column)
    inside = (i < place.len_q) & (j < place.len_k)
    tl.store(pointers, kept(i, j, head, place, dropout), mask=inside)
