"""Attention to a cache: the function of the library for decoding."""

from __future__ import annotations

from typing import SupportsIndex

import torch
from torch import Tensor

# Asked of the package, which decides whether kernels are interpreted before Triton is imported.
from .. import attention
from ..cache import append_to_cache, refuse_outside
from ..tracing import readable
from .options import Returned, options
from .rotary import rotated


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Returned:
    """Attention of q (B, Sq, Hq, D) to a cache: out (B, Sq, Hq, Dv), without gradients.

    k_cache (B or more, capacity, H, D), v_cache (B or more, capacity, H, Dv); with block_table,
    (B, pages) int32, (pages, page_size, H, D or Dv). cache_seqlens: (B,) int32, or an int, how many
    keys there are; all by default. k (B, n, H, D) and v (B, n, H, Dv) are written into the cache
    behind them, and seen; they need cache_seqlens. rotary_cos and rotary_sin, (positions, R / 2) in
    the dtype of q, rotate the first R columns of k, by position in the cache, and of q: by
    cache_seqlens + i where causal or with a window, else by cache_seqlens. rotary_interleaved:
    pairs (0, 1), (2, 3) …, else halves. cache_batch_idx: (B,) int32, the entry of the cache.
    cache_leftpad: (B,) int32, its first key that is seen. num_splits: parts of the keys, computed
    side by side; 0: by V2's rule. With return_softmax_lse (out, softmax_lse), softmax_lse (B, Hq,
    Sq) fp32. All else, what is other than in the library, and its source: see
    ``triton_attention.flash_attn``.

    Raises ValueError, naming the argument, for what does not fit; NotImplementedError for slopes
    that differ by sequence. Lengths that are negative or beyond the cache, and pages that there are
    not, are refused where that needs no value of a GPU, which would wait for it: in an int, and in
    tensors on the CPU. On a GPU keys of such lengths are not written, and of longer ones as many
    are seen as the cache has room for.
    """
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError("cache_batch_idx is given with block_table: accepted is one of them")
    if (k is None) != (v is None) or (k is not None and cache_seqlens is None):
        raise ValueError("k, v and cache_seqlens: accepted with one of k and v are all three")
    if rotary_cos is not None and k is None:
        raise ValueError("rotary_cos is given without k and v: accepted is rotation of new keys")
    given = options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    # Entries of the cache that are named are pages, of which every sequence has one.
    table = cache_batch_idx[:, None] if cache_batch_idx is not None else block_table
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    lengths = _lengths(q, cache_seqlens, table, capacity, 0 if k is None else k.shape[1])
    if cache_leftpad is not None and readable(cache_leftpad):
        refuse_outside("cache_leftpad", cache_leftpad, capacity, "the keys of the cache")
    if k is not None and v is not None and lengths is not None:
        if rotary_cos is not None:
            local = causal or given["window"] is not None
            tables = _rotary_tables(q, rotary_cos, rotary_sin, capacity)
            q = _rotated(q, tables, lengths, local, rotary_interleaved)
            k = _rotated(k, tables, lengths, True, rotary_interleaved)
        append_to_cache(k_cache, v_cache, k.transpose(1, 2), v.transpose(1, 2), lengths, table)
        lengths = lengths + k.shape[1]
    if cache_leftpad is not None:
        if lengths is None:
            lengths = torch.full_like(cache_leftpad, capacity)
        lengths = lengths - cache_leftpad
        k_cache, v_cache, table = _row_by_row(k_cache, v_cache, table, cache_leftpad)
    if table is None:
        k_cache, v_cache = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
    out, lse = attention(
        q.transpose(1, 2),
        k_cache,
        v_cache,
        **given,
        key_lengths=lengths,
        page_table=table,
        num_splits=num_splits or None,
        return_lse=True,
    )
    out = out.transpose(1, 2).contiguous()
    return (out, lse) if return_softmax_lse else out


def _lengths(
    q: Tensor, cache_seqlens: Tensor | int | None, table: Tensor | None, capacity: int, new: int
) -> Tensor | None:
    """(B,) int32; None where all keys of a cache without a table count."""
    most = capacity - new
    room = f"the room for {new} new keys" if new else "the keys of the cache"
    if isinstance(cache_seqlens, Tensor):
        if readable(cache_seqlens):
            refuse_outside("cache_seqlens", cache_seqlens, most, room)
        return cache_seqlens
    if cache_seqlens is None:
        if table is None:
            return None
        cache_seqlens = capacity
    if not isinstance(cache_seqlens, SupportsIndex) or not 0 <= cache_seqlens <= most:
        raise ValueError(
            f"cache_seqlens={cache_seqlens!r}: accepted is an int of 0 to {most}, {room}, or a "
            "tensor of them"
        )
    return torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)


def _row_by_row(
    k_cache: Tensor, v_cache: Tensor, table: Tensor | None, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The cache in pages of one row, and a table that begins at the ``first`` key.

    What stands before it must not be read: a mask would still multiply it, NaN or not, by 0.
    """
    page_size = k_cache.shape[2]
    capacity = page_size * (1 if table is None else table.shape[1])
    rows = (first[:, None] + torch.arange(capacity, device=first.device)).clamp(max=capacity - 1)
    if table is None:
        pages = torch.arange(first.shape[0], device=first.device)[:, None]
    else:
        pages = table.gather(1, rows // page_size)
    # (pages, H, page_size, D) as (rows, H, 1, D)
    k, v = (cache.transpose(1, 2).flatten(0, 1)[:, :, None] for cache in (k_cache, v_cache))
    return k, v, (pages * page_size + rows % page_size).to(torch.int32)


def _rotary_tables(
    q: Tensor, cos: Tensor, sin: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor]:
    """Both, checked."""
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if (
            table is None
            or table.shape != cos.shape
            or table.dim() != 2
            or table.shape[0] < capacity
            or 2 * table.shape[1] > q.shape[3]
            or table.dtype != q.dtype
        ):
            found = None if table is None else f"{table.dtype} {tuple(table.shape)}"
            raise ValueError(
                f"{name} is {found}: accepted is {q.dtype} (positions, columns), both alike, with "
                f"at least {capacity} positions and at most {q.shape[3] // 2} columns"
            )
    assert sin is not None
    return cos, sin


def _rotated(
    x: Tensor, tables: tuple[Tensor, Tensor], lengths: Tensor, local: bool, interleaved: bool
) -> Tensor:
    """x (B, S, H, D), rotated by lengths + i, or, unless ``local``, by lengths alone."""
    steps = torch.arange(x.shape[1], device=x.device) * int(local)
    return rotated(x, *tables, lengths[:, None] + steps, interleaved=interleaved)
