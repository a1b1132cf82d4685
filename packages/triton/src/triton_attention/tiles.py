"""Which tiles a kernel gets: rows, keys, warps and stages, by pass, head_dim and GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from . import interpreter, tiles_table
from .tiles_table import BIAS, FORWARD, HOPPER, KEYS, POINTERS, QUERIES, HopperTiles, Tiles

PRODUCTS = "ieee"  # fp32 products on the cores that do not round their operands
FEW_QUERIES = 16  # up to which the heads of a group share a block of rows
KEYS_OF_A_SPLIT = 256  # at least
INTERPRETED_TILES = 8  # along a sequence: enough for every loop to turn
SMALLEST, LARGEST = 32, 2048  # of interpreted tiles
INTERPRETED_PROCESSORS = 16


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What tiles depend on of a GPU."""

    shared_memory: int  # bytes that a block of threads may use
    multiprocessors: int
    capability: int  # 90 is Hopper


# By compute capability, for kernels that are compiled where there is no such GPU.
GPUS = {
    80: Gpu(shared_memory=166912, multiprocessors=108, capability=80),  # A100
    86: Gpu(shared_memory=101376, multiprocessors=84, capability=86),  # A10, A40, RTX 3090
    89: Gpu(shared_memory=101376, multiprocessors=142, capability=89),  # L40, RTX 4090
    90: Gpu(shared_memory=232448, multiprocessors=132, capability=90),  # H100, H200
    100: Gpu(shared_memory=232448, multiprocessors=148, capability=100),  # B200
}
# No GPU: the interpreter. Its few processors have keys split between them now and then.
NO_GPU = Gpu(shared_memory=0, multiprocessors=INTERPRETED_PROCESSORS, capability=0)


@cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU at hand."""
    if interpreter.enabled():
        return NO_GPU
    found = torch.cuda.get_device_properties(device)
    return Gpu(
        shared_memory=found.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        multiprocessors=found.multi_processor_count,
        capability=10 * found.major + found.minor,
    )


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What tiles depend on, beside the pass."""

    gpu: Gpu
    itemsize: int  # bytes of an element of q
    padded_dim: int  # of q and k
    padded_dim_v: int
    elementwise: bool = False  # a mask or bias is read element by element

    @property
    def both(self) -> int:
        """Columns of k and v."""
        return self.padded_dim + self.padded_dim_v

    @property
    def widest(self) -> int:
        """The larger number of columns."""
        return max(self.padded_dim, self.padded_dim_v)


def padded(size: int) -> int:
    """The power of two, 16 at least, that a dimension is padded to in a tile."""
    return max(16, power_of_two(size))


