"""The dense functions of the library: sequences of one length."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Asked of the package, which decides whether kernels are interpreted before Triton is imported.
from .. import attention
from .options import Returned, options, signs, unpacked


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """Attention of q (B, Sq, Hq, D) to k (B, Sk, H, D) and v (B, Sk, H, Dv): out (B, Sq, Hq, Dv).

    With return_attn_probs (out, softmax_lse, S_dmask): softmax_lse (B, Hq, Sq) fp32, S_dmask (B,
    Hq, Sq, Sk), or empty without dropout. alibi_slopes: (Hq,) or (B, Hq) fp32. All else, what is
    other than in the library, and its source: see ``triton_attention.flash_attn``. Raises
    ValueError, naming the argument, for what does not fit.
    """
    batch, _, heads, _ = q.shape
    tensors = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    by_sequence = alibi_slopes is not None and alibi_slopes.shape == (batch, heads)
    if by_sequence:
        # The heads of all sequences become those of one: slopes differ by head.
        tensors = [tensor.flatten(0, 1)[None] for tensor in tensors]
        alibi_slopes = alibi_slopes.flatten()  # type: ignore[union-attr]
    results: Any = attention(
        *tensors,
        **options(softmax_scale, causal, window_size, softcap, alibi_slopes),
        dropout_p=dropout_p,
        return_lse=True,
        return_keep_mask=return_attn_probs,
    )
    if by_sequence:
        results = [t if t is None else t[0].unflatten(0, (batch, heads)) for t in results]
    out = results[0].transpose(1, 2).contiguous()
    return (out, results[1], signs(results[2], q)) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """``flash_attn_func`` with k and v in one tensor, (B, Sk, 2, H, D)."""
    k, v = unpacked("kv", kv, 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """``flash_attn_func`` with q, k and v in one tensor, (B, S, 3, H, D)."""
    q, k, v = unpacked("qkv", qkv, 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
    )
