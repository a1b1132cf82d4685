"""The functions of the library for packed sequences, whose keys may lie in pages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Asked of the package, which decides whether kernels are interpreted before Triton is imported.
from .. import attention
from .options import Returned, options, signs, unpacked


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Returned:
    """Attention of q (total_q, Hq, D) to k (total_k, H, D), v (total_k, H, Dv): (total_q, Hq, Dv).

    cu_seqlens_q and cu_seqlens_k: (B + 1,) int32, bounds of the sequences, with their longest
    lengths max_seqlen_q and max_seqlen_k, ints. block_table: (B, pages) int32; k and v are then
    (pages, page_size, H, D or Dv), sequence n has the keys cu_seqlens_k[n + 1] - cu_seqlens_k[n] of
    its pages, and k and v have no gradients. With return_attn_probs (out, softmax_lse, S_dmask):
    softmax_lse (Hq, total_q) fp32, S_dmask (B, Hq, max_seqlen_q, max_seqlen_k), -1 behind the end
    of a sequence too, or empty without dropout. All else, what is other than in the library, and
    its source: see ``triton_attention.flash_attn``. Raises ValueError, naming the argument, for
    what does not fit; NotImplementedError for slopes that differ by sequence, and for pages with
    dropout.
    """
    given = options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if block_table is not None:
        if dropout_p:
            raise NotImplementedError(
                f"dropout_p={dropout_p} with block_table: accepted is one of them"
            )
        out, lse = _paged(q, k, v, *bounds[:3], block_table, given)
        return (out, lse, signs(None, q)) if return_attn_probs else out
    results = attention(
        *(tensor.transpose(0, 1)[None] for tensor in (q, k, v)),
        **given,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout_p=dropout_p,
        return_lse=True,
        return_keep_mask=return_attn_probs,
    )
    out = results[0][0].transpose(0, 1).contiguous()
    if not return_attn_probs:
        return out
    kept = None if results[2] is None else _by_sequence(results[2][0], *bounds)
    return out, results[1][0], signs(kept, q)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """``flash_attn_varlen_func`` with k and v in one tensor, (total_k, 2, H, D)."""
    k, v = unpacked("kv", kv, 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Returned:
    """``flash_attn_varlen_func`` with q, k and v in one tensor, (total, 3, H, D)."""
    q, k, v = unpacked("qkv", qkv, 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
    )


def _paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    block_table: Tensor,
    given: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """out (total_q, Hq, Dv) and lse (Hq, total_q).

    The queries of a sequence go to the end of a row of max_seqlen_q: everything is measured from
    the bottom right, where what stands before them changes nothing.
    """
    ends = cu_seqlens_q[1:]
    # Of every place of (B, max_seqlen_q) the token; before a sequence any, whose result is lost.
    tokens = ends[:, None] - max_seqlen_q + torch.arange(max_seqlen_q, device=q.device)
    out, lse = attention(
        q[tokens.clamp(min=0)].transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        **given,
        page_table=block_table,
        key_lengths=cu_seqlens_k.diff(),
        return_lse=True,
    )
    # Of every token the place; behind the last sequence there is none.
    token = torch.arange(q.shape[0], dtype=ends.dtype, device=q.device)
    sequence = torch.searchsorted(ends, token, right=True).clamp(max=ends.shape[0] - 1)
    place = token - ends[sequence] + max_seqlen_q
    behind = place >= max_seqlen_q
    place = torch.where(behind, 0, place)
    out = out[sequence, :, place].masked_fill(behind[:, None, None], 0.0)
    return out, lse[sequence, :, place].T.masked_fill(behind, -torch.inf)


def _by_sequence(
    kept: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    """(Hq, total_q, total_k) as (B, Hq, max_seqlen_q, max_seqlen_k), False behind the ends."""
    i = cu_seqlens_q[:-1, None] + torch.arange(max_seqlen_q, device=kept.device)
    j = cu_seqlens_k[:-1, None] + torch.arange(max_seqlen_k, device=kept.device)
    within = (i < cu_seqlens_q[1:, None])[:, :, None] & (j < cu_seqlens_k[1:, None])[:, None]
    i, j = i.clamp(max=kept.shape[1] - 1), j.clamp(max=kept.shape[2] - 1)
    return kept[:, i[:, :, None], j[:, None]].transpose(0, 1) & within[:, None]
