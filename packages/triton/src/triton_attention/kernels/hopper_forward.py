"""FlashAttention V2, forward, for Hopper: ``v2_forward`` in Gluon (see ``hopper``).

As in FlashAttention-3 (algorithm 2 there), the products of the next tile of keys are asked for
before those of this one with V: the tensor cores work while the exponentials are computed.

Dense tensors with a band, in 16 bits; everything else is left to ``v2_forward``.
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
    release,
    resident,
    ring,
    store_tile,
)

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit(do_not_specialize=[*SIZES, "out_columns"])
def forward(
    q, k, v, out, out_batch, out_head, out_row, out_columns, lse, unit,
    seqlen_q, seqlen_k, bottom_right, left, right, group, heads, blocks, shape: gl.constexpr,
):  # fmt: skip
    """out (batch, head, row, column), column stride 1, and lse, contiguous (batch, head, row).

    q, k, v: descriptors (batch, head, row, column) of tiles of 64 rows and ``shape.passing`` keys.
    unit: log2(e) times the scale, which is positive. Grid: blocks of rows x heads x batch entries.
    """
    program = gl.program_id(0)
    # The last rows see the most keys under a causal mask: they start first.
    block, rest = blocks - 1 - program % blocks, program // blocks
    head, entry = rest % heads, rest // heads
    rows: gl.constexpr = shape.consumers * ROWS
    first = block * rows
    place = dense(block * 0, seqlen_q, seqlen_k, bottom_right, left, right)
    span = key_tiles(first, gl.minimum(first + rows, seqlen_q) - 1, place, shape)

    own, keys, values = resident(q, shape), ring(k, shape), ring(v, shape)
    fence_async_shared()
    target = (out, out_batch, out_head, out_row, out_columns)
    told = (own, keys, values, target, lse, entry, head, heads, first, span, place, unit)
    # Triton 3.6 takes these functions by their names alone: each kernel has a copy of the branches.
    registers: gl.constexpr = consumer_registers(shape.consumers)
    loads = (q, k, v, own, keys, values, entry, head, head // group, first, span)
    if shape.consumers == 1:
        gl.warp_specialize(
            [(multiply, (told, 0, shape)), (load, (loads, shape))], [1], [LOADER_REGISTERS]
        )
    elif shape.consumers == 2:
        gl.warp_specialize(
            [(multiply, (told, 0, shape)), (multiply, (told, 1, shape)), (load, (loads, shape))],
            [4, 1], [registers, LOADER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (multiply, (told, 0, shape)),
                (multiply, (told, 1, shape)),
                (multiply, (told, 2, shape)),
                (load, (loads, shape)),
            ],
            [4, 4, 1], [registers, registers, LOADER_REGISTERS],
        )  # fmt: skip


@gluon.jit
def load(loads, shape: gl.constexpr):
    """What the loading warp does."""
    q, k, v, own, keys, values, entry, head, kv_head, first, span = loads
    begin, _, _, end = span
    if begin < end:  # else nobody waits for it, and it would arrive in the next program's memory
        load_resident(q, own, entry, head, first, shape)
    for n in range(begin, end):
        load_next(k, keys, n - begin, entry, kv_head, n * shape.passing, shape)
        load_next(v, values, n - begin, entry, kv_head, n * shape.passing, shape)


@gluon.jit
def multiply(told, PART: gl.constexpr, shape: gl.constexpr):
    """What a consumer does: 64 rows, all keys that they see."""
    own, keys, values, target, lse, entry, head, heads, first, span, place, unit = told
    s_layout: gl.constexpr = products_layout(shape.passing)
    o_layout: gl.constexpr = products_layout(shape.padded_dim_v)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = own.tiles.dtype
    begin, whole, edge, end = span
    row = first + PART * ROWS
    i = row + gl.arange(0, ROWS, row_layout)
    seen = keys_seen(i, place, shape)
    m = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    l = gl.full([ROWS], 0.0, gl.float32, row_layout)
    acc = gl.full([ROWS, shape.padded_dim_v], 0.0, gl.float32, o_layout)
    if begin < end:
        mbarrier.wait(own.full, 0)
        q_tile = matrix_of(own.tiles.index(PART))
        s = warpgroup_mma_wait(0, deps=[products(q_tile, keys, 0, shape)])
        release(keys, 0, shape)
        found, m, l, _ = softmax(s, m, l, begin, seen, unit, True, shape)
        p = gl.convert_layout(found.to(dtype), p_layout)
        second = begin + 1
        whole, edge = gl.maximum(whole, second), gl.maximum(edge, second)
        if shape.bounded_left:
            p, acc, m, l = walk(
                p, acc, m, l, q_tile, keys, values, begin, second, whole, seen, unit, True, shape
            )
        p, acc, m, l = walk(
            p, acc, m, l, q_tile, keys, values, begin, whole, edge, seen, unit, False, shape
        )
        p, acc, m, l = walk(
            p, acc, m, l, q_tile, keys, values, begin, edge, end, seen, unit, True, shape
        )
        tile = arrived(values, end - 1 - begin, shape)
        acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, tile, acc, is_async=True)])

    # The one rescale. A row that saw no key has l = 0, and gets 0 and -inf.
    total = gl.where(l == 0.0, 1.0, l)
    natural = (m + gl.log2(total)) * LN_2
    lse_start = lse + (entry.to(gl.int64) * heads + head) * place.len_q
    gl.store(lse_start + i, natural, mask=i < place.len_q)
    share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, o_layout))
    store_tile(acc * share[:, None], target, entry, head, row, place.len_q)


@gluon.jit
def walk(
    p, acc, m, l, q_tile, keys, values, first, begin, end, seen, unit,
    MASKED: gl.constexpr, shape: gl.constexpr,
):  # fmt: skip
    """The state after tiles begin to end; p is of the tile before, and not yet multiplied."""
    for n in range(begin, end):
        turn = n - first
        s = products(q_tile, keys, turn, shape)
        tile = arrived(values, turn - 1, shape)
        acc = warpgroup_mma(p, tile, acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        release(keys, turn, shape)
        found, m, l, rescale = softmax(s, m, l, n, seen, unit, MASKED, shape)
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(values, turn - 1, shape)
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
        p = gl.convert_layout(found.to(p.dtype), p.type.layout)
    return p, acc, m, l


@gluon.jit
def products(q_tile, keys, turn, shape: gl.constexpr):
    """Starts Q K^T with the tile of keys of this turn."""
    layout: gl.constexpr = products_layout(shape.passing)
    zero = gl.full([ROWS, shape.passing], 0.0, gl.float32, layout)
    tile = arrived(keys, turn, shape)
    return warpgroup_mma(q_tile, tile.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def softmax(s, m, l, n, seen, unit, MASKED: gl.constexpr, shape: gl.constexpr):
    """(P, m, l, the factor that rescales what was found before) after the scores of tile n; m is in
    powers of two."""
    if MASKED:
        s = hidden(s, n * shape.passing, seen, shape.bounded_left, True)
    m_new = gl.maximum(m, gl.max(s, 1) * unit)
    # Nothing was seen yet, or scores have overflowed to -inf.
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * unit - shift[:, None])
    rescale = gl.exp2(m - shift)
    return p, m_new, l * rescale + gl.sum(p, 1), rescale
