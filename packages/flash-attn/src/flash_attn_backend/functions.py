"""Attention by the official library, whichever form of it, in the canonical layout.

q is (batch, heads, seqlen, head_dim), k and v (batch, key heads, seqlen, head_dim), with any
strides: memory in the library's own order, (batch, seqlen, heads, head_dim), is read in place.
Every function returns (out, lse): out as q, lse (batch, heads, seqlen) in fp32. The LSE of a form
without a gradient through it is detached, since the library would ignore that gradient.

``form`` is "flash-attn-2", "flash-attn-3" or "flash-attn-4", the other keywords are those of
``Options``. Raises LibraryUnusable, with the remedy, where the form cannot be used, and
NotImplementedError, in a sentence, for what it does not take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from .forms import DENSE, KV, KVCACHE, QKV, VARLEN, VARLEN_KV, VARLEN_QKV
from .limits import refusals
from .loading import Library, load, parameters_of
from .options import Options, keywords

Result = tuple[Tensor, Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, *, form: str, **options: Unpack[Options]) -> Result:
    """Dense attention; differentiable."""
    library = load(form)
    _refuse(library, q, v.shape[-1], (q, k, v), options)
    given = keywords(library, DENSE, options, square=q.shape[2] == k.shape[2])
    tensors = {"q": _swap(q), "k": _swap(k), "v": _swap(v)}
    return _dense(library, library.function(DENSE)(**tensors, **given))


def attention_kvpacked(q: Tensor, kv: Tensor, *, form: str, **options: Unpack[Options]) -> Result:
    """Dense attention, k and v in one tensor (batch, 2, key heads, seqlen, head_dim)."""
    library = load(form)
    _refuse(library, q, kv.shape[-1], (q, kv), options)
    given = keywords(library, KV, options, square=q.shape[2] == kv.shape[3])
    return _dense(library, library.function(KV)(q=_swap(q), kv=_stacked(kv), **given))


def attention_qkvpacked(qkv: Tensor, *, form: str, **options: Unpack[Options]) -> Result:
    """Dense attention, q, k and v in one tensor (batch, 3, heads, seqlen, head_dim)."""
    library = load(form)
    _refuse(library, qkv[:, 0], qkv.shape[-1], (qkv,), options)
    given = keywords(library, QKV, options, square=True)
    return _dense(library, library.function(QKV)(qkv=_stacked(qkv), **given))


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    form: str,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    square: bool = False,
    **options: Unpack[Options],
) -> Result:
    """Sequences one after another: q (1, heads, total_q, head_dim), k and v alike.

    ``cu_seqlens_q`` and ``cu_seqlens_k`` are their bounds, int32 from 0, one more than there are
    sequences; ``max_seqlen_q`` and ``max_seqlen_k`` the longest. ``square``: the caller says that
    each sequence has as many queries as keys, which causal="top-left" needs.
    """
    library = load(form)
    _refuse(library, q, v.shape[-1], (q, k, v), options)
    given = keywords(library, VARLEN, options, square=square)
    tensors = {"q": _swap(q)[0], "k": _swap(k)[0], "v": _swap(v)[0]}
    bounds = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }
    return _packed(library, library.function(VARLEN)(**tensors, **bounds, **given))


def attention_varlen_kvpacked(
    q: Tensor,
    kv: Tensor,
    *,
    form: str,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    square: bool = False,
    **options: Unpack[Options],
) -> Result:
    """``attention_varlen``, k and v in one tensor (1, 2, key heads, total_k, head_dim)."""
    library = load(form)
    _refuse(library, q, kv.shape[-1], (q, kv), options)
    given = keywords(library, VARLEN_KV, options, square=square)
    bounds = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }
    tensors = {"q": _swap(q)[0], "kv": _stacked(kv)[0]}
    return _packed(library, library.function(VARLEN_KV)(**tensors, **bounds, **given))


def attention_varlen_qkvpacked(
    qkv: Tensor, *, form: str, cu_seqlens: Tensor, max_seqlen: int, **options: Unpack[Options]
) -> Result:
    """``attention_varlen``, all in one tensor (1, 3, heads, total, head_dim)."""
    library = load(form)
    _refuse(library, qkv[:, 0], qkv.shape[-1], (qkv,), options)
    given = keywords(library, VARLEN_QKV, options, square=True)
    bounds = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    function = library.function(VARLEN_QKV)
    return _packed(library, function(qkv=_stacked(qkv)[0], **bounds, **given))


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    form: str,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    **options: Unpack[Options],
) -> Result:
    """Attention to a cache (batch, key heads, capacity, head_dim), no backward but that of
    FlashAttention-4.

    With ``page_table`` (batch, pages of an entry) int32 the cache is (pages, key heads, page_size,
    head_dim). ``cache_seqlens``, (batch,) int32, says how many keys there are; all by default.
    ``k`` and ``v`` (batch, key heads, new keys, head_dim) are written into the cache behind them,
    and seen. ``rotary_cos`` and ``rotary_sin`` (positions, rotary_dim / 2), in the dtype of q,
    rotate q and k by their positions; interleaved: pairs (0, 1), (2, 3) …, else halves.
    ``cache_batch_idx`` (batch,) int32 names the entry of the cache, ``cache_leftpad`` (batch,)
    int32 its first key.
    """
    library = load(form)
    _refuse(library, q, v_cache.shape[-1], (q, k_cache, v_cache), options)
    if isinstance(cache_seqlens, int):
        cache_seqlens = q.new_full((q.shape[0],), cache_seqlens, dtype=torch.int32)
    lengths = {"cache_seqlens": cache_seqlens, "page_table": page_table}
    fresh: dict[str, Any] = {
        "k": None if k is None else _swap(k),
        "v": None if v is None else _swap(v),
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
    }
    fresh = {name: value for name, value in fresh.items() if value is not None}
    square = cache_seqlens is None and page_table is None and q.shape[2] == k_cache.shape[2]
    if KVCACHE not in library.form.functions:
        if fresh:
            raise NotImplementedError(f"{library} has no {KVCACHE}, hence no {', '.join(fresh)}")
        given = keywords(library, VARLEN, {**options, **lengths}, square=square)
        tensors = {"q": _swap(q), "k": _swap(k_cache), "v": _swap(v_cache)}
        return _dense(library, library.function(VARLEN)(**tensors, **given))
    function = library.function(KVCACHE)
    for name in fresh:
        if name not in parameters_of(function):
            raise NotImplementedError(f"{library}: {KVCACHE} has no parameter for {name}")
    given = keywords(library, KVCACHE, {**options, **lengths}, square=square)
    if rotary_cos is not None:
        fresh["rotary_interleaved"] = rotary_interleaved
    caches = {"k_cache": _cache(k_cache, "k" in fresh), "v_cache": _cache(v_cache, "v" in fresh)}
    return _dense(library, function(q=_swap(q), **caches, **fresh, **given))


def _refuse(
    library: Library,
    q: Tensor,
    head_dim_v: int,
    differentiable: tuple[Tensor, ...],
    options: Mapping[str, Any],
) -> None:
    """NotImplementedError for what the form does not take on the GPU of q."""
    if not q.is_cuda:
        return
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    reasons = refusals(
        library.form,
        torch.cuda.get_device_capability(q.device),
        shape=tuple(q.shape),
        head_dim_v=head_dim_v,
        dropout=bool(options.get("dropout_p")),
        softcap=bool(options.get("softcap")),
        gradients=gradients,
        splits=(options.get("num_splits") or 1) > 1,
    )
    for reason in reasons:
        raise NotImplementedError(f"{library}: {reason}")


def _swap(tensor: Tensor) -> Tensor:
    """(B, H, S, D) as (B, S, H, D), or the other way round."""
    return tensor.transpose(1, 2)


def _stacked(tensor: Tensor) -> Tensor:
    """(B, n, H, S, D) as (B, S, n, H, D)."""
    return tensor.permute(0, 3, 1, 2, 4)


def _cache(tensor: Tensor, written: bool) -> Tensor:
    """A cache as the library reads it; ValueError for a copy of one that is written to."""
    if tensor.stride(-1) == 1:
        return _swap(tensor)
    if written:
        raise ValueError(
            f"a cache of strides {tensor.stride()}: accepted is one whose last dimension has "
            "stride 1, since it is written to"
        )
    return _swap(tensor).contiguous()


def _dense(library: Library, returned: tuple[Tensor, ...]) -> Result:
    out, lse = returned[:2]
    return _swap(out), _differentiable(library, lse)


def _packed(library: Library, returned: tuple[Tensor, ...]) -> Result:
    """out (T, H, D) and lse (H, T) as (1, H, T, D) and (1, H, T)."""
    out, lse = returned[:2]
    return _swap(out[None]), _differentiable(library, lse)[None]


def _differentiable(library: Library, lse: Tensor) -> Tensor:
    return lse if library.form.lse_gradient else lse.detach()
