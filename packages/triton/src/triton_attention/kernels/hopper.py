"""What the kernels for Hopper share: rings of tiles in shared memory that TMA fills.

One warp loads, with the tensor memory accelerator, and *consumers* multiply, warpgroups of 64 rows
each (FlashAttention-3: Shah et al. 2024, arXiv 2407.08608). A ring has a number of stages, each
with two barriers: full, when what was loaded has arrived, and empty, when every consumer is done
with it. In Gluon, since ``tl`` cannot say any of this; the interpreter does not run it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .masks import key_range, query_range
from .sequences import Place

ROWS = gl.constexpr(64)  # that a warpgroup multiplies at a time
LOADER_REGISTERS = gl.constexpr(24)
# What does not make code better when it is known to be 1 or a multiple of 16.
SIZES = ["seqlen_q", "seqlen_k", "bottom_right", "left", "right", "group", "heads", "blocks"]


class Ring(NamedTuple):
    """Tiles in shared memory, (stages, 1, 1, rows, columns), and the barriers of each stage."""

    tiles: Any
    full: Any
    empty: Any


class HopperShape(NamedTuple):
    """What a kernel knows when it is compiled."""

    padded_dim: int  # of q and k, a power of two
    padded_dim_v: int
    bounded_left: bool  # whether the band ends on that side
    bounded_right: bool
    consumers: int  # 1 to 3; each owns 64 rows, or keys in the pass for dK and dV
    passing: int  # keys, or rows, of a tile that passes by
    stages: int  # of the rings


@gluon.constexpr_function
def consumer_registers(consumers):
    """Registers of a consumer's thread, of the 65,536 of a multiprocessor."""
    return {1: 240, 2: 240, 3: 160}[consumers]


