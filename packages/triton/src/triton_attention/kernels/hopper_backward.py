"""FlashAttention V2, backward, for Hopper: ``v2_backward`` in Gluon (see ``hopper``).

P and dS are the left operands of products, which registers can hold: no tile of scores goes through
shared memory. The pass for dK and dV computes its tiles transposed, [keys, rows], for that. As in
``v2_backward`` no addition is atomic: the result is the same to the bit every time.

Dense tensors with a band, in 16 bits; everything else is left to ``v2_backward``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper import (
    LOADER_REGISTERS,
    ROWS,
    SIZES,
    arrived,
    consumer_registers,
    dense,
    hidden,
    key_tiles,
    keys_seen,
    load_next,
    load_resident,
    matrix_of,
    products_layout,
    queries_seeing,
    query_tiles,
    release,
    resident,
    ring,
    store_tile,
)

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit(do_not_specialize=[*SIZES, "grad_k_columns", "grad_v_columns"])
def keys_and_values(
    q, k, v, grad_out, lse, deltas,
    grad_k, grad_k_batch, grad_k_head, grad_k_row, grad_k_columns,
    grad_v, grad_v_batch, grad_v_head, grad_v_row, grad_v_columns,
    scale, unit, seqlen_q, seqlen_k, bottom_right, left, right, group, heads, blocks,
    shape: gl.constexpr,
):  # fmt: skip
    """dK and dV, (batch, head, row, column), column stride 1: a program owns 64 keys a consumer.

    q, grad_out: descriptors of tiles of ``shape.passing`` rows, k, v: of 64 keys; lse and deltas:
    contiguous (batch, head, row). Grid: blocks of keys x heads of keys x batch entries.
    """
    program = gl.program_id(0)
    block, rest = program % blocks, program // blocks
    kv_head, entry = rest % heads, rest // heads
    rows: gl.constexpr = shape.consumers * ROWS
    first = block * rows
    place = dense(block * 0, seqlen_q, seqlen_k, bottom_right, left, right)
    span = query_tiles(first, gl.minimum(first + rows, seqlen_k) - 1, place, shape)

    own_k, own_v = resident(k, shape), resident(v, shape)
    queries_there, grads_there = ring(q, shape), ring(grad_out, shape)
    fence_async_shared()
    to_k = (grad_k, grad_k_batch, grad_k_head, grad_k_row, grad_k_columns)
    to_v = (grad_v, grad_v_batch, grad_v_head, grad_v_row, grad_v_columns)
    told = (
        own_k, own_v, queries_there, grads_there, lse, deltas, to_k, to_v, entry, kv_head,
        group, heads * group, first, span, place, scale, unit,
    )  # fmt: skip
    loads = (
        q, k, v, grad_out, own_k, own_v, queries_there, grads_there, entry, kv_head, group,
        first, span,
    )  # fmt: skip
    registers: gl.constexpr = consumer_registers(shape.consumers)
    if shape.consumers == 2:
        gl.warp_specialize(
            [
                (own_keys, (told, 0, shape)),
                (own_keys, (told, 1, shape)),
                (load_rows, (loads, shape)),
            ],
            [4, 1], [registers, LOADER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (own_keys, (told, 0, shape)),
                (own_keys, (told, 1, shape)),
                (own_keys, (told, 2, shape)),
                (load_rows, (loads, shape)),
            ],
            [4, 4, 1], [registers, registers, LOADER_REGISTERS],
        )  # fmt: skip


@gluon.jit
def load_rows(loads, shape: gl.constexpr):
    """What the loading warp does: K and V once, then Q and dO of every head that reads them."""
    q, k, v, grad_out, own_k, own_v, to_q, to_g, entry, kv_head, group, first, span = loads
    begin, _, _, end = span
    load_resident(k, own_k, entry, kv_head, first, shape)
    load_resident(v, own_v, entry, kv_head, first, shape)
    for member in range(group):
        head = kv_head * group + member
        for n in range(begin, end):
            turn = member * (end - begin) + n - begin
            load_next(q, to_q, turn, entry, head, n * shape.passing, shape)
            load_next(grad_out, to_g, turn, entry, head, n * shape.passing, shape)


@gluon.jit
def own_keys(told, PART: gl.constexpr, shape: gl.constexpr):
    """What a consumer does: 64 keys, all rows that see them."""
    (
        own_k, own_v, queries_there, grads_there, lse, deltas, to_k, to_v, entry, kv_head,
        group, heads, first, span, place, scale, unit,
    ) = told  # fmt: skip
    k_layout: gl.constexpr = products_layout(shape.padded_dim)
    v_layout: gl.constexpr = products_layout(shape.padded_dim_v)
    dk = gl.full([ROWS, shape.padded_dim], 0.0, gl.float32, k_layout)
    dv = gl.full([ROWS, shape.padded_dim_v], 0.0, gl.float32, v_layout)
    begin, whole, edge, end = span
    key = first + PART * ROWS
    mbarrier.wait(own_k.full, 0)
    mbarrier.wait(own_v.full, 0)
    tiles = (matrix_of(own_k.tiles.index(PART)), matrix_of(own_v.tiles.index(PART)))
    rings = (queries_there, grads_there)
    layout: gl.constexpr = products_layout(shape.passing)
    j = key + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    seeing = queries_seeing(j, place, shape)
    for member in range(group):
        row_0 = (entry.to(gl.int64) * heads + kv_head * group + member) * place.len_q
        vectors = (lse + row_0, deltas + row_0)
        turn_0 = member * (end - begin) - begin  # of tile 0
        if shape.bounded_right:
            dk, dv = over_rows(
                dk,
                dv,
                tiles,
                rings,
                vectors,
                turn_0,
                begin,
                whole,
                seeing,
                place,
                unit,
                True,
                shape,
            )
        dk, dv = over_rows(
            dk, dv, tiles, rings, vectors, turn_0, whole, edge, seeing, place, unit, False, shape
        )
        dk, dv = over_rows(
            dk, dv, tiles, rings, vectors, turn_0, edge, end, seeing, place, unit, True, shape
        )
    store_tile(dk * scale, to_k, entry, kv_head, key, place.len_k)
    store_tile(dv, to_v, entry, kv_head, key, place.len_k)


@gluon.jit
def over_rows(
    dk, dv, tiles, rings, vectors, turn_0, begin, end, seeing, place, unit,
    MASKED: gl.constexpr, shape: gl.constexpr,
):  # fmt: skip
    """What the tiles begin to end of rows of one head add."""
    layout: gl.constexpr = products_layout(shape.passing)
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    k_tile, v_tile = tiles
    queries_there, grads_there = rings
    lse_start, delta_start = vectors
    dtype: gl.constexpr = k_tile.dtype
    zero = gl.full([ROWS, shape.passing], 0.0, gl.float32, layout)
    for n in range(begin, end):
        turn = turn_0 + n
        q_tile = arrived(queries_there, turn, shape)
        s = warpgroup_mma(k_tile, q_tile.permute([1, 0]), zero, use_acc=False, is_async=True)
        g_tile = arrived(grads_there, turn, shape)
        dp = warpgroup_mma(v_tile, g_tile.permute([1, 0]), zero, use_acc=False, is_async=True)
        i = n * shape.passing + gl.arange(0, shape.passing, columns)
        row_lse = lse_of(lse_start, i, place.len_q, MASKED)
        s = warpgroup_mma_wait(1, deps=[s])
        if MASKED:
            s = hidden(s, n * shape.passing, seeing, shape.bounded_right, shape.bounded_left)
        p = gl.exp2(s * unit - row_lse[None, :])
        left_p = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, dv.type.layout, 2))
        dv = warpgroup_mma(left_p, g_tile, dv, is_async=True)
        row_delta = delta_of(delta_start, i, place.len_q, MASKED)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = (p * (dp - row_delta[None, :])).to(dtype)
        left_ds = gl.convert_layout(ds, gl.DotOperandLayout(0, dk.type.layout, 2))
        dk = warpgroup_mma(left_ds, q_tile, dk, is_async=True)
        dv = warpgroup_mma_wait(1, deps=[dv])
        release(grads_there, turn, shape)
        dk = warpgroup_mma_wait(0, deps=[dk])
        release(queries_there, turn, shape)
    return dk, dv


@gluon.jit
def lse_of(start, i, rows, MASKED: gl.constexpr):
    """LSE of rows i as a power of two. Rows that saw no key, or are none, which only tiles that are
    MASKED have, get no P: s - 0 is -inf where hidden, and s - inf is -inf everywhere."""
    if MASKED:
        found = gl.load(start + i, mask=i < rows, other=float("inf"))
        found = gl.where(found == float("-inf"), 0.0, found)
    else:
        found = gl.load(start + i)
    return found * LOG2_E


@gluon.jit
def delta_of(start, i, rows, MASKED: gl.constexpr):
    """delta of rows i, 0 of those that are none."""
    if MASKED:
        found = gl.load(start + i, mask=i < rows, other=0.0)
    else:
        found = gl.load(start + i)
    return found


@gluon.jit(do_not_specialize=[*SIZES, "grad_q_columns"])
def queries(
    q, k, v, grad_out, lse, deltas,
    grad_q, grad_q_batch, grad_q_head, grad_q_row, grad_q_columns,
    scale, unit, seqlen_q, seqlen_k, bottom_right, left, right, group, heads, blocks,
    shape: gl.constexpr,
):  # fmt: skip
    """dQ, (batch, head, row, column), column stride 1: a program owns 64 rows a consumer.

    q, grad_out: descriptors of tiles of 64 rows, k, v: of ``shape.passing`` keys. Grid: blocks of
    rows x query heads x batch entries.
    """
    program = gl.program_id(0)
    block, rest = blocks - 1 - program % blocks, program // blocks
    head, entry = rest % heads, rest // heads
    rows: gl.constexpr = shape.consumers * ROWS
    first = block * rows
    place = dense(block * 0, seqlen_q, seqlen_k, bottom_right, left, right)
    span = key_tiles(first, gl.minimum(first + rows, seqlen_q) - 1, place, shape)

    own_q, own_g = resident(q, shape), resident(grad_out, shape)
    keys_there, values_there = ring(k, shape), ring(v, shape)
    fence_async_shared()
    row_0 = (entry.to(gl.int64) * heads + head) * seqlen_q
    to_q = (grad_q, grad_q_batch, grad_q_head, grad_q_row, grad_q_columns)
    told = (
        own_q, own_g, keys_there, values_there, lse + row_0, deltas + row_0, to_q, entry, head,
        first, span, place, scale, unit,
    )  # fmt: skip
    loads = (
        q, k, v, grad_out, own_q, own_g, keys_there, values_there, entry, head, head // group,
        first, span,
    )  # fmt: skip
    registers: gl.constexpr = consumer_registers(shape.consumers)
    if shape.consumers == 2:
        gl.warp_specialize(
            [
                (own_rows, (told, 0, shape)),
                (own_rows, (told, 1, shape)),
                (load_keys, (loads, shape)),
            ],
            [4, 1], [registers, LOADER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (own_rows, (told, 0, shape)),
                (own_rows, (told, 1, shape)),
                (own_rows, (told, 2, shape)),
                (load_keys, (loads, shape)),
            ],
            [4, 4, 1], [registers, registers, LOADER_REGISTERS],
        )  # fmt: skip


@gluon.jit
def load_keys(loads, shape: gl.constexpr):
    """What the loading warp does: Q and dO once, then K and V."""
    q, k, v, grad_out, own_q, own_g, to_k, to_v, entry, head, kv_head, first, span = loads
    begin, _, _, end = span
    load_resident(q, own_q, entry, head, first, shape)
    load_resident(grad_out, own_g, entry, head, first, shape)
    for n in range(begin, end):
        load_next(k, to_k, n - begin, entry, kv_head, n * shape.passing, shape)
        load_next(v, to_v, n - begin, entry, kv_head, n * shape.passing, shape)


@gluon.jit
def own_rows(told, PART: gl.constexpr, shape: gl.constexpr):
    """What a consumer does: 64 rows, all keys that they see."""
    (
        own_q, own_g, keys_there, values_there, lse, deltas, to_q, entry, head,
        first, span, place, scale, unit,
    ) = told  # fmt: skip
    layout: gl.constexpr = products_layout(shape.passing)
    q_layout: gl.constexpr = products_layout(shape.padded_dim)
    dq = gl.full([ROWS, shape.padded_dim], 0.0, gl.float32, q_layout)
    begin, whole, edge, end = span
    row = first + PART * ROWS
    i = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    vectors = lse_of(lse, i, place.len_q, True), delta_of(deltas, i, place.len_q, True)
    seen = keys_seen(i, place, shape)
    mbarrier.wait(own_q.full, 0)
    mbarrier.wait(own_g.full, 0)
    tiles = (matrix_of(own_q.tiles.index(PART)), matrix_of(own_g.tiles.index(PART)))
    rings = (keys_there, values_there)
    if shape.bounded_left:
        dq = over_keys(dq, tiles, rings, vectors, begin, begin, whole, seen, unit, True, shape)
    dq = over_keys(dq, tiles, rings, vectors, begin, whole, edge, seen, unit, False, shape)
    dq = over_keys(dq, tiles, rings, vectors, begin, edge, end, seen, unit, True, shape)
    store_tile(dq * scale, to_q, entry, head, row, place.len_q)


@gluon.jit
def over_keys(
    dq, tiles, rings, vectors, first, begin, end, seen, unit,
    MASKED: gl.constexpr, shape: gl.constexpr,
):  # fmt: skip
    """What the tiles begin to end of keys add to dQ."""
    layout: gl.constexpr = products_layout(shape.passing)
    q_tile, g_tile = tiles
    keys_there, values_there = rings
    row_lse, row_delta = vectors
    dtype: gl.constexpr = q_tile.dtype
    zero = gl.full([ROWS, shape.passing], 0.0, gl.float32, layout)
    for n in range(begin, end):
        turn = n - first
        k_tile = arrived(keys_there, turn, shape)
        s = warpgroup_mma(q_tile, k_tile.permute([1, 0]), zero, use_acc=False, is_async=True)
        v_tile = arrived(values_there, turn, shape)
        dp = warpgroup_mma(g_tile, v_tile.permute([1, 0]), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        if MASKED:
            s = hidden(s, n * shape.passing, seen, shape.bounded_left, True)
        p = gl.exp2(s * unit - row_lse[:, None])
        dp = warpgroup_mma_wait(0, deps=[dp])
        release(values_there, turn, shape)
        ds = (p * (dp - row_delta[:, None])).to(dtype)
        left_ds = gl.convert_layout(ds, gl.DotOperandLayout(0, dq.type.layout, 2))
        dq = warpgroup_mma(left_ds, k_tile, dq, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
        release(keys_there, turn, shape)
    return dq
