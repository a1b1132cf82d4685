"""The scores of a chunk of query rows: scale QKᵀ, softcap, bias, ALiBi, mask; and their softmax.

Forward, backward, the error budget and the diagnosis all get their scores here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem
from .rounding import Rounding
from .sequences import Sequence, alibi_term, cut, visibility

EVERYTHING = slice(None)


@dataclass(kw_only=True)
class ChunkScores:
    """The scores of G query heads and R query rows against the Lk keys of one kv head.

    scores = where(visible, softcap * tanh(raw / softcap) + additive, -inf).
    """

    query_heads: slice  # of the Hq query heads
    rows: slice  # of the Lq query rows
    visible: Tensor  # bool (G, R, Lk); a bias of -inf hides too
    raw: Tensor  # (G, R, Lk): scale * q·k, before the softcap
    tanh: Tensor | None  # (G, R, Lk): tanh(raw / softcap), with a softcap
    additive: Tensor | None  # bias + ALiBi, broadcasts to (G, R, Lk)
    scores: Tensor  # (G, R, Lk), -inf where not visible


class KeyHead:
    """One key/value head of a sequence with the query heads that read it.

    k (Lk, D) and v (Lk, Dv) are converted once, here, so that no more than one head is held
    in fp64 at a time; queries are converted by the chunk.
    """

    def __init__(
        self, sequence: Sequence, problem: Problem, kv_head: int, rounding: Rounding
    ) -> None:
        group = problem.group
        self.sequence = sequence
        self.problem = problem
        self.rounding = rounding
        self.query_heads = slice(kv_head * group, (kv_head + 1) * group)
        self.k = rounding.operand(sequence.k[kv_head])
        self.v = rounding.operand(sequence.v[kv_head])

    def queries(self, rows: slice) -> Tensor:
        """q of these rows, (G, R, D)."""
        return self.rounding.operand(self.sequence.q[self.query_heads, rows])

    def sinks(self) -> Tensor | None:
        """The sink logits of the query heads, (G,), or None."""
        if self.sequence.sinks is None:
            return None
        return self.sequence.sinks[self.query_heads].to(self.rounding.compute)

    def kept(self, rows: slice) -> Tensor | None:
        """What dropout keeps, bool (G, R, Lk), or None without dropout."""
        if not self.problem.dropout:
            return None
        return cut(self.sequence.keep_mask, (self.query_heads, rows, EVERYTHING))

    def scores(self, rows: slice) -> ChunkScores:
        """The scores of these query rows."""
        rounding, problem, heads = self.rounding, self.problem, self.query_heads
        raw = rounding.keep(problem.softmax_scale * (self.queries(rows) @ self.k.T), "scores")
        scores, tanh = raw, None
        if problem.softcap:
            tanh = torch.tanh(raw / problem.softcap)
            scores = rounding.keep(problem.softcap * tanh, "scores")
        visible = visibility(self.sequence, problem, heads, rows)
        additive = alibi_term(self.sequence, problem, heads, rows)
        if additive is not None:
            additive = additive.to(rounding.compute)
        bias = cut(self.sequence.bias, (heads, rows, EVERYTHING))
        if bias is not None:
            visible = visible & (bias != -torch.inf)
            bias = bias.to(rounding.compute)
            additive = bias if additive is None else additive + bias
        if additive is not None:
            scores = rounding.keep(scores + additive, "scores")
        return ChunkScores(
            query_heads=heads,
            rows=rows,
            visible=visible,
            raw=raw,
            tanh=tanh,
            additive=additive,
            scores=scores.masked_fill(~visible, -torch.inf),
        )


def chunk_scores(
    sequence: Sequence,
    problem: Problem,
    kv_head: int,
    rows: slice,
    rounding: Rounding | None = None,
) -> ChunkScores:
    """The scores of query rows against the keys of one kv head, in fp64 without a ``rounding``.

    To walk through many chunks of one head, keep its ``KeyHead``: it converts k once.
    """
    rounding = Rounding(problem, None) if rounding is None else rounding
    return KeyHead(sequence, problem, kv_head, rounding).scores(rows)


def softmax_parts(scores: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores - max), their row sums and the LSE, with the sinks in sum, max and LSE.

    scores (G, R, Lk), sinks (G,) -> (G, R, Lk), (G, R), (G, R). A row with nothing visible gets
    weights 0, row sum 1 (so that dividing by it gives 0) and LSE -inf, or the sink.
    """
    count, rows, keys = scores.shape
    if keys:
        largest = scores.amax(-1)
    else:
        largest = scores.new_full((count, rows), -torch.inf)
    if sinks is not None:
        largest = torch.maximum(largest, sinks[:, None])
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = torch.exp(scores - shift[..., None])
    row_sum = weights.sum(-1)
    if sinks is not None:
        row_sum = row_sum + torch.exp(sinks[:, None] - shift)
    # A score of +inf makes exp(inf - inf) = NaN, while the logarithm of its sum is +inf.
    lse = torch.where(largest == torch.inf, largest, shift + row_sum.log())
    return weights, row_sum.masked_fill(row_sum == 0, 1.0), lse


def probabilities(scores: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """P = softmax(scores) over the keys and the sink, (G, R, Lk), and its LSE, (G, R).

    The sink takes its share of every row and gets no column. Rows with nothing visible: P is 0.
    """
    weights, row_sum, lse = softmax_parts(scores, sinks)
    return weights / row_sum[..., None], lse
