"""FlashAttention V2, forward (Dao 2023, arXiv 2307.08691, algorithm 1).

A program owns a block of query rows and walks over the keys once. Its rows stay in registers,
split over its warps, so that the softmax needs no exchange between warps; out is divided by the
row sum once, at the end. Blocks of keys that the band hides are skipped, and masks are computed
only for blocks that need them.

Two variations for decoding, where there are few queries. PACK: a row is a query *and* a query head
of the group that reads the same keys, so that keys are loaded once per group. Splits: several
programs share the keys of the same rows; ``v2_combine`` merges what they found.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from . import scores
from .dropout import dropped
from .masks import key_range
from .sequences import key_offsets, keys_at, locate, pages_of
from .tensors import at, first_row, load_rows, store_rows

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# What does not make code better when it is known to be 1 or a multiple of 16.
SIZES = ["seqlen_q", "seqlen_k", "bottom_right", "left", "right", "group", "heads", "blocks"]
SIZES += ["batches", "entries", "splits", "lse_rows"]


class Shape(NamedTuple):
    """What a kernel of V2 knows when it is compiled."""

    head_dim: int
    head_dim_v: int
    padded_dim: int  # the same as powers of two, at least 16
    padded_dim_v: int
    pack: int  # query heads that share a block of rows: 1 or all that read the same keys
    page_size: int | None
    bounded_left: bool  # whether the band ends on that side
    bounded_right: bool
    hidden_anywhere: bool  # a mask, bias or rule may hide any key: no block goes without
    folded: bool  # the scale is part of Rule.unit
    products: str  # input_precision of tl.dot for fp32
    block_m: int
    block_n: int
    rule_key: str | None  # tells mask rules of one name apart


@triton.jit(do_not_specialize=SIZES)
def forward(
    q, k, v, out, lse, rule, sinks, sequences, dropout, lse_rows,
    seqlen_q, seqlen_k, bottom_right, left, right, group, heads, blocks, batches, entries, splits,
    shape: tl.constexpr, MASK_RULE: tl.constexpr,
):  # fmt: skip
    """out (batch, head, row, column) and lse, the natural logarithm, contiguous (batch, head, row).

    Grid: blocks of rows x heads x batches x splits, ``heads`` being query heads / pack. With
    splits, out and lse have ``entries`` batch entries for each split, split after split.
    """
    program = tl.program_id(0)
    # The last rows see the most keys under a causal mask: they start first.
    block, rest = blocks - 1 - program % blocks, program // blocks
    head, rest = rest % heads * shape.pack, rest // heads
    batch, split = rest % batches, rest // batches
    place = locate(sequences, batch, seqlen_q, seqlen_k, bottom_right, left, right)
    first = block * shape.block_m
    rows = place.len_q * shape.pack
    if first >= rows:
        return

    kv_head = head // group
    row = first + tl.arange(0, shape.block_m)
    i, member = row // shape.pack, row % shape.pack
    in_q = (i + place.start_q).to(tl.int64) * q.row + member.to(tl.int64) * q.head
    q_tile = load_rows(
        at(q, place.entry, head), in_q, q.column, row < rows, shape.head_dim, shape.padded_dim
    )

    # The state of the online softmax; m in powers of two. A sink is one more key, which every row
    # has seen and which has no value.
    m = tl.full([shape.block_m], float("-inf"), tl.float32)
    l = tl.full([shape.block_m], 0.0, tl.float32)
    acc = tl.full([shape.block_m, shape.padded_dim_v], 0.0, tl.float32)
    if sinks is not None:
        logit = tl.load(sinks + head + member).to(tl.float32)
        counts = (split == 0) & (logit != float("-inf"))
        m = tl.where(counts, logit * LOG2_E, m)
        l = tl.where(counts, 1.0, l)

    last = tl.minimum(first + shape.block_m, rows) - 1
    begin, whole, edge, end = key_range(
        first // shape.pack, last // shape.pack, place, shape, shape.block_n
    )
    if splits is not None:
        share = tl.cdiv(tl.cdiv(place.len_k, shape.block_n), splits) * shape.block_n
        begin, whole = within(begin, split, share), within(whole, split, share)
        edge, end = within(edge, split, share), within(end, split, share)
    if shape.hidden_anywhere:
        whole, edge = begin, begin
    if shape.bounded_left:
        m, l, acc = walk(
            m, l, acc, q_tile, k, v, i, kv_head, head, member, place, rule, sequences, dropout,
            begin, whole, True, shape, MASK_RULE,
        )  # fmt: skip
    if not shape.hidden_anywhere:
        m, l, acc = walk(
            m, l, acc, q_tile, k, v, i, kv_head, head, member, place, rule, sequences, dropout,
            whole, edge, False, shape, MASK_RULE,
        )  # fmt: skip
    m, l, acc = walk(
        m, l, acc, q_tile, k, v, i, kv_head, head, member, place, rule, sequences, dropout,
        edge, end, True, shape, MASK_RULE,
    )  # fmt: skip

    # The one rescale. A row that saw no key has l = 0, and gets 0 and -inf.
    empty = l == 0.0
    entry = split * entries + place.entry
    in_out = (i + place.start_q).to(tl.int64) * out.row + member.to(tl.int64) * out.head
    store_rows(
        acc / tl.where(empty, 1.0, l)[:, None],
        at(out, entry, head), in_out, out.column, row < rows, shape.head_dim_v, shape.padded_dim_v,
    )  # fmt: skip
    in_lse = (i + place.start_q).to(tl.int64) + member.to(tl.int64) * lse_rows
    natural = (m + tl.log2(tl.where(empty, 1.0, l))) * LN_2
    lse_start = lse + first_row(entry, head, heads * shape.pack, lse_rows)
    tl.store(lse_start + in_lse, natural, mask=row < rows)


@triton.jit
def within(position, split, share):
    """A key position moved into the share of a split."""
    return tl.minimum(tl.maximum(position, split * share), (split + 1) * share)


@triton.jit
def walk(
    m, l, acc, q_tile, k, v, i, kv_head, head, member, place, rule, sequences, dropout,
    begin, end, MASKED: tl.constexpr, shape: tl.constexpr, MASK_RULE: tl.constexpr,
):  # fmt: skip
    """The inner loop: the state after the keys begin to end, in blocks from begin on."""
    k_start = keys_at(k, place, kv_head, shape.page_size)
    v_start = keys_at(v, place, kv_head, shape.page_size)
    query = i[:, None]
    query_head = head
    if shape.pack > 1:
        query_head = head + member[:, None]
    for start in range(begin, end, shape.block_n):
        j = start + tl.arange(0, shape.block_n)
        key = j[None, :]
        inside = None
        if MASKED:
            inside = j < place.len_k
        pages = pages_of(sequences, place, j, shape.page_size)
        k_tile = load_rows(
            k_start, key_offsets(k, place, pages, j, shape.page_size), k.column, inside,
            shape.head_dim, shape.padded_dim,
        )  # fmt: skip
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=shape.products)
        s, _ = scores.tile(products, query, key, query_head, place, rule, MASKED, shape, MASK_RULE)
        m_new = tl.maximum(m, tl.max(s, 1) * rule.unit)
        # Nothing was seen yet, or scores have overflowed to -inf.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * rule.unit - shift[:, None])
        rescale = tl.exp2(m - shift)
        l = l * rescale + tl.sum(p, 1)
        if dropout.seed is not None:
            p = dropped(p, query, key, query_head, place, dropout)
        v_tile = load_rows(
            v_start, key_offsets(v, place, pages, j, shape.page_size), v.column, inside,
            shape.head_dim_v, shape.padded_dim_v,
        )  # fmt: skip
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=shape.products)
        m = m_new
    return m, l, acc
