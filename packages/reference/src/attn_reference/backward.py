"""The backward pass in closed form: dQ, dK, dV, dBias, dSinks from dOut and dLSE.

With P the probabilities, M = keep_mask / (1 - dropout) (1 without dropout), J = 1 - tanh²
the slope of the softcap (1 without one) and Δ = rowsum(dOut ∘ Out):

    dV = (M ∘ P)ᵀ dOut          dP = M ∘ (dOut Vᵀ)          dS = P ∘ (dP - Δ + dLSE)
    dBias = dS                  dSinks = Σ P_sink (dLSE - Δ)
    dQ = scale (J ∘ dS) K       dK = scale (J ∘ dS)ᵀ Q

(Dao et al. 2022, arXiv 2205.14135, appendix B.4; Δ stays right under dropout and sinks since
Out = (M ∘ P) V.) Positions and slopes of ALiBi are constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .forward import attention
from .inputs import Attention, Gradients, Inputs
from .precision import Precision
from .problem import Problem
from .rounding import Rounding, full_fp32_products
from .scores import EVERYTHING, KeyHead
from .sequences import Sequence, cut, sequences
from .validation import validate


@torch.no_grad()
@full_fp32_products()
def gradients(
    inputs: Inputs,
    problem: Problem,
    precision: Precision | None = None,
    result: Attention | None = None,
) -> Gradients:
    """The gradients that ``problem.gradients`` names, each in the shape of its input.

    ``inputs.grad_out`` comes in, and ``inputs.grad_lse`` when ``problem.lse_gradient``.
    Without a precision they are fp64, computed in fp64; with one, P is recomputed from the
    LSE, numbers are rounded where it declares, and each gradient has the dtype of its input.
    ``result`` is what ``attention`` gave for the same arguments; it is computed when missing.
    Keys outside their sequence get zeros. Raises ValueError when the inputs do not fit the
    problem or a gradient that must come in is missing.
    """
    validate(inputs, problem, backward=True)
    rounding = Rounding(problem, precision)
    result = attention(inputs, problem, precision) if result is None else result
    totals = _Totals.zeros(inputs, problem, rounding)
    for sequence in sequences(inputs, problem):
        for kv_head in range(problem.kv_heads):
            head = KeyHead(sequence, problem, kv_head, rounding)
            _one_head(head, kv_head, result, totals)
    return totals.stored(inputs, rounding)


@dataclass(kw_only=True)
class _Totals:
    """The gradients on their way: dq, dk and dv stored by the head, dbias and dsinks summed."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None

    @classmethod
    def zeros(cls, inputs: Inputs, problem: Problem, rounding: Rounding) -> _Totals:
        def zeros_like(name: str) -> Tensor | None:
            if name not in problem.gradients:
                return None
            dtype = rounding.compute if name in ("bias", "sinks") else rounding.result
            shaped: Tensor = getattr(inputs, name)
            return torch.zeros(shaped.shape, dtype=dtype, device=shaped.device)

        return cls(**{name: zeros_like(name) for name in ("q", "k", "v", "bias", "sinks")})

    def stored(self, inputs: Inputs, rounding: Rounding) -> Gradients:
        def store(total: Tensor | None, like: Tensor | None) -> Tensor | None:
            if total is None or like is None or rounding.exact:
                return total
            return total.to(like.dtype)

        return Gradients(
            q=self.q,
            k=self.k,
            v=self.v,
            bias=store(self.bias, inputs.bias),
            sinks=store(self.sinks, inputs.sinks),
        )


def _one_head(head: KeyHead, kv_head: int, result: Attention, totals: _Totals) -> None:
    """Add what one kv head and its query heads give."""
    rounding, sequence = head.rounding, head.sequence
    dk, dv = torch.zeros_like(head.k), torch.zeros_like(head.v)
    # A 16-bit accumulator adds whole blocks of rows, however the rows are chunked.
    blocks = (rounding.block(role) for role in ("accumulate_dk", "accumulate_dv"))
    for rows in sequence.chunks(max((block for block in blocks if block), default=1)):
        p, ds = _chunk(head, rows, result, totals)
        grad_out = _grad_out(head, rows)
        q = head.queries(rows)
        for g in range(q.shape[0]):
            if totals.v is not None:
                dv = rounding.add_product(dv, p[g].T, grad_out[g], "accumulate_dv")
            if totals.k is not None:
                dk = rounding.add_product(dk, ds[g].T, q[g], "accumulate_dk")
        if totals.q is not None:
            dq = rounding.add_product(torch.zeros_like(q), ds, head.k, "accumulate_dq")
            rows_of_q = totals.q[sequence.rows]
            rows_of_q[head.query_heads, rows] = rounding.store(dq * head.problem.softmax_scale)
    if totals.k is not None:
        totals.k[sequence.keys][kv_head] = rounding.store(dk * head.problem.softmax_scale)
    if totals.v is not None:
        totals.v[sequence.keys][kv_head] = rounding.store(dv)


def _chunk(head: KeyHead, rows: slice, result: Attention, totals: _Totals) -> tuple[Tensor, Tensor]:
    """M ∘ P and J ∘ dS of some query rows, (G, R, Lk), as operands; dBias and dSinks are added."""
    rounding, sequence, problem = head.rounding, head.sequence, head.problem
    chunk = head.query_heads, rows
    chunk_scores = head.scores(rows)
    assert result.lse is not None
    lse = result.lse[sequence.rows][chunk].to(rounding.compute)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # no key: every exp(-inf - 0) is 0
    p = torch.exp(chunk_scores.scores - lse[..., None])
    assert sequence.grad_out is not None
    out = result.out[sequence.rows][chunk].to(rounding.compute)
    slack = -(sequence.grad_out[chunk].to(rounding.compute) * out).sum(-1)  # dLSE - Δ
    if problem.lse_gradient:
        assert sequence.grad_lse is not None
        slack = slack + sequence.grad_lse[chunk].to(rounding.compute)
    sinks = head.sinks()
    if totals.sinks is not None and sinks is not None:
        totals.sinks[head.query_heads] += (torch.exp(sinks[:, None] - lse) * slack).sum(-1)

    dp = _grad_out(head, rows) @ head.v.T
    if rounding.unfused:
        p = rounding.keep(p, "probabilities")
        dp = rounding.keep(dp, "scores")
    dropped = p  # the operand of dV
    kept = head.kept(rows)
    if kept is not None:
        dropped = rounding.dropped(p, kept, problem.dropout)
        dp = dp * kept / (1 - problem.dropout)
    if not rounding.unfused:  # else dS is formed from the P that was stored
        p = rounding.keep(p, "gradient_probabilities")
    ds = rounding.keep(p * (dp + slack[..., None]), "scores")
    if totals.bias is not None:
        _add_bias(totals.bias, ds, sequence, chunk)
    if chunk_scores.tanh is not None:
        ds = rounding.keep(ds * (1 - chunk_scores.tanh.square()), "scores")
    return rounding.keep(dropped, "probabilities"), rounding.keep(ds, "probabilities")


def _grad_out(head: KeyHead, rows: slice) -> Tensor:
    """dOut of some query rows, (G, R, Dv), as an operand."""
    assert head.sequence.grad_out is not None
    return head.rounding.operand(head.sequence.grad_out[head.query_heads, rows])


def _add_bias(total: Tensor, ds: Tensor, sequence: Sequence, chunk: tuple[slice, slice]) -> None:
    """Add dS to the part of dBias that it belongs to, summed where the bias broadcasts."""
    part = cut(cut(total, sequence.block), (*chunk, EVERYTHING))
    assert part is not None
    part += ds.sum_to_size(part.shape)
