"""The flash-attention library's functions in plain torch, for the tests of its signature."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

attnproof_capabilities = {"dtypes": ["fp32", "fp16", "bf16"], "page_size_multiple": 1}

Window = tuple[int, int]


def attend(
    q: Tensor,  # (Sq, H, D)
    k: Tensor,  # (Sk, Hkv, D)
    v: Tensor,  # (Sk, Hkv, D)
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * distance.abs()
    left, right = window_size
    right = 0 if causal else right
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    scores = scores.masked_fill(hidden, -math.inf)
    empty = hidden.all(-1)
    lse = torch.logsumexp(scores.masked_fill(empty[:, None], 0.0), -1).masked_fill(empty, -math.inf)
    p = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
    if dropout_p:
        p = p * (torch.rand_like(p) >= dropout_p) / (1 - dropout_p)
    return torch.einsum("hij,jhd->ihd", p, v.double()).to(q.dtype), lse.float()


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    *,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    options = (softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p)
    answers = [attend(*entry, *options) for entry in zip(q, k, v, strict=True)]
    out = torch.stack([out for out, _ in answers])
    if not return_attn_probs:
        return out
    return out, torch.stack([lse for _, lse in answers]), None


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
    window_size: Window = (-1, -1),
    alibi_slopes: Tensor | None = None,
    *,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert max_seqlen_q == max(b - a for a, b in pairwise(starts_q))
    assert max_seqlen_k == max(b - a for a, b in pairwise(starts_k))
    options = (softmax_scale, causal, window_size, 0.0, alibi_slopes, dropout_p)
    answers = []
    for n in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[n : n + 2]), slice(*starts_k[n : n + 2])
        answers.append(attend(q[rows], k[keys], v[keys], *options))
    out = torch.cat([out for out, _ in answers])
    lse = torch.cat([lse for _, lse in answers], -1)  # (H, total_q)
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    options = (softmax_scale, causal, window_size, softcap, alibi_slopes, 0.0)
    answers = []
    for b in range(len(q)):
        if block_table is None:
            keys, values = k_cache[b], v_cache[b]
        else:
            pages = block_table[b].long()
            keys, values = k_cache[pages].flatten(0, 1), v_cache[pages].flatten(0, 1)
        if isinstance(cache_seqlens, Tensor):
            keys, values = keys[: cache_seqlens[b]], values[: cache_seqlens[b]]
        answers.append(attend(q[b], keys, values, *options))
    out = torch.stack([out for out, _ in answers])
    return (out, torch.stack([lse for _, lse in answers])) if return_softmax_lse else out
