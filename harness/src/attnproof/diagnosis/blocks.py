"""Attention and its gradients block by block in fp64, each step of which can be replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_reference.inputs import Inputs, output_shape
from attn_reference.masks import diagonal_offset
from attn_reference.problem import Problem
from attn_reference.rounding import Rounding
from attn_reference.scores import EVERYTHING, ChunkScores, KeyHead, probabilities
from attn_reference.sequences import Index, cut, sequences

Answer = Mapping[str, Tensor]  # name of a judged tensor -> its value, fp64, canonical shape
Rows = Callable[[int, int], list[slice]]  # (index of the sequence, its queries) -> rows to compute


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some query rows of the query heads of one kv head: where scores come about."""

    head: KeyHead
    chunk: ChunkScores
    index: Index  # of these rows in a tensor of shape (B, Hq, Sq, ...)
    entry: int  # which sequence

    @property
    def problem(self) -> Problem:
        """The problem that is computed."""
        return self.head.problem

    @property
    def len_q(self) -> int:
        """Queries of the sequence."""
        return self.head.sequence.len_q

    @property
    def len_k(self) -> int:
        """Keys of the sequence."""
        return self.head.sequence.len_k

    @property
    def offset(self) -> int:
        """The diagonal: key i + offset belongs to query i."""
        return diagonal_offset(self.problem, self.len_q, self.len_k)

    @property
    def i(self) -> Tensor:
        """Positions of the queries, (R, 1)."""
        return torch.arange(self.chunk.rows.start, self.chunk.rows.stop)[:, None]

    @property
    def j(self) -> Tensor:
        """Positions of the keys, (1, Lk)."""
        return torch.arange(self.len_k)[None, :]

    @property
    def capped(self) -> Tensor:
        """Scores after the softcap, before bias and mask, (G, R, Lk)."""
        if self.chunk.tanh is None:
            return self.chunk.raw
        return self.problem.softcap * self.chunk.tanh

    @property
    def unmasked(self) -> Tensor:
        """Scores of every key, hidden ones too, (G, R, Lk)."""
        return self.with_additive(self.capped)

    @property
    def mask(self) -> Tensor:
        """The boolean mask alone, broadcasting to (G, R, Lk); all True without one."""
        place = (self.head.query_heads, self.chunk.rows, EVERYTHING)
        given = cut(self.head.sequence.mask, place)
        return torch.ones((), dtype=torch.bool) if given is None else given

    def with_additive(self, scores: Tensor) -> Tensor:
        """``scores`` plus bias and ALiBi."""
        return scores if self.chunk.additive is None else scores + self.chunk.additive

    def masked(self, scores: Tensor) -> Tensor:
        """``scores`` with -inf where the problem hides the key."""
        return scores.masked_fill(~self.chunk.visible, -torch.inf)


Scores = Callable[[Block], Tensor]  # other scores (G, R, Lk), -inf where hidden
Softmax = Callable[[Block, Tensor], tuple[Tensor, Tensor]]  # scores -> out (G, R, Dv), lse (G, R)


