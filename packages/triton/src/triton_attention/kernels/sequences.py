"""Where the sequences of a batch lie: dense, cut to key lengths, packed, or in pages."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tensors import at


class Sequences(NamedTuple):
    """Device pointers to int32 values, or None: dense where all are."""

    key_lengths: Any  # (batch,)
    cu_seqlens_q: Any  # (batch + 1,): queries of sequence n are rows cu[n] to cu[n + 1]
    cu_seqlens_k: Any
    page_table: Any  # (batch, pages): the page of each run of keys
    page_table_row: Any  # stride


class Place(NamedTuple):
    """One sequence: where its rows begin, how many there are, where its diagonal lies."""

    batch: Any  # its number
    entry: Any  # its index along the batch dimension of tensors
    start_q: Any
    len_q: Any
    start_k: Any
    len_k: Any
    diagonal: Any  # query i is aligned with key i + diagonal
    left: Any  # keys that a query sees before and behind its diagonal, where that is bounded
    right: Any


@triton.jit
def locate(sequences, batch, seqlen_q, seqlen_k, bottom_right, left, right):
    """The place of one sequence; seqlen_q and seqlen_k are those of dense tensors, seqlen_k also
    what pages have room for: there are no more keys than that.

    The diagonal ends at the bottom right if bottom_right is 1, or begins at the top left if 0.
    """
    entry, start_q, start_k = batch, batch * 0, batch * 0
    len_q, len_k = seqlen_q, seqlen_k
    if sequences.cu_seqlens_q is not None:
        entry = batch * 0
        start_q = tl.load(sequences.cu_seqlens_q + batch)
        len_q = tl.load(sequences.cu_seqlens_q + batch + 1) - start_q
        start_k = tl.load(sequences.cu_seqlens_k + batch)
        len_k = tl.load(sequences.cu_seqlens_k + batch + 1) - start_k
    if sequences.key_lengths is not None:
        # Behind the last key, or page, others follow.
        len_k = tl.minimum(tl.load(sequences.key_lengths + batch), seqlen_k)
    diagonal = (len_k - len_q) * bottom_right
    return Place(batch, entry, start_q, len_q, start_k, len_k, diagonal, left, right)


@triton.jit
def pages_of(sequences, place, j, PAGE_SIZE: tl.constexpr):
    """The page of each key j, int64; 0 where keys are not paged."""
    if PAGE_SIZE is not None:
        entry = place.batch.to(tl.int64) * sequences.page_table_row
        pages = tl.load(
            sequences.page_table + entry + j // PAGE_SIZE, mask=j < place.len_k, other=0
        ).to(tl.int64)
    else:
        pages = j.to(tl.int64) * 0
    return pages


@triton.jit
def keys_at(tensor, place, head, PAGE_SIZE: tl.constexpr):
    """Pointer to key 0 of k or v: of this batch entry, or of page 0."""
    if PAGE_SIZE is not None:
        start = at(tensor, place.entry * 0, head)
    else:
        start = at(tensor, place.entry, head)
    return start


@triton.jit
def key_offsets(tensor, place, pages, j, PAGE_SIZE: tl.constexpr):
    """Offsets in elements of the keys j, from the row 0 of their batch entry (or of page 0)."""
    if PAGE_SIZE is not None:
        offsets = pages * tensor.batch + (j % PAGE_SIZE).to(tl.int64) * tensor.row
    else:
        offsets = (j + place.start_k).to(tl.int64) * tensor.row
    return offsets
