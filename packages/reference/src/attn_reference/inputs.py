"""The tensors of a problem, and the tensors that come out of it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .problem import Problem


@dataclass(kw_only=True)
class Inputs:
    """What goes into one attention computation.

    Dense: q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv).
    Packed: batch 1 and the sequences one after another, split by cu_seqlens_q and
    cu_seqlens_k (int32, one more entry than sequences, from 0).
    Paged: k (pages, Hkv, page_size, D) and v (pages, Hkv, page_size, Dv), with
    page_table (B, pages_per_entry) int32 naming the page of each run of keys.

    mask (bool, True: visible) and bias broadcast to (B, Hq, Sq, Sk); packed: to
    (1, Hq, total_q, total_k). alibi_slopes and sinks are fp32 of shape (Hq,);
    key_lengths is int32 of shape (B,). keep_mask (bool, B, Hq, Sq, Sk; True: kept) says
    what dropout kept. grad_out has the shape of out, grad_lse (fp32) that of lse.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    page_table: Tensor | None = None
    keep_mask: Tensor | None = None
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}


@dataclass(kw_only=True)
class Attention:
    """What comes out: out (B, Hq, Sq, Dv); lse (B, Hq, Sq), the natural logarithm of the
    row sum, sinks included, unless the backend declares otherwise; keep_mask of dropout."""

    out: Tensor
    lse: Tensor | None = None
    keep_mask: Tensor | None = None


@dataclass(kw_only=True)
class Gradients:
    """The gradients, each in the shape of its input; None where it was not asked for."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The gradients that are there, by the name of their input."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}


def output_shape(problem: Problem) -> tuple[int, int, int, int]:
    """Shape of out: (B, Hq, Sq, Dv), or (1, Hq, total_q, Dv) for packed problems."""
    if problem.packed is not None:
        total = sum(length for length, _ in problem.packed)
        return (1, problem.heads_q, total, problem.value_dim)
    return (problem.batch, problem.heads_q, problem.seqlen_q, problem.value_dim)


def key_count(problem: Problem) -> int:
    """Keys along the sequence dimension of a dense or packed k (or of the mask)."""
    if problem.packed is not None:
        return sum(length for _, length in problem.packed)
    return problem.keys


def standard_alibi_slopes(heads: int) -> Tensor:
    """Slopes of Press et al. 2021 (arXiv 2108.12409): (heads,) fp32.

    A power of two gets 2^(-8 i / heads); any other count takes the slopes of the next
    smaller power and, for the rest, every other slope of the next larger one.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    power = 1 << (heads.bit_length() - 1)
    slopes = geometric(power) + geometric(2 * power)[0::2][: heads - power]
    return torch.tensor(slopes, dtype=torch.float32)