def padded_dims(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """What both dimensions are padded to in the tiles of one kernel.

    A dimension of 32 or less beside one of 64 or more gets 64: on Hopper, Triton 3.6 multiplies a
    tile by the wrong rows of a narrow one (all but the first 16) that follows a wide one through
    shared memory, where loads are not pipelined.
    """
    least = min(64, padded(max(head_dim, head_dim_v)))
    return max(padded(head_dim), least), max(padded(head_dim_v), least)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << max(0, size - 1).bit_length()


def packed_heads(group: int, seqlen_q: int) -> int:
    """Query heads that share a block of rows: with few queries all that read the same keys."""
    return group if seqlen_q <= FEW_QUERIES else 1


def splits(programs: int, seqlen_k: int, gpu: Gpu) -> int:
    """Programs that share the keys of the same rows: as many as leave no multiprocessor idle."""
    most = -(-seqlen_k // KEYS_OF_A_SPLIT)
    return max(1, min(gpu.multiprocessors // max(1, programs), most))


def forward_tiles(kind: Kind, rows: int, keys: int) -> Tiles:
    """Of forward: block_m rows of q stay, block_n keys pass by."""
    if kind.gpu is NO_GPU:
        return _interpreted(rows, keys)
    tiles = _found(FORWARD, kind, rows)
    for few in (16, 64):
        if rows <= few < tiles.block_m:
            tiles = replace(tiles, block_m=few, num_warps=4)
            break
    return _fitting(tiles, kind, "block_m", kind.padded_dim)


def keys_tiles(kind: Kind, rows: int, keys: int) -> Tiles:
    """Of dK and dV: block_n keys stay, block_m rows of q and dO pass by."""
    if kind.gpu is NO_GPU:
        return _interpreted(rows, keys)
    return _fitting(_found(KEYS, kind, rows), kind, "block_n", kind.both, scores=True)


def queries_tiles(kind: Kind, rows: int, keys: int) -> Tiles:
    """Of dQ: block_m rows of q and dO stay, block_n keys pass by."""
    if kind.gpu is NO_GPU:
        return _interpreted(rows, keys)
    return _fitting(_found(QUERIES, kind, rows), kind, "block_m", kind.both, scores=True)


def bias_tiles(kind: Kind, rows: int, keys: int) -> Tiles:
    """Of dBias, a tile of which stays."""
    if kind.gpu is NO_GPU:
        return _interpreted(rows, keys)
    return _fitting(_found(BIAS, kind, rows), kind, "block_m", kind.both)


def hopper_tiles(direction: str, kind: Kind, rows: int) -> HopperTiles | None:
    """Of the kernels for Hopper, None where the table has none."""
    found = tiles_table.find(
        HOPPER, direction, kind.gpu.capability, kind.itemsize, kind.widest, rows
    )
    assert found is None or isinstance(found, HopperTiles)
    return found


def v1_tiles(kind: Kind, rows: int, keys: int) -> Tiles:
    """Of V1, which holds blocks of everything at once."""
    if kind.gpu is NO_GPU:
        return _interpreted(rows, keys)
    size = 32 if kind.widest <= 128 else 16
    return Tiles(block_m=size, block_n=size)


def rows_tiles(gpu: Gpu, rows: int) -> Tiles:
    """Of kernels that go through rows once."""
    return _interpreted(rows, rows) if gpu is NO_GPU else Tiles(block_m=64, block_n=64)


def elementwise_tiles(gpu: Gpu, rows: int, keys: int) -> Tiles:
    """Of kernels that compute one element after the other."""
    return _interpreted(rows, keys) if gpu is NO_GPU else Tiles(block_m=64, block_n=64)


def _found(direction: str, kind: Kind, rows: int) -> Tiles:
    """What the table says."""
    found = tiles_table.find(
        POINTERS, direction, kind.gpu.capability, kind.itemsize, kind.widest, rows
    )
    assert isinstance(found, Tiles)
    return found


def _interpreted(rows: int, keys: int) -> Tiles:
    """The interpreter takes the same time for a small tile as for a large one."""

    def block(length: int) -> int:
        return min(max(power_of_two(-(-length // INTERPRETED_TILES)), SMALLEST), LARGEST)

    return Tiles(block_m=block(rows), block_n=block(keys))


def _fitting(tiles: Tiles, kind: Kind, stays: str, columns: int, *, scores: bool = False) -> Tiles:
    """Those tiles, or the largest smaller ones that shared memory has room for.

    Blocks of ``columns`` stay there, blocks of k and v (or q and dO) pass by, as many at a time as
    there are stages, and of ``scores`` a tile where they change their layout between two products.
    """
    passes = "block_n" if stays == "block_m" else "block_m"
    while True:
        passing = getattr(tiles, passes) * kind.both
        if kind.elementwise:
            passing += 2 * tiles.block_m * tiles.block_n
        needed = getattr(tiles, stays) * columns + tiles.num_stages * passing
        needed += scores * tiles.block_m * tiles.block_n
        if needed * kind.itemsize <= kind.gpu.shared_memory:
            return tiles
        if tiles.num_stages > 1:
            tiles = replace(tiles, num_stages=tiles.num_stages - 1)
        elif getattr(tiles, passes) > SMALLEST_BLOCK:
            tiles = replace(tiles, **{passes: getattr(tiles, passes) // 2})
        else:
            tiles = replace(tiles, **{stays: getattr(tiles, stays) // 2})


SMALLEST_BLOCK = 16
WIDTHS = (16, 32, 64, 128, 256)
