"""Unfused attention in torch, as models write it: matmul, scale, softmax in fp32, matmul.

The scores are stored in the dtype of the inputs, as in ``eager_attention_forward`` of
transformers; everything between them and the softmax is in fp32. Nothing of it comes from the
reference, so that the two check each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import EAGER, Precision
from attn_reference.problem import Problem

from ..backend import Capabilities
from ..precision import cpu_eager_precision
from ..signatures.common import FunctionBackend
from .positions import distance_from_diagonal, visible, without_padding

FEATURES = frozenset(
    {
        "causal top-left",
        "causal bottom-right",
        "window",
        "softcap",
        "alibi",
        "boolean mask",
        "bias",
        "sinks",
        "scale",
        "gqa",
        "head_dim_v",
        "key lengths",
        "dropout",
        "lse gradient",
    }
)


def attention(inputs: Inputs, problem: Problem) -> Attention:
    """Attention of a dense problem; q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv).

    Returns out in the dtype of q, lse in fp32 and, with dropout, what was kept, drawn from
    torch's global generator.
    """
    q, k, v = inputs.q, without_padding(inputs.k, inputs), without_padding(inputs.v, inputs)
    scores = _grouped_matmul(q, k.transpose(-1, -2)) * problem.softmax_scale
    scores = scores.float()  # (B, Hq, Sq, Sk)
    if problem.softcap:
        scores = torch.tanh(scores / problem.softcap) * problem.softcap
    if inputs.bias is not None:
        scores = scores + inputs.bias.float()
    distance = distance_from_diagonal(inputs, problem)  # (B or 1, 1, Sq, Sk)
    if inputs.alibi_slopes is not None:
        scores = scores - inputs.alibi_slopes[:, None, None] * distance.abs()
    scores = scores.masked_fill(~visible(inputs, problem, distance), -math.inf)
    probabilities, lse = _softmax(scores, inputs.sinks)
    keep_mask = None
    if problem.dropout:
        keep_mask = torch.rand_like(probabilities) >= problem.dropout
        probabilities = probabilities * keep_mask / (1 - problem.dropout)
    out = _grouped_matmul(probabilities.to(q.dtype), v)
    return Attention(out=out, lse=lse, keep_mask=keep_mask)


def _grouped_matmul(rows: Tensor, columns: Tensor) -> Tensor:
    """(B, Hq, Sq, N) @ (B, Hkv, N, M): the heads of a group are rows of one product."""
    batch, heads, seqlen, inner = rows.shape
    kv_heads = columns.shape[1]
    grouped = rows.reshape(batch, kv_heads, heads // kv_heads * seqlen, inner)
    return (grouped @ columns).reshape(batch, heads, seqlen, columns.shape[-1])


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities and LSE of fp32 scores; a row without a visible key gives 0 and -inf."""
    if sinks is not None:
        column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
        return scores.softmax(-1)[..., :-1], scores.logsumexp(-1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)  # softmax of nothing but -inf is NaN, also backward
    probabilities = scores.softmax(-1).masked_fill(empty, 0.0)
    return probabilities, scores.logsumexp(-1).masked_fill(empty[..., 0], -math.inf)


def _precision(device: str) -> Precision:
    return cpu_eager_precision() if device == "cpu" else EAGER


eager = FunctionBackend(
    name="eager",
    capabilities=Capabilities(
        features=FEATURES,
        gradients=("q", "k", "v", "bias", "sinks"),
        returns_lse=True,
        keep_mask=True,
    ),
    call=attention,
    declared=_precision,
)
