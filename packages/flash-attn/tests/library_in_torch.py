"""The three interfaces of the library in plain torch, in the precision of what they are given.

Parameters, their order, their defaults and what comes back are those of the library (2.8.3, hopper,
4.0.0b36), as far as this package passes or reads them; the mathematics is the formula. What a call
was given is kept in ``CALLS``.
"""

from __future__ import annotations

import math
import types
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

CALLS: list[tuple[str, dict[str, Any]]] = []
UNBOUNDED = (None, -1)


def attend(
    q: Tensor,  # (Sq, H, D)
    k: Tensor,  # (Sk, Hkv, D)
    v: Tensor,  # (Sk, Hkv, Dv)
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (None, None),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    empty: float = -math.inf,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """out (Sq, H, Dv) and lse (H, Sq)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    distance = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    if alibi_slopes is not None:
        s = s - alibi_slopes[:, None, None] * distance.abs()
    left, right = window_size
    right = 0 if causal else right
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left not in UNBOUNDED:
        hidden |= distance < -left
    if right not in UNBOUNDED:
        hidden |= distance > right
    s = s.masked_fill(hidden, -math.inf)
    if learnable_sink is not None:
        sink = learnable_sink.to(s.dtype)[:, None, None].expand(-1, len(q), 1)
        s = torch.cat([s, sink], -1)
        v = torch.cat([v, v.new_zeros(1, *v.shape[1:])])
    nothing = (s == -math.inf).all(-1)
    p = s.masked_fill(nothing[..., None], 0.0).softmax(-1).masked_fill(nothing[..., None], 0.0)
    lse = s.masked_fill(nothing[..., None], 0.0).logsumexp(-1).masked_fill(nothing, empty)
    return torch.einsum("hij,jhd->ihd", p, v), lse


def dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    parts = [attend(*entry, **options) for entry in zip(q, k, v, strict=True)]
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


def varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) and lse (H, T)."""
    parts = [
        attend(q[a:b], k[c:d], v[c:d], **options)
        for (a, b), (c, d) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True)
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


def cached(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, pages: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    parts = []
    for b, rows in enumerate(q):
        keys, values = (t[b] if pages is None else t[pages[b].long()].flatten(0, 1) for t in (k, v))
        length = len(keys) if lengths is None else int(lengths[b])
        parts.append(attend(rows, keys[:length], values[:length], **options))
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


def remember(name: str, given: dict[str, Any]) -> dict[str, Any]:
    CALLS.append((name, dict(given)))
    return given


class Two(types.ModuleType):
    """flash_attn 2.8.3; a row without keys has an LSE of +inf."""

    @staticmethod
    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        given = remember("flash_attn_func", locals())
        out, lse = dense(**given, empty=math.inf)
        return (out, lse, None) if return_attn_probs else out

    @staticmethod
    def flash_attn_kvpacked_func(
        q,
        kv,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        given = remember("flash_attn_kvpacked_func", locals())
        out, lse = dense(k=kv[:, :, 0], v=kv[:, :, 1], **given, empty=math.inf)
        return (out, lse, None) if return_attn_probs else out

    @staticmethod
    def flash_attn_qkvpacked_func(
        qkv,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        given = remember("flash_attn_qkvpacked_func", locals())
        out, lse = dense(*qkv.unbind(2), **given, empty=math.inf)
        return (out, lse, None) if return_attn_probs else out

    @staticmethod
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        given = remember("flash_attn_varlen_func", locals())
        q, k, v = given.pop("q"), given.pop("k"), given.pop("v")
        out, lse = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **given, empty=math.inf)
        return (out, lse, None) if return_attn_probs else out

    @staticmethod
    def flash_attn_varlen_kvpacked_func(
        q,
        kv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        given = remember("flash_attn_varlen_kvpacked_func", locals())
        q, kv = given.pop("q"), given.pop("kv")
        k, v = kv.unbind(1)
        out, lse = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **given, empty=math.inf)
        return (out, lse, None) if return_attn_probs else out

    @staticmethod
    def flash_attn_varlen_qkvpacked_func(
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        given = remember("flash_attn_varlen_qkvpacked_func", locals())
        out, lse = varlen(
            *given.pop("qkv").unbind(1), cu_seqlens, cu_seqlens, **given, empty=math.inf
        )
        return (out, lse, None) if return_attn_probs else out

    @staticmethod
    def flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        block_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        rotary_interleaved=True,
        alibi_slopes=None,
        num_splits=0,
        return_softmax_lse=False,
    ):
        given = remember("flash_attn_with_kvcache", locals())
        for name in ("k", "v"):
            given.pop(name)
        q = given.pop("q")
        out, lse = cached(q, k_cache, v_cache, cache_seqlens, block_table, **given, empty=math.inf)
        return (out, lse) if return_softmax_lse else out


class Three(types.ModuleType):
    """flash_attn_interface of hopper/."""

    @staticmethod
    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        out, lse = dense(**remember("flash_attn_func", locals()))
        return (out, lse) if return_attn_probs else out

    @staticmethod
    def flash_attn_qkvpacked_func(
        qkv,
        softmax_scale=None,
        causal=False,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        deterministic=False,
        num_heads_q=None,
        sm_margin=0,
        return_attn_probs=False,
    ):
        given = remember("flash_attn_qkvpacked_func", locals())
        out, lse = dense(*qkv.unbind(2), **given)
        return (out, lse) if return_attn_probs else out

    @staticmethod
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        given = remember("flash_attn_varlen_func", locals())
        q, k, v = given.pop("q"), given.pop("k"), given.pop("v")
        out, lse = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **given)
        return (out, lse) if return_attn_probs else out

    @staticmethod
    def flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        qv=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        page_table=None,
        cu_seqlens_q=None,
        cu_seqlens_k_new=None,
        max_seqlen_q=None,
        rotary_seqlens=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        rotary_interleaved=True,
        scheduler_metadata=None,
        num_splits=0,
        pack_gqa=None,
        sm_margin=0,
        return_softmax_lse=False,
    ):
        given = remember("flash_attn_with_kvcache", locals())
        for name in ("k", "v"):
            given.pop(name)
        q = given.pop("q")
        out, lse = cached(q, k_cache, v_cache, cache_seqlens, page_table, **given)
        # With return_softmax_lse what lies behind the LSE comes too: partial results.
        return (out, lse, None, None) if return_softmax_lse else out


class Four(types.ModuleType):
    """flash_attn.cute 4.0.0b36: always out and the LSE."""

    @staticmethod
    def flash_attn_func(
        q,
        k,
        v,
        qv=None,
        gather_kv_indices=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        aux_tensors=None,
        aux_scalars=None,
        block_sparse_tensors=None,
        block_sparse_tensors_bwd=None,
        return_lse=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        out, lse = dense(**remember("flash_attn_func", locals()))
        return out, lse if return_lse else None

    @staticmethod
    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        block_sparse_tensors=None,
        aux_tensors=None,
        aux_scalars=None,
        return_lse=False,
        scheduler_metadata=None,
        seqlen_k_per_split=None,
        disable_scheduler_metadata=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        given = remember("flash_attn_varlen_func", locals())
        q, k, v = given.pop("q"), given.pop("k"), given.pop("v")
        if cu_seqlens_q is None:
            out, lse = cached(q, k, v, seqused_k, given.pop("page_table"), **given)
        else:
            out, lse = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **given)
        return out, lse if return_lse else None


MODULES = {"flash-attn-2": Two, "flash-attn-3": Three, "flash-attn-4": Four}
