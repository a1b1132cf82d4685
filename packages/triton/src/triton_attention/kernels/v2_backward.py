"""FlashAttention V2, backward (Dao 2023, arXiv 2307.08691, algorithm 2), in three kernels.

S and P are computed again, from the LSE alone. The paper adds dQ up in HBM while it walks over
blocks of keys; here dQ has a pass of its own, over blocks of rows like forward. That is two
products more per tile, and no atomic addition: the result is the same to the bit every time.
"""

import triton
import triton.language as tl

from . import scores
from .dropout import dropped
from .masks import key_range, query_range
from .sequences import key_offsets, keys_at, locate, pages_of
from .tensors import at, first_row, load_rows, store_rows

LOG2_E = tl.constexpr(1.4426950408889634)
SIZES = ["seqlen_q", "seqlen_k", "bottom_right", "left", "right", "group", "heads", "blocks"]
SIZES += ["lse_rows"]


@triton.jit(do_not_specialize=["rows", "heads", "blocks"])
def delta(
    out, grad_out, grad_lse, deltas, rows, heads, blocks,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """deltas = rowsum(dO * O) - dLSE, which dS = P * (dP - delta) needs; deltas and grad_lse are
    contiguous (batch, head, row). Grid: blocks of rows x heads x batch entries.
    """
    program = tl.program_id(0)
    block, rest = program % blocks, program // blocks
    head, entry = rest % heads, rest // heads
    row = block * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    wide = row.to(tl.int64)
    o = load_rows(at(out, entry, head), wide * out.row, out.column, inside, WIDTH, PADDED)
    g = load_rows(
        at(grad_out, entry, head), wide * grad_out.row, grad_out.column, inside, WIDTH, PADDED
    )
    total = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    place = first_row(entry, head, heads, rows) + wide
    if grad_lse is not None:
        total -= tl.load(grad_lse + place, mask=inside, other=0.0)
    tl.store(deltas + place, total, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def keys_and_values(
    q, k, v, grad_out, lse, deltas, grad_k, grad_v, rule, sequences, dropout, lse_rows,
    seqlen_q, seqlen_k, bottom_right, left, right, group, heads, blocks,
    shape: tl.constexpr, MASK_RULE: tl.constexpr,
):  # fmt: skip
    """dK and dV: a program owns a block of keys and walks over the rows of every query head that
    reads them. Grid: blocks of keys x heads of keys x batches.
    """
    program = tl.program_id(0)
    block, rest = program % blocks, program // blocks
    kv_head, batch = rest % heads, rest // heads
    place = locate(sequences, batch, seqlen_q, seqlen_k, bottom_right, left, right)
    first = block * shape.block_n
    if first >= place.len_k:
        return
    j = first + tl.arange(0, shape.block_n)
    inside = j < place.len_k
    wide = (j + place.start_k).to(tl.int64)
    k_tile = load_rows(
        at(k, place.entry, kv_head),
        wide * k.row,
        k.column,
        inside,
        shape.head_dim,
        shape.padded_dim,
    )
    v_tile = load_rows(
        at(v, place.entry, kv_head), wide * v.row, v.column, inside,
        shape.head_dim_v, shape.padded_dim_v,
    )  # fmt: skip
    dk = tl.full([shape.block_n, shape.padded_dim], 0.0, tl.float32)
    dv = tl.full([shape.block_n, shape.padded_dim_v], 0.0, tl.float32)
    last = tl.minimum(first + shape.block_n, place.len_k) - 1
    begin, whole, edge, end = query_range(first, last, place, shape, shape.block_m)
    if shape.hidden_anywhere:
        whole, edge = begin, begin
    for member in range(group):
        head = kv_head * group + member
        row_0 = first_row(place.entry, head, heads * group, lse_rows)
        lse_start, delta_start = lse + row_0, deltas + row_0
        if shape.bounded_right:
            dk, dv = over_rows(
                dk, dv, k_tile, v_tile, q, grad_out, lse_start, delta_start, j, head, place, rule,
                dropout, begin, whole, True, shape, MASK_RULE,
            )  # fmt: skip
        if not shape.hidden_anywhere:
            dk, dv = over_rows(
                dk, dv, k_tile, v_tile, q, grad_out, lse_start, delta_start, j, head, place, rule,
                dropout, whole, edge, False, shape, MASK_RULE,
            )  # fmt: skip
        dk, dv = over_rows(
            dk, dv, k_tile, v_tile, q, grad_out, lse_start, delta_start, j, head, place, rule,
            dropout, edge, end, True, shape, MASK_RULE,
        )  # fmt: skip
    store_rows(
        dk * rule.scale, at(grad_k, place.entry, kv_head), wide * grad_k.row, grad_k.column, inside,
        shape.head_dim, shape.padded_dim,
    )  # fmt: skip
    store_rows(
        dv, at(grad_v, place.entry, kv_head), wide * grad_v.row, grad_v.column, inside,
        shape.head_dim_v, shape.padded_dim_v,
    )  # fmt: skip


@triton.jit
def over_rows(
    dk, dv, k_tile, v_tile, q, grad_out, lse_start, delta_start, j, head, place, rule, dropout,
    begin, end, MASKED: tl.constexpr, shape: tl.constexpr, MASK_RULE: tl.constexpr,
):  # fmt: skip
    """What the rows begin to end of one head add. Tiles are transposed, [keys, rows]: P and dS are
    then the left operands of both products, which registers can hold."""
    q_start, g_start = at(q, place.entry, head), at(grad_out, place.entry, head)
    key = j[:, None]
    for start in range(begin, end, shape.block_m):
        i = start + tl.arange(0, shape.block_m)
        query = i[None, :]
        wide = (i + place.start_q).to(tl.int64)
        inside = None
        if MASKED:
            inside = i < place.len_q
        q_tile = load_rows(
            q_start, wide * q.row, q.column, inside, shape.head_dim, shape.padded_dim
        )
        row_lse, row_delta = of_rows(lse_start, delta_start, wide, inside)
        products = tl.dot(k_tile, tl.trans(q_tile), input_precision=shape.products)
        s, slope = scores.tile(products, query, key, head, place, rule, MASKED, shape, MASK_RULE)
        p = tl.exp2(s * rule.unit - row_lse[None, :])
        g_tile = load_rows(
            g_start, wide * grad_out.row, grad_out.column, inside,
            shape.head_dim_v, shape.padded_dim_v,
        )  # fmt: skip
        dp = tl.dot(v_tile, tl.trans(g_tile), input_precision=shape.products)
        p_kept = p
        if dropout.seed is not None:
            p_kept = dropped(p, query, key, head, place, dropout)
            dp = dropped(dp, query, key, head, place, dropout)
        dv = tl.dot(p_kept.to(g_tile.dtype), g_tile, dv, input_precision=shape.products)
        ds = p * (dp - row_delta[None, :])
        if rule.softcap is not None:
            ds *= slope
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=shape.products)
    return dk, dv


@triton.jit
def of_rows(lse_start, delta_start, wide, inside):
    """LSE, as a power of two, and delta of some rows. Rows that saw no key, or are none, have no
    P: s - 0 is -inf where hidden, and s - inf is -inf everywhere."""
    lse_at, delta_at = lse_start + wide, delta_start + wide
    if inside is None:
        row_lse, row_delta = tl.load(lse_at), tl.load(delta_at)
    else:
        row_lse = tl.load(lse_at, mask=inside, other=float("inf"))
        row_delta = tl.load(delta_at, mask=inside, other=0.0)
    return tl.where(row_lse == float("-inf"), 0.0, row_lse * LOG2_E), row_delta


@triton.jit(do_not_specialize=SIZES)
def queries(
    q, k, v, grad_out, lse, deltas, grad_q, rule, sequences, dropout, lse_rows,
    seqlen_q, seqlen_k, bottom_right, left, right, group, heads, blocks,
    shape: tl.constexpr, MASK_RULE: tl.constexpr,
):  # fmt: skip
    """dQ: a program owns a block of rows and walks over the keys, as forward does.

    Grid: blocks of rows x query heads x batches.
    """
    program = tl.program_id(0)
    block, rest = blocks - 1 - program % blocks, program // blocks
    head, batch = rest % heads, rest // heads
    place = locate(sequences, batch, seqlen_q, seqlen_k, bottom_right, left, right)
    first = block * shape.block_m
    if first >= place.len_q:
        return
    kv_head = head // group
    i = first + tl.arange(0, shape.block_m)
    inside = i < place.len_q
    wide = (i + place.start_q).to(tl.int64)
    q_tile = load_rows(
        at(q, place.entry, head), wide * q.row, q.column, inside, shape.head_dim, shape.padded_dim
    )
    g_tile = load_rows(
        at(grad_out, place.entry, head), wide * grad_out.row, grad_out.column, inside,
        shape.head_dim_v, shape.padded_dim_v,
    )  # fmt: skip
    row_0 = first_row(place.entry, head, heads, lse_rows)
    row_lse, row_delta = of_rows(lse + row_0, deltas + row_0, wide, inside)
    dq = tl.full([shape.block_m, shape.padded_dim], 0.0, tl.float32)
    last = tl.minimum(first + shape.block_m, place.len_q) - 1
    begin, whole, edge, end = key_range(first, last, place, shape, shape.block_n)
    if shape.hidden_anywhere:
        whole, edge = begin, begin
    if shape.bounded_left:
        dq = over_keys(
            dq, q_tile, g_tile, row_lse, row_delta, k, v, i, kv_head, head, place, rule,
            sequences, dropout, begin, whole, True, shape, MASK_RULE,
        )  # fmt: skip
    if not shape.hidden_anywhere:
        dq = over_keys(
            dq, q_tile, g_tile, row_lse, row_delta, k, v, i, kv_head, head, place, rule,
            sequences, dropout, whole, edge, False, shape, MASK_RULE,
        )  # fmt: skip
    dq = over_keys(
        dq, q_tile, g_tile, row_lse, row_delta, k, v, i, kv_head, head, place, rule,
        sequences, dropout, edge, end, True, shape, MASK_RULE,
    )  # fmt: skip
    store_rows(
        dq * rule.scale, at(grad_q, place.entry, head), wide * grad_q.row, grad_q.column, inside,
        shape.head_dim, shape.padded_dim,
    )  # fmt: skip


@triton.jit
def over_keys(
    dq, q_tile, g_tile, row_lse, row_delta, k, v, i, kv_head, head, place, rule, sequences,
    dropout, begin, end, MASKED: tl.constexpr, shape: tl.constexpr, MASK_RULE: tl.constexpr,
):  # fmt: skip
    """What the keys begin to end add to dQ."""
    k_start = keys_at(k, place, kv_head, shape.page_size)
    v_start = keys_at(v, place, kv_head, shape.page_size)
    query = i[:, None]
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
        s, slope = scores.tile(products, query, key, head, place, rule, MASKED, shape, MASK_RULE)
        p = tl.exp2(s * rule.unit - row_lse[:, None])
        v_tile = load_rows(
            v_start, key_offsets(v, place, pages, j, shape.page_size), v.column, inside,
            shape.head_dim_v, shape.padded_dim_v,
        )  # fmt: skip
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=shape.products)
        if dropout.seed is not None:
            dp = dropped(dp, query, key, head, place, dropout)
        ds = p * (dp - row_delta[:, None])
        if rule.softcap is not None:
            ds *= slope
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=shape.products)
    return dq
