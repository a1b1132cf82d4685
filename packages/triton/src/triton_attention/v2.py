"""FlashAttention V2 as a function: ``attention``, differentiable in q, k, v, bias and sinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import operators, passes
from .arguments import TENSORS, Arguments, Window
from .passes import DIFFERENTIABLE


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
    num_splits: int | None = None,
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
    1 - dropout_p; the seed comes from torch's generator of the device. num_splits: parts of the
    keys that are computed side by side and merged, 1 or more; None for as many as fill the device,
    which depends on the batch.

    key_lengths: (B,) int32, keys that count, at most all there are. cu_seqlens_q and cu_seqlens_k:
    (sequences + 1,) int32, bounds of sequences packed into a batch of 1, with their longest lengths
    max_seqlen_q and max_seqlen_k, ints. They may be larger; where they are too small, rows behind
    them are lost, of out or of gradients, which is noticed (ValueError) on the CPU alone.
    page_table: (B, pages) int32, with key_lengths; k and v are then (pages, Hkv, page_size, D or
    Dv), and have no gradients.

    Raises ValueError, naming the argument, for what does not fit; RuntimeError where Triton cannot
    run on the device of q. The backward pass gives the same bits every time. Within torch.compile
    the call is that of an operator (``triton_attention.operators``); with a mask_rule, which none
    takes, it breaks the graph.
    """
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits={num_splits!r}: accepted is 1 or more, or None")
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "alibi_slopes": alibi_slopes,
        "mask": mask,
        "bias": bias,
        "sinks": sinks,
        "key_lengths": key_lengths,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "page_table": page_table,
    }
    options: dict[str, Any] = {
        "scale": scale,
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "dropout_p": dropout_p,
    }
    if not torch.compiler.is_compiling():
        options["mask_rule"] = mask_rule
        out, lse, kept = _plain(tensors, options, num_splits, return_keep_mask)
    elif mask_rule is not None:
        options["mask_rule"] = mask_rule
        out, lse, kept = _outside_of_graphs(tensors, options, num_splits, return_keep_mask)
    else:
        out, lse, kept = _in_a_graph(tensors, options, num_splits, return_keep_mask)
    if return_keep_mask:
        return out, lse, kept  # type: ignore[return-value]
    return (out, lse) if return_lse else out


Results = tuple[Tensor, Tensor, Tensor | None]


Tensors = dict[str, Tensor | None]  # those of ``TENSORS``, in their order


def _plain(
    tensors: Tensors, options: dict[str, Any], num_splits: int | None, keep_mask: bool
) -> Results:
    """A function of autograd alone: a call of an operator takes longer."""
    x = Arguments(**tensors, **options)  # type: ignore[arg-type]
    seed = _seed(x.q) if x.dropout_p else None
    out, lse = _Attention.apply(  # type: ignore[no-untyped-call]
        x.q, x.k, x.v, x.bias, x.sinks, x, seed, options, num_splits
    )
    return out, lse, passes.keep_mask(x, seed) if keep_mask and seed is not None else None


def _in_a_graph(
    tensors: Tensors, options: dict[str, Any], num_splits: int | None, keep_mask: bool
) -> Results:
    """The same by operators."""
    given = {name: value for name, value in options.items() if name != "window"}
    given["window_left"], given["window_right"] = options["window"] or (None, None)
    seed = _seed(tensors["q"]) if options["dropout_p"] else None  # type: ignore[arg-type]
    out, lse = operators.attention(*tensors.values(), seed, num_splits=num_splits, **given)
    kept = None
    if keep_mask and seed is not None:
        kept = operators.keep_mask(*tensors.values(), seed, **given)
    return out, lse, kept


_outside_of_graphs = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _plain, reason="mask_rule is a device function of Triton, which no operator takes"
)


def _seed(q: Tensor) -> Tensor:
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)


class _Attention(torch.autograd.Function):
    """(q, k, v, bias, sinks, arguments, seed, options, num_splits) -> (out, lse); ``options`` are
    the arguments that are no tensors."""

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
        options: dict[str, Any],
        num_splits: int | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = passes.forward(x, seed, num_splits)
        ctx.set_materialize_grads(False)
        # All tensors are saved through autograd, and nowhere else: it then notices when one is
        # changed in place, frees them after backward, and may keep them in another place.
        ctx.options = options
        ctx.save_for_backward(seed, out, lse, *x.tensors())
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        seed, out, lse, *tensors = ctx.saved_tensors
        x = Arguments(**dict(zip(TENSORS, tensors, strict=True)), **ctx.options)
        needed = zip(DIFFERENTIABLE, ctx.needs_input_grad, strict=False)
        wanted = {name for name, need in needed if need}
        found = passes.backward(x, seed, out, lse, grad_out, grad_lse, wanted)
        return (*(found.get(name) for name in DIFFERENTIABLE), *(None,) * 4)
