"""Which tiles a kernel gets: rows, keys, warps and stages, by pass, head_dim and device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from . import interpreter

PRODUCTS = "ieee"  # fp32 products on the cores that do not round their operands
FEW_QUERIES = 16  # up to which the heads of a group share a block of rows
KEYS_OF_A_SPLIT = 256  # at least
INTERPRETED_TILES = 8  # along a sequence: enough for every loop to turn
SMALLEST, LARGEST = 32, 2048  # of interpreted tiles
INTERPRETED_PROCESSORS = 16


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows (block_m) and keys (block_n) of a tile, and what computes it."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """As options of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What tiles depend on, beside the pass."""

    device: torch.device
    itemsize: int  # bytes of an element of q
    padded_dim: int  # the larger one of head_dim and head_dim_v
    elementwise: bool  # a mask or bias is read element by element


def padded(size: int) -> int:
    """The power of two, 16 at least, that a dimension is padded to in a tile."""
    return max(16, power_of_two(size))


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << max(0, size - 1).bit_length()


def packed_heads(group: int, seqlen_q: int) -> int:
    """Query heads that share a block of rows: with few queries all that read the same keys."""
    return group if seqlen_q <= FEW_QUERIES else 1


def splits(programs: int, seqlen_k: int, device: torch.device) -> int:
    """Programs that share the keys of the same rows: as many as leave no multiprocessor idle."""
    if interpreter.enabled():
        processors = INTERPRETED_PROCESSORS
    else:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    most = -(-seqlen_k // KEYS_OF_A_SPLIT)
    return max(1, min(processors // max(1, programs), most))


def forward_tiles(kind: Kind, rows: int, keys: int) -> Tiles:
    """Of forward: block_m rows stay, block_n keys pass by."""
    tiles = _tiles(_FORWARD, kind, rows, keys)
    if not interpreter.enabled() and rows < tiles.block_m:  # decoding
        tiles = replace(tiles, block_m=padded(rows), num_warps=4)
    return tiles


def keys_tiles(kind: Kind, rows: int, keys: int) -> Tiles:
    """Of dK and dV: block_n keys stay, block_m rows pass by."""
    return _tiles(_KEYS, kind, rows, keys)


def queries_tiles(kind: Kind, rows: int, keys: int) -> Tiles:
    """Of dQ: block_m rows stay, block_n keys pass by."""
    return _tiles(_QUERIES, kind, rows, keys)


def bias_tiles(kind: Kind, rows: int, keys: int) -> Tiles:
    """Of dBias: a tile of it stays."""
    return _tiles(_BIAS, kind, rows, keys)


def v1_tiles(q: torch.Tensor, rows: int, keys: int) -> Tiles:
    """Of V1, which holds blocks of everything at once."""
    if interpreter.enabled():
        return _interpreted(rows, keys)
    return Tiles(block_m=32, block_n=32) if q.shape[-1] <= 128 else Tiles(block_m=16, block_n=16)


def rows_tiles(rows: int) -> Tiles:
    """Of kernels that go through rows once."""
    if interpreter.enabled():
        return _interpreted(rows, rows)
    return Tiles(block_m=64, block_n=64)


def elementwise_tiles(rows: int, keys: int) -> Tiles:
    """Of kernels that compute one element after the other."""
    if interpreter.enabled():
        return _interpreted(rows, keys)
    return Tiles(block_m=64, block_n=64)


def _tiles(table: Table, kind: Kind, rows: int, keys: int) -> Tiles:
    if interpreter.enabled():
        return _interpreted(rows, keys)
    by_width = table[kind.itemsize]
    return by_width[min(width for width in by_width if width >= kind.padded_dim)]


def _interpreted(rows: int, keys: int) -> Tiles:
    """The interpreter takes the same time for a small tile as for a large one."""

    def block(length: int) -> int:
        return min(max(power_of_two(-(-length // INTERPRETED_TILES)), SMALLEST), LARGEST)

    return Tiles(block_m=block(rows), block_n=block(keys))


Table = Mapping[int, Mapping[int, Tiles]]  # by bytes of an element, then by the widest head_dim
_FORWARD: Table = {
    2: {
        64: Tiles(block_m=128, block_n=128, num_warps=8, num_stages=3),
        128: Tiles(block_m=128, block_n=64, num_warps=8, num_stages=3),
        256: Tiles(block_m=128, block_n=64, num_warps=8, num_stages=2),
    },
    4: {
        64: Tiles(block_m=64, block_n=32, num_stages=2),
        128: Tiles(block_m=32, block_n=32),
        256: Tiles(block_m=32, block_n=16),
    },
}
_KEYS: Table = {
    2: {
        64: Tiles(block_m=64, block_n=128, num_warps=8, num_stages=2),
        128: Tiles(block_m=64, block_n=128, num_warps=8, num_stages=2),
        256: Tiles(block_m=32, block_n=64, num_warps=8),
    },
    4: {
        64: Tiles(block_m=32, block_n=32),
        128: Tiles(block_m=16, block_n=32),
        256: Tiles(block_m=16, block_n=16),
    },
}
_QUERIES: Table = {
    2: {
        64: Tiles(block_m=128, block_n=64, num_warps=8, num_stages=2),
        128: Tiles(block_m=128, block_n=64, num_warps=8, num_stages=2),
        256: Tiles(block_m=64, block_n=32, num_warps=8),
    },
    4: {
        64: Tiles(block_m=32, block_n=32),
        128: Tiles(block_m=32, block_n=16),
        256: Tiles(block_m=16, block_n=16),
    },
}
_BIAS: Table = {
    2: {256: Tiles(block_m=64, block_n=64, num_warps=8)},
    4: {256: Tiles(block_m=32, block_n=16)},
}