def right_softmax(block: Block, scores: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scores) V with dropout and sinks: out (G, R, Dv) and lse (G, R)."""
    p, lse = probabilities(scores, block.head.sinks())
    return dropped(block, p) @ block.head.v, lse


def dropped(block: Block, p: Tensor) -> Tensor:
    """P after dropout."""
    kept = block.head.kept(block.chunk.rows)
    return p if kept is None else p * kept / (1 - block.problem.dropout)


def maximum(scores: Tensor) -> Tensor:
    """Row maxima (G, R); 0 for rows with nothing visible."""
    if scores.shape[-1] == 0:
        return scores.new_zeros(scores.shape[:2])
    largest = scores.amax(-1)
    return largest.masked_fill(largest == -torch.inf, 0.0)


def blocks(problem: Problem, inputs: Inputs, rows: Rows) -> Iterator[Block]:
    """The blocks that a problem is made of."""
    exact = Rounding(problem, None)
    for entry, sequence in enumerate(sequences(inputs, problem)):
        for kv_head in range(problem.kv_heads):
            head = KeyHead(sequence, problem, kv_head, exact)
            for part in rows(entry, sequence.len_q):
                yield block(head, head.scores(part), entry)


def block(head: KeyHead, chunk: ChunkScores, entry: int) -> Block:
    """The block of these scores, of the sequence of that number."""
    first = head.sequence.rows[2]
    assert isinstance(first, slice)
    moved = slice(first.start + chunk.rows.start, first.start + chunk.rows.stop)
    return Block(
        head=head,
        chunk=chunk,
        index=(head.sequence.rows[0], head.query_heads, moved),
        entry=entry,
    )


def forward(
    problem: Problem,
    inputs: Inputs,
    rows: Rows,
    scores: Scores | None = None,
    softmax: Softmax = right_softmax,
) -> dict[str, Tensor]:
    """out and lse, with other scores or another softmax; NaN in rows that are not computed."""
    shape = output_shape(problem)
    out = torch.full(shape, torch.nan, dtype=torch.float64)
    lse = torch.full(shape[:-1], torch.nan, dtype=torch.float64)
    for block in blocks(problem, inputs, rows):
        used = block.chunk.scores if scores is None else scores(block)
        out[block.index], lse[block.index] = softmax(block, used)
    return {"out": out, "lse": lse}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the backward pass of a block is made of; a mistake replaces some of it.

    p and dp (G, R, Lk); delta = rowsum(dO ∘ O) and grad_lse (G, R); slope, the derivative of the
    softcap, (G, R, Lk); counts (G, R), 1 where the row joins dK and dV.
    """

    block: Block
    p: Tensor
    dp: Tensor
    delta: Tensor
    grad_lse: Tensor
    slope: Tensor
    counts: Tensor


StepEdit = Callable[[Step], Step]


def backward(
    problem: Problem,
    inputs: Inputs,
    rows: Rows,
    result: Answer,
    scores: Scores | None = None,
    edit: StepEdit | None = None,
) -> dict[str, Tensor]:
    """The gradients in closed form (see attn_reference.backward), P from result["lse"]."""

    def zeros(like: Tensor | None) -> Tensor:
        return torch.zeros(() if like is None else like.shape, dtype=torch.float64)

    total = {"dq": zeros(inputs.q), "dk": zeros(inputs.k), "dv": zeros(inputs.v)}
    total |= {"dbias": zeros(inputs.bias), "dsinks": zeros(inputs.sinks)}
    for block in blocks(problem, inputs, rows):
        head, part, sequence = block.head, block.chunk.rows, block.head.sequence
        used = block.chunk.scores if scores is None else scores(block)
        lse = result["lse"][block.index]
        p = torch.exp(used - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
        assert sequence.grad_out is not None
        grad_out = sequence.grad_out[head.query_heads, part].double()
        given = sequence.grad_lse if problem.lse_gradient else None
        tanh = block.chunk.tanh
        step = Step(
            block=block,
            p=p,
            dp=dropped(block, grad_out @ head.v.T),
            delta=(grad_out * result["out"][block.index]).sum(-1),
            grad_lse=torch.zeros_like(lse) if given is None else given[head.query_heads, part],
            slope=torch.ones_like(p) if tanh is None else 1 - tanh.square(),
            counts=torch.ones_like(lse),
        )
        step = step if edit is None else edit(step)
        slack = step.grad_lse - step.delta
        ds = step.p * (step.dp + slack[..., None])
        if inputs.bias is not None:
            place = cut(cut(total["dbias"], sequence.block), (head.query_heads, part, EVERYTHING))
            assert place is not None
            place += ds.sum_to_size(place.shape)
        sinks = head.sinks()
        if sinks is not None:
            total["dsinks"][head.query_heads] += (torch.exp(sinks[:, None] - lse) * slack).sum(-1)
        ds = ds * step.slope * problem.softmax_scale
        total["dq"][block.index] = ds @ head.k
        if problem.page_size is None:
            counted = step.counts[..., None]
            kv_head = head.query_heads.start // problem.group
            into_dk, into_dv = total["dk"][sequence.keys], total["dv"][sequence.keys]
            into_dk[kv_head] += torch.einsum("grk,grd->kd", ds * counted, head.queries(part))
            into_dv[kv_head] += torch.einsum(
                "grk,grd->kd", dropped(block, step.p) * counted, grad_out
            )
    return total