@gluon.constexpr_function
def products_layout(columns):
    """The layout of products with so many columns: 64 rows over the warps of a warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def ring(descriptor, shape: gl.constexpr):
    """A ring of tiles of a descriptor, all of them empty."""
    stages: gl.constexpr = shape.stages
    tiles = gl.allocate_shared_memory(
        descriptor.dtype,
        [stages] + descriptor.block_shape,  # noqa: RUF005 (Triton knows no stars)
        descriptor.layout,
    )
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=shape.consumers)
    return Ring(tiles, full, empty)


@gluon.jit
def resident(descriptor, shape: gl.constexpr):
    """Room for the tiles that stay, one for each consumer, and the barrier of their arrival."""
    tiles = gl.allocate_shared_memory(
        descriptor.dtype,
        [shape.consumers] + descriptor.block_shape,  # noqa: RUF005 (Triton knows no stars)
        descriptor.layout,
    )
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    return Ring(tiles, full, full)


@gluon.jit
def load_resident(descriptor, place, entry, head, row, shape: gl.constexpr):
    """Load the tiles that stay, from ``row`` on."""
    mbarrier.expect(place.full, shape.consumers * descriptor.block_type.nbytes)
    consumers: gl.constexpr = shape.consumers
    for part in gl.static_range(consumers):
        tma.async_copy_global_to_shared(
            descriptor, [entry, head, row + part * ROWS, 0], place.full, place.tiles.index(part)
        )


@gluon.jit
def load_next(descriptor, to, turn, entry, head, row, shape: gl.constexpr):
    """Load the tile of this turn, when the consumers have left its stage."""
    stage = turn % shape.stages
    # Of a fresh barrier the phase before the first counts as complete.
    mbarrier.wait(to.empty.index(stage), (turn // shape.stages & 1) ^ 1)
    mbarrier.expect(to.full.index(stage), descriptor.block_type.nbytes)
    tma.async_copy_global_to_shared(
        descriptor, [entry, head, row, 0], to.full.index(stage), to.tiles.index(stage)
    )


@gluon.jit
def matrix_of(tiles):
    """A tile (1, 1, rows, columns) without its first two dimensions."""
    return tiles.reshape([tiles.shape[2], tiles.shape[3]])


@gluon.jit
def arrived(of, turn, shape: gl.constexpr):
    """The tile of this turn, once it is there."""
    stage = turn % shape.stages
    mbarrier.wait(of.full.index(stage), turn // shape.stages & 1)
    return matrix_of(of.tiles.index(stage))


@gluon.jit
def release(of, turn, shape: gl.constexpr):
    """This consumer is done with the tile of this turn."""
    mbarrier.arrive(of.empty.index(turn % shape.stages), count=1)


@gluon.jit
def dense(zero, seqlen_q, seqlen_k, bottom_right, left, right):
    """The place of a sequence of dense tensors."""
    diagonal = (seqlen_k - seqlen_q) * bottom_right
    return Place(zero, zero, zero, seqlen_q, zero, seqlen_k, diagonal, left, right)


@gluon.jit
def key_tiles(first, last, place, shape: gl.constexpr):
    """``key_range`` for rows first to last, in tiles: begin, whole, edge, end."""
    begin, whole, edge, end = key_range(first, last, place, shape, shape.passing)
    return in_tiles(begin, whole, edge, end, shape)


@gluon.jit
def query_tiles(first, last, place, shape: gl.constexpr):
    """``query_range`` for keys first to last, in tiles: begin, whole, edge, end."""
    begin, whole, edge, end = query_range(first, last, place, shape, shape.passing)
    return in_tiles(begin, whole, edge, end, shape)


@gluon.jit
def in_tiles(begin, whole, edge, end, shape: gl.constexpr):
    """Positions as numbers of tiles; the last one may be cut off."""
    size: gl.constexpr = shape.passing
    return begin // size, whole // size, edge // size, (end + size - 1) // size


@gluon.jit
def keys_seen(i, place, shape: gl.constexpr):
    """(low, high): the first and the last key that queries i see; low is one only where the band is
    bounded on the left."""
    low, high = i * 0, i * 0 + place.len_k - 1
    if shape.bounded_left:
        low = i + place.diagonal - place.left
    if shape.bounded_right:
        high = gl.minimum(high, i + place.diagonal + place.right)
    return low, high


@gluon.jit
def queries_seeing(j, place, shape: gl.constexpr):
    """(low, high): the first and the last query that see keys j, where the band is bounded on the
    right, and on the left."""
    low, high = j * 0, j * 0
    if shape.bounded_right:
        low = j - place.diagonal - place.right
    if shape.bounded_left:
        high = j - place.diagonal + place.left
    return low, high


@gluon.jit
def hidden(s, start, limits, LOW: gl.constexpr, HIGH: gl.constexpr):
    """Scores (own, passing) with -inf where what passes, from position ``start`` on, is below the
    low limit, if LOW, or above the high one, if HIGH."""
    low, high = limits
    passing: gl.constexpr = s.shape[1]
    position = start + gl.arange(0, passing, gl.SliceLayout(0, s.type.layout))
    if LOW:
        s = gl.where(position[None, :] >= low[:, None], s, float("-inf"))
    if HIGH:
        s = gl.where(position[None, :] <= high[:, None], s, float("-inf"))
    return s


@gluon.jit
def store_tile(tile, to, entry, head, row, rows):
    """A tile (64, PADDED) to the rows from ``row`` on that are below ``rows``, 16 bytes a thread.

    to: pointer to (batch, head, row, column), its strides but the last, 1, and its columns.
    """
    pointer, by_batch, by_head, by_row, columns = to
    padded: gl.constexpr = tile.shape[1]
    threads: gl.constexpr = min(padded // 8, 32)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [4, 1], [1, 0])
    i = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    j = gl.arange(0, padded, gl.SliceLayout(0, layout))
    start = pointer + entry.to(gl.int64) * by_batch + head.to(gl.int64) * by_head
    pointers = start + (i.to(gl.int64) * by_row)[:, None] + j[None, :]
    stored = (i < rows)[:, None] & (j < columns)[None, :]
    gl.store(pointers, gl.convert_layout(tile.to(pointer.dtype.element_ty), layout), mask=stored)
