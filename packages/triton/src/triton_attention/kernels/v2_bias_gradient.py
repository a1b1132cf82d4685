"""The gradient of an additive bias, summed where it broadcasts: dBias = sum of P * (dP - delta).

A program owns a tile of the bias and visits, one after the other, all tiles of scores that it was
added to. Nothing is added atomically and no matrix of scores is stored.
"""

import triton
import triton.language as tl

from . import scores
from .dropout import dropped
from .sequences import key_offsets, keys_at, locate, pages_of
from .tensors import at, first_row, load_rows, score_offsets
from .v2_backward import of_rows

SIZES = ["seqlen_q", "seqlen_k", "bottom_right", "left", "right", "group", "heads", "batches"]
SIZES += ["blocks_q", "blocks_k", "lse_rows"]


@triton.jit(do_not_specialize=SIZES)
def bias_gradient(
    q, k, v, grad_out, lse, deltas, grad_bias, rule, sequences, dropout, lse_rows,
    seqlen_q, seqlen_k, bottom_right, left, right, group, heads, batches, blocks_q, blocks_k,
    OVER_BATCHES: tl.constexpr, OVER_HEADS: tl.constexpr,
    OVER_QUERIES: tl.constexpr, OVER_KEYS: tl.constexpr,
    shape: tl.constexpr, MASK_RULE: tl.constexpr,
):  # fmt: skip
    """grad_bias (batch, head, query, key); its dimensions that are summed OVER have size 1.

    Grid: the product of blocks_k, blocks_q, heads and batches, but for those summed over.
    """
    program = tl.program_id(0)
    first_k, last_k, program = share(program, blocks_k, OVER_KEYS)
    first_q, last_q, program = share(program, blocks_q, OVER_QUERIES)
    first_head, last_head, program = share(program, heads, OVER_HEADS)
    first_batch, last_batch, program = share(program, batches, OVER_BATCHES)
    total = tl.full([shape.block_m, shape.block_n], 0.0, tl.float32)
    # "first * 0 +" makes a tensor of a loop variable, which is an int where this is interpreted.
    for batch in range(first_batch, last_batch):
        place = locate(
            sequences, first_batch * 0 + batch, seqlen_q, seqlen_k, bottom_right, left, right
        )
        for member in range(first_head, last_head):
            head = first_head * 0 + member
            row_0 = first_row(place.entry, head, heads, lse_rows)
            for block_q in range(first_q, last_q):
                i = block_q * shape.block_m + tl.arange(0, shape.block_m)
                for block_k in range(first_k, last_k):
                    j = block_k * shape.block_n + tl.arange(0, shape.block_n)
                    total += gradient_of_scores(
                        q, k, v, grad_out, lse + row_0, deltas + row_0, i, j, head // group,
                        head, place, rule, sequences, dropout, shape, MASK_RULE,
                    )  # fmt: skip
    place = locate(sequences, first_batch, seqlen_q, seqlen_k, bottom_right, left, right)
    if sequences.cu_seqlens_q is not None:
        seqlen_q, seqlen_k = place.len_q, place.len_k
    i = (first_q * shape.block_m + tl.arange(0, shape.block_m))[:, None]
    j = (first_k * shape.block_n + tl.arange(0, shape.block_n))[None, :]
    inside_q, inside_k = i < seqlen_q, j < seqlen_k
    if OVER_QUERIES:
        total = tl.sum(total, 0, keep_dims=True)
        i = tl.zeros([1, 1], tl.int32)
        inside_q = i == 0
    if OVER_KEYS:
        total = tl.sum(total, 1, keep_dims=True)
        j = tl.zeros([1, 1], tl.int32)
        inside_k = j == 0
    pointers = grad_bias.ptr + score_offsets(
        place, first_head, i, j, grad_bias.batch, grad_bias.head, grad_bias.row, grad_bias.column
    )
    tl.store(pointers, total.to(grad_bias.ptr.dtype.element_ty), mask=inside_q & inside_k)


@triton.jit
def share(program, count, OVER: tl.constexpr):
    """What a program visits of a dimension, and its number among the rest: all of a dimension that
    is summed over, and one of another."""
    first, last, rest = program * 0, program * 0 + count, program
    if not OVER:
        first, rest = program % count, program // count
        last = first + 1
    return first, last, rest


@triton.jit
def gradient_of_scores(
    q, k, v, grad_out, lse_start, delta_start, i, j, kv_head, head, place, rule, sequences, dropout,
    shape: tl.constexpr, MASK_RULE: tl.constexpr,
):  # fmt: skip
    """P * (dP - delta) of one tile, fp32 [block_m, block_n], 0 where hidden."""
    query, key = i[:, None], j[None, :]
    inside_q, inside_k = i < place.len_q, j < place.len_k
    wide = (i + place.start_q).to(tl.int64)
    q_tile = load_rows(
        at(q, place.entry, head), wide * q.row, q.column, inside_q, shape.head_dim, shape.padded_dim
    )
    g_tile = load_rows(
        at(grad_out, place.entry, head), wide * grad_out.row, grad_out.column, inside_q,
        shape.head_dim_v, shape.padded_dim_v,
    )  # fmt: skip
    pages = pages_of(sequences, place, j, shape.page_size)
    k_tile = load_rows(
        keys_at(k, place, kv_head, shape.page_size),
        key_offsets(k, place, pages, j, shape.page_size),
        k.column, inside_k, shape.head_dim, shape.padded_dim,
    )  # fmt: skip
    v_tile = load_rows(
        keys_at(v, place, kv_head, shape.page_size),
        key_offsets(v, place, pages, j, shape.page_size),
        v.column, inside_k, shape.head_dim_v, shape.padded_dim_v,
    )  # fmt: skip
    row_lse, row_delta = of_rows(lse_start, delta_start, wide, inside_q)
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision=shape.products)
    s, _ = scores.tile(products, query, key, head, place, rule, True, shape, MASK_RULE)
    p = tl.exp2(s * rule.unit - row_lse[:, None])
    dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=shape.products)
    if dropout.seed is not None:
        dp = dropped(dp, query, key, head, place, dropout)
    return p * (dp - row_delta[:, None])
