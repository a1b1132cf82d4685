"""Any problem as a list of plain dense attentions: no padding, no packing, no pages.

Everything that computes (the oracle, its gradients, the error budget, the diagnosis) walks
these, so that key lengths, packed lengths and paging are understood in one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import Inputs
from .masks import diagonal_offset, positional_mask
from .problem import Problem

Index = tuple[int | slice, ...]

# Score elements of a chunk of query rows: 32 MiB in fp64, of which a few are held at once.
CHUNK_ELEMENTS = 1 << 22


@dataclass(kw_only=True)
class Sequence:
    """One dense attention: a batch entry cut to its true length, or one packed sequence.

    q (Hq, Lq, D), k (Hkv, Lk, D), v (Hkv, Lk, Dv); mask and bias (Hq or 1, Lq or 1, Lk or 1);
    alibi_slopes and sinks (Hq,); keep_mask (Hq, Lq, Lk); grad_out (Hq, Lq, Dv); grad_lse (Hq, Lq).
    ``rows`` and ``keys`` index the canonical q-shaped and k-shaped tensors,
    ``block`` those of shape (B, Hq, Sq, Sk) where no dimension broadcasts.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    keep_mask: Tensor | None
    grad_out: Tensor | None
    grad_lse: Tensor | None
    rows: Index
    keys: Index
    block: Index

    @property
    def len_q(self) -> int:
        """Queries of this sequence."""
        return self.q.shape[1]

    @property
    def len_k(self) -> int:
        """Keys of this sequence."""
        return self.k.shape[1]

    def chunks(self, multiple: int = 1) -> Iterator[slice]:
        """Query rows, so few at a time that the scores of one kv head, (G, rows, Lk), stay small.

        Every chunk but the last holds a multiple of ``multiple`` rows.
        """
        group = self.q.shape[0] // self.k.shape[0]
        height = CHUNK_ELEMENTS // max(1, group * self.len_k)
        height = max(1, height // multiple) * multiple
        for start in range(0, self.len_q, height):
            yield slice(start, min(start + height, self.len_q))


def cut(tensor: Tensor | None, index: Index) -> Tensor | None:
    """``tensor[index]``, except that a dimension of size 1 is kept whole where index has a
    slice and taken at 0 where it has a number: broadcasting survives."""
    if tensor is None:
        return None
    parts: list[int | slice] = []
    for size, part in zip(tensor.shape, index, strict=False):
        if size == 1:
            parts.append(0 if isinstance(part, int) else slice(None))
        else:
            parts.append(part)
    return tensor[tuple(parts)]


def gather_pages(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """The first ``length`` keys of one batch entry, (H, length, D).

    pages (P, H, page_size, D), table (n,): the page of each run of page_size keys.
    """
    page_size = pages.shape[2]
    used = table[: -(-length // page_size)].long()
    run = pages[used].transpose(0, 1)  # (H, used, page, D)
    return run.reshape(run.shape[0], -1, run.shape[-1])[:, :length]


def sequences(inputs: Inputs, problem: Problem) -> Iterator[Sequence]:
    """The dense attentions that a problem is made of, in batch order."""
    if problem.packed is not None:
        bounds_q, bounds_k = [0], [0]
        for len_q, len_k in problem.packed:
            bounds_q.append(bounds_q[-1] + len_q)
            bounds_k.append(bounds_k[-1] + len_k)
    for b in range(problem.batch):
        if problem.packed is not None:
            entry, q_range = 0, slice(bounds_q[b], bounds_q[b + 1])
            k_range = slice(bounds_k[b], bounds_k[b + 1])
        else:
            length = problem.keys if problem.key_lengths is None else problem.key_lengths[b]
            entry, q_range, k_range = b, slice(0, problem.seqlen_q), slice(0, length)
        everything = slice(None)
        rows: Index = (entry, everything, q_range)
        keys: Index = (entry, everything, k_range)
        block: Index = (entry, everything, q_range, k_range)
        if problem.page_size is not None:
            assert inputs.page_table is not None
            k = gather_pages(inputs.k, inputs.page_table[b], k_range.stop)
            v = gather_pages(inputs.v, inputs.page_table[b], k_range.stop)
        else:
            k, v = inputs.k[keys], inputs.v[keys]
        yield Sequence(
            q=inputs.q[rows],
            k=k,
            v=v,
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
        )


def visibility(sequence: Sequence, problem: Problem, heads: slice, rows: slice) -> Tensor:
    """Which keys the query rows see, bool (heads, rows, Lk)."""
    i = torch.arange(rows.start, rows.stop, device=sequence.q.device)[:, None]
    j = torch.arange(sequence.len_k, device=sequence.q.device)[None, :]
    seen = positional_mask(problem, sequence.len_q, sequence.len_k)(i, j)[None]
    if sequence.mask is not None:
        seen = seen & cut(sequence.mask, (heads, rows, slice(None)))  # type: ignore[operator]
    count = heads.stop - heads.start
    return seen.expand(count, rows.stop - rows.start, sequence.len_k)


def alibi_term(sequence: Sequence, problem: Problem, heads: slice, rows: slice) -> Tensor | None:
    """-slope |i + offset - j| in fp64, (heads, rows, Lk); None without ALiBi."""
    if sequence.alibi_slopes is None:
        return None
    device = sequence.q.device
    offset = diagonal_offset(problem, sequence.len_q, sequence.len_k)
    i = torch.arange(rows.start, rows.stop, device=device, dtype=torch.float64)[:, None]
    j = torch.arange(sequence.len_k, device=device, dtype=torch.float64)[None, :]
    slopes = sequence.alibi_slopes[heads].double()
    return -slopes[:, None, None] * (i + offset - j).abs()
