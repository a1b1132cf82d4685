"""The forward pass: out and LSE, in fp64 or rounded as a ``Precision`` declares."""

from __future__ import annotations

import torch

from .inputs import Attention, Inputs, output_shape
from .precision import Precision
from .problem import Problem
from .rounding import Rounding, full_fp32_products
from .scores import KeyHead, softmax_parts
from .sequences import sequences
from .validation import validate


@torch.no_grad()
@full_fp32_products()
def attention(inputs: Inputs, problem: Problem, precision: Precision | None = None) -> Attention:
    """out and lse of a problem, in canonical shapes, on the device of the inputs.

    Without a precision both are fp64 and everything is computed in fp64: the oracle. With
    one, products are accumulated in fp32, numbers are rounded where it declares, out comes in
    the problem's dtype and lse in fp32 (both fp64 when the problem's dtype is).

    A query that sees no key gets out 0 and lse -inf, or its sink. The LSE holds the sink and
    not the dropout; dropout multiplies P by keep_mask / (1 - dropout).
    Not differentiable: see ``gradients`` and ``attn_reference.autograd``.
    Raises ValueError when the inputs do not fit the problem.
    """
    validate(inputs, problem)
    rounding = Rounding(problem, precision)
    shape, device = output_shape(problem), inputs.q.device
    out = torch.zeros(shape, dtype=rounding.result, device=device)
    lse = torch.full(shape[:-1], -torch.inf, dtype=rounding.compute, device=device)
    for sequence in sequences(inputs, problem):
        sequence_out, sequence_lse = out[sequence.rows], lse[sequence.rows]
        for kv_head in range(problem.kv_heads):
            head = KeyHead(sequence, problem, kv_head, rounding)
            for rows in sequence.chunks():
                chunk = head.query_heads, rows
                sequence_out[chunk], sequence_lse[chunk] = _chunk(head, rows)
    return Attention(out=out, lse=lse, keep_mask=inputs.keep_mask)


def _chunk(head: KeyHead, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """out (G, R, Dv) and lse (G, R) of some query rows."""
    rounding, dropout = head.rounding, head.problem.dropout
    weights, row_sum, lse = softmax_parts(head.scores(rows).scores, head.sinks())
    if rounding.unfused:
        weights = rounding.keep(weights / row_sum[..., None], "probabilities")
    kept = head.kept(rows)
    if kept is not None:
        weights = rounding.dropped(weights, kept, dropout)
    weights = rounding.keep(weights, "probabilities")
    nothing = weights.new_zeros((*weights.shape[:2], head.v.shape[-1]))
    out = rounding.add_product(nothing, weights, head.v, "accumulate_out")
    if not rounding.unfused:
        out = out / row_sum[..., None]
    return rounding.store(out), lse
