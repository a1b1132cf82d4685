"""FlashAttention V2 as a function: ``attention``, differentiable in q, k, v, bias and sinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import TENSORS, Arguments, Window
from .launch import device_of
from .v2_launches import Launches


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: str = "none",
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    mask_rule: Any = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    return_keep_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(mask(softcap(scale QKᵀ) + bias - ALiBi)) V, by FlashAttention V2.

    q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), with any strides, all fp32, fp16 or
    bf16; Hq is a multiple of Hkv; D and Dv up to 256. Gives out (B, Hq, Sq, Dv); with
    ``return_lse`` (out, lse), lse (B, Hq, Sq) fp32, the natural logarithm of the row sum; with
    ``return_keep_mask`` what dropout kept, bool (B, Hq, Sq, Sk), comes third. A query that sees no
    key gets 0, and -inf.

    scale: of q·k, None for 1/sqrt(D). causal: "none", "top-left" or "bottom-right". window: (left,
    right), inclusive, None on a side for no bound. The diagonal that they and ALiBi are measured
    from is key i for "top-left", else key i + Sk - Sq, of the true lengths. softcap: 0 is off.
    alibi_slopes: (Hq,) fp32, that have no gradient. mask: bool, True where visible, and bias: in
    the dtype of q, broadcast to (B, Hq, Sq, Sk). mask_rule: see ``triton_attention.kernels.masks``.
    sinks: (Hq,) fp32 logits that join the row sum. dropout_p: kept probabilities are divided by
    1 - dropout_p; the seed comes from torch's generator of the device.

    key_lengths: (B,) int32, keys that count, at most all there are. cu_seqlens_q and cu_seqlens_k:
    (sequences + 1,) int32, bounds of sequences packed into a batch of 1, with their longest lengths
    max_seqlen_q and max_seqlen_k, ints. They may be larger; where they are too small, rows behind
    them are lost, of out or of gradients, which is noticed (ValueError) on the CPU alone.
    page_table: (B, pages) int32, with key_lengths; k and v are then (pages, Hkv, page_size, D or
    Dv), and have no gradients.

    Raises ValueError, naming the argument, for what does not fit; RuntimeError where Triton cannot
    run on the device of q. The backward pass gives the same bits every time.
    """
    x = Arguments(
        q=q,
        k=k,
        v=v,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        mask=mask,
        mask_rule=mask_rule,
        bias=bias,
        sinks=sinks,
        key_lengths=key_lengths,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        page_table=page_table,
        dropout_p=dropout_p,
    )
    seed = None
    if dropout_p:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    out, lse = _Attention.apply(q, k, v, bias, sinks, x, seed)  # type: ignore[no-untyped-call]
    if not return_lse and not return_keep_mask:
        return out  # type: ignore[no-any-return]
    if not return_keep_mask:
        return out, lse
    kept = None
    if seed is not None:
        with device_of(q):
            kept = Launches(x, seed).keep_mask().run()["keep_mask"]
    return out, lse, kept  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    """(q, k, v, bias, sinks, arguments, seed) -> (out, lse)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        x: Arguments,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        with device_of(q):
            found = Launches(x, seed).forward().run()
        out, lse = found["out"], found["lse"]
        ctx.set_materialize_grads(False)
        # All tensors are saved through autograd, and nowhere else: it then notices when one is
        # changed in place, frees them after backward, and may keep them in another place.
        ctx.options = x.options()
        ctx.save_for_backward(seed, out, lse, *x.tensors())
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        seed, out, lse, *tensors = ctx.saved_tensors
        x = Arguments(**dict(zip(TENSORS, tensors, strict=True)), **ctx.options)
        names = ("q", "k", "v", "bias", "sinks")
        wanted = {n for n, need in zip(names, ctx.needs_input_grad, strict=False) if need}
        if x.page_table is not None and wanted & {"k", "v"}:
            raise NotImplementedError("k and v have no gradients where they are paged")
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        with device_of(x.q):
            found = Launches(x, seed).backward(out, lse, grad_out, grad_lse, wanted).run()
        if "sinks" in wanted and x.sinks is not None:
            found["sinks"] = _sink_gradient(x.sinks, lse, found["delta"])
        return (*(found.get(name) if name in wanted else None for name in names), None, None)


def _sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """dSinks = sum over rows of P_sink (0 - delta): a sink is a key whose value is 0."""
    share = torch.exp(sinks[:, None] - lse)  # (B, Hq, Sq)
    # Rows behind the last sequence have no sink either, whatever comes in for them.
    return -torch.where(lse == -torch.inf, 0.0, share * delta).sum((0, 2))
