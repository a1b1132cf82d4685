"""One sequence of a problem as it lies in memory when an algorithm starts, and its answer.

Heads are (Hkv, G): kv head, and query head among those that read it. k and v have G = 1, so
that a tile of keys is loaded once for its whole group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from attn_reference.problem import Problem
from attn_reference.sequences import Sequence

from .mask_rule import MaskRule, split_heads
from .memory import HbmTensor, Memory
from .state import State, identity


class Operands:
    """q (Hkv, G, Lq, D), k (Hkv, 1, Lk, D), v (Hkv, 1, Lk, Dv), out (Hkv, G, Lq, Dv) and lse
    (Hkv, G, Lq), in HBM; tiles are computed in fp32 (fp64 for fp64 inputs)."""

    def __init__(self, sequence: Sequence, problem: Problem, memory: Memory) -> None:
        self.sequence, self.problem, self.memory = sequence, problem, memory
        self.dtype = sequence.q.dtype
        self.compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.len_q, self.len_k = sequence.len_q, sequence.len_k
        self.heads = (problem.kv_heads, problem.group)
        self.q = self.place("Q", split_heads(sequence.q, self.heads))
        self.k = self.place("K", sequence.k[:, None])
        self.v = self.place("V", sequence.v[:, None])
        self.rule = MaskRule(sequence, problem, memory, self.compute)
        self.keep = None
        if problem.dropout and sequence.keep_mask is not None:
            self.keep = self.place("keep", split_heads(sequence.keep_mask, self.heads), vector=True)
        self.sinks = None
        if sequence.sinks is not None:
            self.sinks = sequence.sinks.view(*self.heads, 1).to(self.compute)

    def place(self, name: str, data: Tensor, vector: bool = False) -> HbmTensor:
        """A tensor that lies in HBM."""
        return self.memory.place(name, data, self.compute, vector)

    def allocate(
        self, name: str, *shape: int, dtype: torch.dtype | None = None, vector: bool = False
    ) -> HbmTensor:
        """Room in HBM for (Hkv, G, *shape), not written yet; in the dtype computed in if none."""
        dtype = self.compute if dtype is None else dtype
        data = torch.empty((*self.heads, *shape), dtype=dtype, device=self.sequence.q.device)
        return self.place(name, data, vector)

    def start(self, rows: slice, values: bool = True) -> State:
        """The state of rows before any key: the identity, or the sink, which has no value.

        (A sink is one more key, of that score and with the value 0: m = sink, d = 1, o = 0.)
        """
        shape = (*self.heads, rows.stop - rows.start)
        like = torch.empty((), dtype=self.compute, device=self.sequence.q.device)
        value_dim = self.sequence.v.shape[-1] if values else None
        nothing = identity(shape, value_dim, like)
        if self.sinks is None:
            return nothing
        seen = self.sinks != -math.inf
        return State(m=self.sinks.expand(shape), d=seen.to(self.compute).expand(shape), o=nothing.o)

    def operand(self, tile: Tensor) -> Tensor:
        """P or dS as an operand of a product: in the dtype of the inputs, as tensor cores do."""
        return tile.to(self.dtype).to(self.compute)

    def dropped(self, tile: Tensor, rows: slice, keys: slice) -> Tensor:
        """P or dP after dropout: keep / (1 - dropout) times it."""
        if self.keep is None:
            return tile
        return tile.masked_fill(~self.keep.load(rows, keys), 0.0) / (1 - self.problem.dropout)


def blocks(length: int, size: int | None) -> Iterator[slice]:
    """Consecutive slices of ``size`` (None: one of all) that cover 0 to length; none for none."""
    size = max(1, length) if size is None else size
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def blocks_of(part: slice, size: int) -> Iterator[slice]:
    """Consecutive slices of ``size`` that cover ``part``."""
    for block in blocks(part.stop - part.start, size):
        yield slice(part.start + block.start, part.start + block.stop)
