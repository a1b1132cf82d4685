"""FlashAttention V1 as a function: ``attention``, differentiable in q, k and v."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import TENSORS, Arguments
from .kernels.tensors import matrix, vector
from .kernels.v1_backward import backward
from .kernels.v1_forward import forward
from .launch import Launch, Result, device_of
from .tiles import PRODUCTS, Gpu, Kind, gpu_of, padded, v1_tiles
from .tiles_table import Tiles


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: str = "none",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale QKᵀ) V by FlashAttention V1 (Dao et al. 2022, algorithms 1 and 4).

    q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) as in V2; causal: "none", "top-left" or
    "bottom-right". Gives out, or (out, lse). Raises ValueError, naming the argument, for what does
    not fit; RuntimeError where Triton cannot run on the device of q.
    """
    x = Arguments(q=q, k=k, v=v, scale=scale, causal=causal)
    out, lse = _Attention.apply(q, k, v, x)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


def forward_launch(x: Arguments, tiles: Tiles | None = None, gpu: Gpu | None = None) -> Result:
    """The launch that makes out (B, Hq, Sq, Dv), l and m (B, Hq, Sq), all fp32.

    ``gpu``: that the tiles are for, None for the one that q is on.
    """
    shape = (*x.q.shape[:3], x.head_dim_v)
    out = x.q.new_empty(shape, dtype=torch.float32)
    l, m = (out.new_empty(shape[:-1]) for _ in range(2))
    tiles = tiles or v1_tiles(_kind(x, gpu), x.seqlen_q, x.seqlen_k)
    launch = Launch(
        kernel=forward,
        grid=(x.heads_q * x.batches,),
        arguments=_arguments(x, tiles, out, l, m) | {"heads": x.heads_q},
        options=tiles.options,
    )
    return Result(launches=[launch], tensors={"out": out, "l": l, "m": m})


def backward_launch(
    x: Arguments,
    saved: dict[str, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tiles: Tiles | None = None,
    gpu: Gpu | None = None,
) -> Result:
    """The gradients of q (fp32), k and v, from what forward has left."""
    grad_q = torch.empty_like(x.q, dtype=torch.float32)
    grad_k, grad_v = torch.empty_like(x.k), torch.empty_like(x.v)
    tiles = tiles or v1_tiles(_kind(x, gpu), x.seqlen_q, x.seqlen_k)
    own = {
        "grad_out": matrix(grad_out),
        "grad_lse": vector(grad_lse),
        "grad_q": matrix(grad_q),
        "grad_k": matrix(grad_k),
        "grad_v": matrix(grad_v),
        "heads": x.heads_kv,
    }
    launch = Launch(
        kernel=backward,
        grid=(x.heads_kv * x.batches,),
        arguments=_arguments(x, tiles, **saved) | own,
        options=tiles.options,
    )
    return Result(launches=[launch], tensors={"q": grad_q, "k": grad_k, "v": grad_v})


def _kind(x: Arguments, gpu: Gpu | None) -> Kind:
    return Kind(
        gpu=gpu or gpu_of(x.q.device),
        itemsize=x.q.element_size(),
        padded_dim=padded(x.head_dim),
        padded_dim_v=padded(x.head_dim_v),
    )


def _arguments(x: Arguments, tiles: Tiles, out: Tensor, l: Tensor, m: Tensor) -> dict[str, Any]:
    """What both kernels take."""
    return {
        "q": matrix(x.q),
        "k": matrix(x.k),
        "v": matrix(x.v),
        "out": matrix(out),
        "l": vector(l),
        "m": vector(m),
        "scale": x.softmax_scale,
        "seqlen_q": x.seqlen_q,
        "seqlen_k": x.seqlen_k,
        "diagonal": x.seqlen_k - x.seqlen_q if x.causal == "bottom-right" else 0,
        "GROUP": x.group,
        "CAUSAL": x.causal != "none",
        "PRODUCTS": PRODUCTS,
        "HEAD_DIM": x.head_dim,
        "PADDED": padded(x.head_dim),
        "HEAD_DIM_V": x.head_dim_v,
        "PADDED_V": padded(x.head_dim_v),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
    }


class _Attention(torch.autograd.Function):
    """(q, k, v, arguments) -> (out, lse)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, x: Arguments) -> tuple[Tensor, Tensor]:
        with device_of(q):
            found = forward_launch(x).run()
        ctx.set_materialize_grads(False)
        ctx.options = x.options()
        ctx.save_for_backward(found["out"], found["l"], found["m"], *x.tensors())
        # The paper hands on l and m; their LSE is what other implementations return.
        return found["out"].to(q.dtype), found["m"] + found["l"].log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        out, l, m, *tensors = ctx.saved_tensors
        x = Arguments(**dict(zip(TENSORS, tensors, strict=True)), **ctx.options)
        if grad_out is None:
            grad_out = torch.zeros_like(out, dtype=x.q.dtype)
        with device_of(x.q):
            saved = {"out": out, "l": l, "m": m}
            found = backward_launch(x, saved, grad_out, grad_lse).run()
        return found["q"].to(x.q.dtype), found["k"], found["v"], None
