"""Counts what the launches of a pass load, store and compute for one head: by interpreting them.

``formula`` in ``closed_forms`` says what must come out. Kernels are imported when they are run, so
that ``interpreter.enable()`` can come first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import interpreter
from .arguments import Arguments
from .launch import Result
from .tiles_table import DELTA, KEYS, QUERIES, Tiles

V1, V2 = "triton-v1", "triton-v2"
SMALLEST_BLOCK = 16  # of products
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The parameters of kernels, and what the papers call what is passed.
NAMES = {
    "q": "Q",
    "k": "K",
    "v": "V",
    "out": "O",
    "l": "l",
    "m": "m",
    "lse": "LSE",
    "deltas": "D",
    "grad_out": "dO",
    "grad_q": "dQ",
    "grad_k": "dK",
    "grad_v": "dV",
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One head with as many queries as keys: what is computed, in square tiles of what size."""

    seqlen: int
    head_dim: int
    dtype: str = "fp16"
    causal: bool = False
    block: int = 64  # rows and keys of a tile, a power of two

    @property
    def blocks(self) -> int:
        """Blocks of rows, and of keys."""
        return -(-self.seqlen // self.block)


@dataclass(frozen=True, kw_only=True)
class Count:
    """Elements by tensor; bytes; arithmetic in operations, other than matmul by kind."""

    loads: dict[str, int]
    stores: dict[str, int]
    load_bytes: int
    store_bytes: int
    matmul: int
    other: dict[str, int]
    lines: tuple[str, ...]  # kinds of accesses in the order of their first


def block_for(head_dim: int, on_chip: int) -> int:
    """Rows and keys of a tile for M elements on the chip: the largest power of two up to M / 4d, so
    that four tiles of d columns fit, and up to the root of M, so that S does.

    Raises ValueError when it is smaller than products allow.
    """
    least = max(4 * head_dim * SMALLEST_BLOCK, SMALLEST_BLOCK**2)
    if on_chip < least:
        raise ValueError(
            f"on_chip={on_chip}: accepted is {least} elements or more, {SMALLEST_BLOCK} rows of "
            f"each of Q, K, V and O with head_dim={head_dim}"
        )
    most = min(on_chip // (4 * head_dim), math.isqrt(on_chip))
    return 1 << (most.bit_length() - 1)


def count(name: str, load: Workload, backward: bool = False) -> Count:
    """Run one pass and count. Backward counts that pass alone."""
    found = launches(name, load, backward)
    with interpreter.counting() as accesses:
        found.run()
    lines = (line.split() for line in accesses.lines)
    return Count(
        loads={NAMES[tensor]: number for tensor, number in accesses.loads.items()},
        stores={NAMES[tensor]: number for tensor, number in accesses.stores.items()},
        load_bytes=accesses.load_bytes,
        store_bytes=accesses.store_bytes,
        matmul=accesses.matmul,
        other=dict(accesses.other),
        lines=tuple(f"{access} {NAMES[tensor]}" for access, tensor in lines),
    )


def launches(name: str, load: Workload, backward: bool = False) -> Result:
    """The launches of one pass, on ones. For backward, the forward pass is run first."""
    shape = 1, 1, load.seqlen, load.head_dim
    q, k, v, grad_out = (torch.ones(shape, dtype=DTYPES[load.dtype]) for _ in range(4))
    # With as many keys as queries the diagonal ends at the bottom right as well.
    x = Arguments(q=q, k=k, v=v, causal="top-left" if load.causal else "none")
    tiles = Tiles(block_m=load.block, block_n=load.block)
    if name == V1:
        from .v1 import backward_launch, forward_launch

        forward = forward_launch(x, tiles)
        return backward_launch(x, forward.run(), grad_out, None, tiles) if backward else forward
    from .v2_launches import Launches

    both = Launches(x)
    forward = both.forward(tiles, splits=1)
    if not backward:
        return forward
    saved = forward.run()
    by_pass = dict.fromkeys((DELTA, KEYS, QUERIES), tiles)
    return both.backward(saved["out"], saved["lse"], grad_out, None, {"q", "k", "v"}, by_pass)
