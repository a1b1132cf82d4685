"""More targets with one fault each, all of them in the numbers: for measuring how often the judge
sees a fault that changes little. ``correct`` conforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FAULTS = (
    "one_row_loses_half_its_keys",
    "lse_of_one_row_off_by_ln_2_in_backward",
    "delta_shifted_by_one_row",
    "softcap_gradient_omitted",
)


class Fused(torch.autograd.Function):
    """Attention of (B, H, S, D) tensors with P cast to their dtype, and a fault by name."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, causal: bool,
        fault: str | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scores = scores_of(q, k, scale, softcap, causal)
        if fault == "one_row_loses_half_its_keys":
            scores[:, :, scores.shape[2] // 2, : scores.shape[3] // 2] = -math.inf
        largest = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - largest)
        row_sum = weights.sum(-1, keepdim=True)
        out = (weights.to(v.dtype).float() @ v.float() / row_sum).to(v.dtype)
        lse = (largest + row_sum.log())[..., 0]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = scale, softcap, causal, fault
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        scale, softcap, causal, fault = ctx.settings
        scores = scores_of(q, k, scale, softcap, causal)
        delta = (grad_out.float() * out.float()).sum(-1)
        if fault == "lse_of_one_row_off_by_ln_2_in_backward":
            lse = lse.clone()
            lse[:, :, lse.shape[2] // 2] += math.log(2)
        if fault == "delta_shifted_by_one_row":
            delta = delta.roll(1, -1)
        p = torch.exp(scores - lse[..., None])
        dv = p.to(v.dtype).float().mT @ grad_out.float()
        ds = p * (grad_out.float() @ v.float().mT - delta[..., None])
        if softcap and fault != "softcap_gradient_omitted":
            raw = scale * (q.float() @ k.float().mT)
            ds = ds * (1 - torch.tanh(raw / softcap).square())
        ds = ds.to(q.dtype).float()
        dq, dk = scale * (ds @ k.float()), scale * (ds.mT @ q.float())
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def scores_of(q: Tensor, k: Tensor, scale: float, softcap: float, causal: bool) -> Tensor:
    """Scores in fp32, causal from the bottom right."""
    scores = scale * (q.float() @ k.float().mT)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
        seen = seen.tril(scores.shape[-1] - scores.shape[-2])
        scores = scores.masked_fill(~seen, -math.inf)
    return scores


def fused_kernel(fault: str | None) -> Callable[..., Any]:
    """The kernel as a target, with this fault."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, softcap: float = 0.0,
        causal: str = "none", return_lse: bool = False,
    ) -> Any:  # fmt: skip
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        out, lse = Fused.apply(q, k, v, scale, softcap, causal != "none", fault)
        return (out, lse) if return_lse else out

    return attention


correct = fused_kernel(None)
for name in FAULTS:
    globals()[name] = fused_kernel(name)
