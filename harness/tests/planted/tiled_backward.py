"""The backward of the tiled kernel: P recomputed from the LSE, delta = rowsum(dO o O)."""

from __future__ import annotations

from typing import Any

import torch
from tiled import (
    INF,
    TILE_K,
    TILE_Q,
    Entry,
    Spec,
    contiguous_strides,
    entry_of,
    score_tile,
    tiles,
    walked_with,
)
from torch import Tensor


def backward(
    call: dict[str, Any], spec: Spec, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> dict[str, Tensor]:
    """The gradients of q, k, v, bias and sinks, in the dtype of the accumulators."""
    q, k, v = call["q"], call["k"], call["v"]
    wide = lse.dtype
    if spec.planted("grad_out_assumed_contiguous"):
        grad_out = walked_with(grad_out, grad_out.shape, contiguous_strides(grad_out.shape))
    if spec.planted("out_read_with_strides_of_grad_out"):
        out = walked_with(out, out.shape, grad_out.stride())
    if spec.planted("v_indexed_with_head_dim"):
        strides = contiguous_strides(v.shape[:-1] + q.shape[-1:])
        v = walked_with(v.contiguous(), v.shape, strides)
    grads = {n: torch.zeros_like(t, dtype=wide) for n, t in (("q", q), ("k", k), ("v", v))}
    for name in ("bias", "sinks"):
        if call[name] is not None:
            grads[name] = torch.zeros_like(call[name], dtype=wide)
    grad_out = grad_out.to(wide)
    delta = (grad_out * out.to(wide)).sum(-1)
    if spec.planted("delta_omitted"):
        delta = torch.zeros_like(delta)
    if not spec.planted("lse_gradient_ignored"):
        delta = delta - grad_lse
    for b in range(q.shape[0]):
        entry = entry_of(b, call | {"v": v}, spec)
        if entry.sinks is not None:
            p_sink = torch.exp(entry.sinks[..., 0] - lse[b])
            grads["sinks"] -= (p_sink * delta[b]).sum(-1)
        for rows in tiles(q.shape[2], TILE_Q):
            for cols in tiles(entry.k.shape[1], TILE_K):
                block = (
                    lse[b, :, rows, None],
                    delta[b, :, rows, None],
                    grad_out[b, :, rows].to(wide),
                )
                backward_tile(b, entry, spec, rows, cols, *block, grads)
    return grads


def backward_tile(
    b: int,
    entry: Entry,
    spec: Spec,
    rows: slice,
    cols: slice,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    grads: dict[str, Tensor],
) -> None:
    """Add what one tile contributes; lse and delta (Hq, rows, 1), grad_out (Hq, rows, Dv)."""
    scores, slope = score_tile(entry, spec, rows, cols, backward=True)
    p = torch.exp(scores - lse.masked_fill(lse == -INF, 0))
    dp = grad_out @ entry.v[:, cols].mT
    ds = p * (dp - delta)
    if "bias" in grads:
        add_broadcast(grads["bias"], ds, b, rows, cols)
    if slope is not None:
        ds = ds * slope
    p, ds = p.to(entry.dtype).to(p.dtype), ds.to(entry.dtype).to(ds.dtype)
    grads["q"][b, :, rows] += spec.scale * (ds @ entry.k[:, cols])
    grads["v"][b, :, cols].index_add_(0, entry.key_head, p.mT @ grad_out)
    if spec.planted("dk_of_last_query_missing") and rows.stop == entry.q.shape[1]:
        ds = ds.clone()
        ds[:, -1] = 0
    grads["k"][b, :, cols].index_add_(0, entry.key_head, spec.scale * (ds.mT @ entry.q[:, rows]))


def add_broadcast(total: Tensor, tile: Tensor, b: int, rows: slice, cols: slice) -> None:
    """Add a tile (Hq, rows, cols) to the gradient of a bias that may broadcast anywhere."""
    heads, len_q, len_k = total.shape[1:]
    for dim, size in enumerate((heads, len_q, len_k)):
        if size == 1:
            tile = tile.sum(dim, keepdim=True)
    every = slice(None)
    part = total[b if total.shape[0] > 1 else 0]
    part[:, rows if len_q > 1 else every, cols if len_k > 1 else every] += tile
