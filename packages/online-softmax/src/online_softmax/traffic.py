"""Counts what a step loads, stores and computes for one head: by running it.

``formula`` in ``closed_forms`` says what must come out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from attn_reference.inputs import Attention
from attn_reference.problem import Problem
from attn_reference.sequences import Sequence

from . import per_row, split_kv, standard, tiled_v1, tiled_v2
from .gradients import Backward
from .memory import Memory, Operations
from .operands import Operands


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One head: what is computed, and in tiles of what size."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int
    dtype: str = "fp16"
    causal: bool = False  # bottom-right; the same as top-left for as many keys as queries
    block_q: int = 64
    block_k: int = 64

    @property
    def problem(self) -> Problem:
        """The same in the harness' words, with gradients."""
        return Problem(
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            head_dim=self.head_dim,
            dtype=self.dtype,
            causal="bottom-right" if self.causal else "none",
            gradients=("q", "k", "v"),
        )


@dataclass(frozen=True, kw_only=True)
class Count:
    """Elements by tensor; bytes; arithmetic in operations, other than matmul by kind."""

    loads: dict[str, int]
    stores: dict[str, int]
    load_bytes: int
    store_bytes: int
    matmul: int
    other: dict[str, int]
    lines: tuple[str, ...] = ()  # kinds of accesses in the order of their first


def block_for(head_dim: int, on_chip: int) -> int:
    """Rows and keys of a tile for M elements on the chip: M / 4d, and at most the root of M.

    So four tiles of d columns fit (Dao et al. 2022, algorithm 1, line 1: B_c = M / 4d), and S
    does. The paper has B_r = min(B_c, d) for the latter; square tiles let V1 and V2 be compared
    tile by tile. Raises ValueError when not even one row of each of the four fits.
    """
    if on_chip < 4 * head_dim:
        raise ValueError(
            f"on_chip={on_chip}: accepted is {4 * head_dim} elements or more, one row of each of "
            f"Q, K, V and O with head_dim={head_dim}"
        )
    return min(on_chip // (4 * head_dim), math.isqrt(on_chip))


Forward = Callable[[Operands], tuple[Any, ...]]
ROW = 1


def _forwards(load: Workload) -> dict[str, Forward]:
    tiles: dict[str, Any] = {"block_q": load.block_q, "block_k": load.block_k}
    return {
        "standard": standard.forward,
        "two-pass": partial(per_row.two_pass, block_q=ROW),
        "one-pass": partial(per_row.one_pass, block_q=ROW),
        "tiled-v1": partial(tiled_v1.forward, **tiles),
        "tiled-v2": partial(tiled_v2.forward, **tiles),
        "split-kv": partial(split_kv.forward, splits=SPLITS, **tiles),
    }


def _backwards(load: Workload) -> dict[str, Callable[..., None]]:
    tiles: dict[str, Any] = {"block_q": load.block_q, "block_k": load.block_k}
    return {
        "standard": standard.backward,
        "tiled-v1": partial(tiled_v1.backward, **tiles),
        "tiled-v2": partial(tiled_v2.backward, **tiles),
    }


SPLITS = 4
PER_ROW = ("two-pass", "one-pass")  # a row and a key at a time: N² steps
FORWARD = ("standard", "two-pass", "one-pass", "tiled-v1", "tiled-v2", "split-kv")
BACKWARD = ("standard", "tiled-v1", "tiled-v2")


def count(name: str, load: Workload, backward: bool = False, device: str = "cpu") -> Count:
    """Run the forward or the backward pass of a step and count. Backward counts that pass alone.

    On the device "meta" tensors have no numbers: the counts are the same, in no memory.

    Raises KeyError for a step that has no such pass.
    """
    memory = Memory()
    x = Operands(_sequence(load, device), load.problem, memory)
    forward = _forwards(load)[name]
    if not backward:
        with Operations() as operations:
            forward(x)
        return _counted(memory, operations)
    run = _backwards(load)[name]
    out, lse, *saved = forward(x)
    answer = out.data.flatten(0, 1)[None].to(load.problem.torch_dtype)
    result = Attention(out=answer, lse=lse.data.flatten(0, 1)[None])
    memory = x.memory = Memory()
    for tensor in (x.q, x.k, x.v, *saved):
        tensor.memory = memory
    gradients = Backward(x, result)
    with Operations() as operations:
        run(x, gradients, *saved)
    return _counted(memory, operations)


def _counted(memory: Memory, operations: Operations) -> Count:
    return Count(
        loads=dict(memory.loads),
        stores=dict(memory.stores),
        load_bytes=memory.load_bytes,
        store_bytes=memory.store_bytes,
        matmul=operations.matmul,
        other=dict(operations.other),
        lines=tuple(memory.lines),
    )


def _sequence(load: Workload, device: str) -> Sequence:
    def made(length: int) -> torch.Tensor:
        shape = 1, length, load.head_dim
        return torch.ones(shape, dtype=load.problem.torch_dtype, device=device)

    rows, keys = slice(0, load.seqlen_q), slice(0, load.seqlen_k)
    everything = slice(None)
    return Sequence(
        q=made(load.seqlen_q),
        k=made(load.seqlen_k),
        v=made(load.seqlen_k),
        mask=None,
        bias=None,
        alibi_slopes=None,
        sinks=None,
        keep_mask=None,
        grad_out=made(load.seqlen_q),
        grad_lse=None,
        rows=(0, everything, rows),
        keys=(0, everything, keys),
        block=(0, everything, rows, keys),
    )
