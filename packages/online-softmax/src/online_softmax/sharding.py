"""The shards of a ring: how sequences lie on the ranks, and what one rank has of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_reference.inputs import Inputs, key_count, output_shape
from attn_reference.problem import Problem
from attn_reference.sequences import Sequence, cut, sequences

from .memory import HbmTensor, Memory
from .operands import Operands
from .placement import Placement, Share, clipped, local, size

OF_KEYS = {"K", "V", "dK", "dV"}  # the tensors whose first sliced dimension is keys


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """How one sequence lies on the ranks. Tensors of a rank hold its part of one sequence after
    the other; that of this one begins at ``row_starts`` and ``key_starts``."""

    entry: int
    len_q: int
    len_k: int
    columns: slice  # its keys in mask, bias and keep_mask, which have all columns
    rows: tuple[Share, ...]
    keys: tuple[Share, ...]
    row_starts: tuple[int, ...]
    key_starts: tuple[int, ...]

    def rows_of(self, rank: int) -> slice:
        """Where a rank's tensors have its rows."""
        start = self.row_starts[rank]
        return slice(start, start + size(self.rows[rank]))

    def keys_of(self, rank: int) -> slice:
        """Where a rank's tensors have its keys."""
        start = self.key_starts[rank]
        return slice(start, start + size(self.keys[rank]))


def shard(problem: Problem, ranks: int, placement: Placement) -> list[Sharded]:
    """Every sequence of a problem, shared out. Padded ones are placed by their padded length, so
    that a rank owns the same positions of every batch entry, and then cut to their true one."""
    found: list[Sharded] = []
    row_starts, key_starts = (0,) * ranks, (0,) * ranks
    for sequence in sequences(_shapes(problem), problem):
        entry, _, columns = sequence.keys
        assert isinstance(entry, int)
        assert isinstance(columns, slice)
        packed = problem.packed is not None
        rows = placement(sequence.len_q, ranks)
        keys = placement(sequence.len_k if packed else problem.keys, ranks)
        found.append(
            Sharded(
                entry=entry,
                len_q=sequence.len_q,
                len_k=sequence.len_k,
                columns=columns,
                rows=rows,
                keys=tuple(clipped(share, sequence.len_k) for share in keys),
                row_starts=row_starts,
                key_starts=key_starts,
            )
        )
        if packed:
            row_starts = tuple(at + size(s) for at, s in zip(row_starts, rows, strict=True))
            key_starts = tuple(at + size(s) for at, s in zip(key_starts, keys, strict=True))
    return found


def _shapes(problem: Problem) -> Inputs:
    """The whole of q, k and v, which no rank has: shapes without data."""
    batch, heads, rows, dim_v = output_shape(problem)
    keys = (batch, problem.kv_heads, key_count(problem))
    return Inputs(
        q=torch.empty((batch, heads, rows, problem.head_dim), device="meta"),
        k=torch.empty((*keys, problem.head_dim), device="meta"),
        v=torch.empty((*keys, dim_v), device="meta"),
    )


@dataclass(kw_only=True)
class Shard(Sequence):
    """One sequence as a rank holds it: its rows of q, mask and so on, and its keys. Positions,
    and with them the diagonal, are those of the whole."""

    sharded: Sharded

    @property
    def len_q(self) -> int:
        """Queries of the whole sequence."""
        return self.sharded.len_q

    @property
    def len_k(self) -> int:
        """Keys of the whole sequence."""
        return self.sharded.len_k


@dataclass(kw_only=True, eq=False)
class Held(HbmTensor):
    """A tensor of which a rank holds a share of the first sliced dimension. Tiles are asked for
    by their position in the whole."""

    share: Share

    def _index(self, slices: tuple[slice, ...]) -> tuple[Any, ...]:
        first, *others = slices
        return super()._index((local(self.share, first), *others))


@dataclass(kw_only=True)
class ShardMemory(Memory):
    """The memory of one rank, with its share of the rows and of the keys that are there now."""

    rows: Share
    keys: Share

    def place(
        self, name: str, data: Tensor, compute: torch.dtype, vector: bool = False
    ) -> HbmTensor:
        """A tensor that lies in this rank's HBM."""
        share = self.keys if name in OF_KEYS else self.rows
        whole = 0 if vector else 1
        return Held(memory=self, name=name, data=data, compute=compute, whole=whole, share=share)


class RankOperands(Operands):
    """The operands of one sequence on one rank; ``k`` and ``v`` are those that visit."""

    def __init__(self, sharded: Sharded, problem: Problem, inputs: Inputs, rank: int) -> None:
        self.sharded = sharded
        self.rows = sharded.rows[rank]
        self.held = ShardMemory(rows=self.rows, keys=sharded.keys[rank])
        everything = slice(None)
        rows = (sharded.entry, everything, sharded.rows_of(rank))
        keys = (sharded.entry, everything, sharded.keys_of(rank))
        block = (*rows, sharded.columns)
        sequence = Shard(
            q=inputs.q[rows],
            k=inputs.k[keys],
            v=inputs.v[keys],
            mask=cut(inputs.mask, block),
            bias=cut(inputs.bias, block),
            alibi_slopes=inputs.alibi_slopes,
            sinks=inputs.sinks,
            keep_mask=cut(inputs.keep_mask, block),
            grad_out=cut(inputs.grad_out, rows),
            grad_lse=cut(inputs.grad_lse, rows),
            rows=rows,
            keys=keys,
            block=block,
            sharded=sharded,
        )
        super().__init__(sequence, problem, self.held)

    def visit(self, k: Tensor, v: Tensor, owner: int) -> Share:
        """Take the keys of a rank, (B, Hkv, m, D), for ``k`` and ``v``; which they are."""
        share = self.held.keys = self.sharded.keys[owner]
        self.k = self.place("K", self.part(k, owner))
        self.v = self.place("V", self.part(v, owner))
        return share

    def part(self, tensor: Tensor, owner: int) -> Tensor:
        """This sequence, (Hkv, 1, m, D), of a tensor of keys of a rank, (B, Hkv, m, D)."""
        return tensor[self.sharded.entry, :, self.sharded.keys_of(owner)][:, None]
