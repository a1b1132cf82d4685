"""A correct tiled forward in plain torch, in which one fault at a time can be planted.

FlashAttention (arXiv 2205.14135, 2307.08691): query tiles by key tiles, online softmax, fp32
accumulators, P cast to the dtype of the inputs. Each fault is one branch that asks
``spec.planted(name)``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from faults import KERNEL_FAULTS
from torch import Tensor

TILE_Q = 64
TILE_K = 64
INF = float("inf")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The plain values of one call, and the fault that is planted."""

    scale: float
    causal: str = "none"  # or "top-left", "bottom-right"
    window: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    fault: str | None = None

    def planted(self, name: str) -> bool:
        assert name in KERNEL_FAULTS, name
        return self.fault == name


@dataclass(kw_only=True)
class Entry:
    """One batch entry, keys cut to its length: q (Hq, Sq, D), k (Hq, L, D), v (Hq, L, Dv),
    mask and bias (Hq or 1, Sq or 1, L), slopes and sinks (Hq, 1, 1), in the dtype of the
    accumulators."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    key_head: Tensor  # (Hq,): which key head a query head reads
    dtype: torch.dtype  # that of the inputs


def tiles(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def key_heads(heads_q: int, heads_kv: int, spec: Spec) -> Tensor:
    """(Hq,): which key head each query head reads."""
    group = heads_q // heads_kv
    h = torch.arange(heads_q)
    if spec.planted("head_by_modulo"):
        return h % heads_kv
    if spec.planted("head_times_group"):
        return h * group % heads_kv
    if spec.planted("head_tile_crosses_group") and group > 1:
        h = h // 2 * 2
    return h // group


def walked_with(tensor: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """The memory of ``tensor`` read with other strides; zeros behind the end of its storage."""
    offset = tensor.storage_offset()
    size = tensor.untyped_storage().nbytes() // tensor.itemsize - offset
    index = torch.zeros(shape, dtype=torch.int64)
    for dim, (length, stride) in enumerate(zip(shape, strides, strict=True)):
        steps = torch.arange(length) * stride
        index += steps.view([-1 if d == dim else 1 for d in range(len(shape))])
    memory = tensor.as_strided((size,), (1,), offset)
    return torch.where(index < size, memory[index.clamp(max=size - 1)], 0).to(tensor.dtype)


def contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def rows_behind(tensor: Tensor, count: int) -> Tensor:
    """``count`` rows (count, D) of the memory behind the last element of a tensor (..., D)."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in steps)
    address = tensor.data_ptr() + extent * tensor.itemsize
    size = count * tensor.shape[-1] * tensor.itemsize
    read = bytearray((ctypes.c_char * size).from_address(address))
    return torch.frombuffer(read, dtype=tensor.dtype).view(count, -1)


def entry_of(b: int, call: dict[str, Any], spec: Spec) -> Entry:
    """Batch entry ``b`` of the tensors of a call."""
    q, k, v = call["q"], call["k"], call["v"]
    wide = torch.promote_types(q.dtype, torch.float32)
    length = k.shape[2] if call["key_lengths"] is None else int(call["key_lengths"][b])
    key_head = key_heads(q.shape[1], k.shape[1], spec)

    def cut(name: str) -> Tensor | None:
        tensor = call[name]
        if tensor is None:
            return None
        if spec.planted("mask_read_as_contiguous") and name == "mask":
            tensor = walked_with(tensor, tensor.shape, contiguous_strides(tensor.shape))
        if spec.planted("bias_row_stride_lost_in_mqa") and name == "bias" and k.shape[1] == 1:
            tensor = tensor[:, :, :1] if q.shape[1] > 1 else tensor
        tensor = tensor[b if tensor.shape[0] > 1 else 0]
        return tensor.expand(-1, -1, k.shape[2])[..., :length]

    def per_head(name: str) -> Tensor | None:
        return None if call[name] is None else call[name].to(wide).view(-1, 1, 1)

    bias = cut("bias")
    return Entry(
        q=q[b].to(wide),
        k=k[b, :, :length].to(wide)[key_head],
        v=v[b, :, :length].to(wide)[key_head],
        mask=cut("mask"),
        bias=None if bias is None else bias.to(wide),
        slopes=per_head("alibi_slopes"),
        sinks=per_head("sinks"),
        key_head=key_head,
        dtype=q.dtype,
    )


def visible_tile(entry: Entry, spec: Spec, rows: slice, cols: slice, backward: bool) -> Tensor:
    """Which keys of the tile are visible, bool (Hq or 1, rows, cols)."""
    len_q, len_k = entry.q.shape[1], entry.k.shape[1]
    causal = spec.causal
    if spec.planted("bottom_right_for_top_left") and causal == "top-left":
        causal = "bottom-right"
    if spec.planted("top_left_in_backward") and causal == "bottom-right" and backward:
        causal = "top-left"
    offset = 0 if causal == "top-left" else len_k - len_q
    if spec.planted("causal_ignored_in_backward") and backward:
        causal = "none"
    i = torch.arange(rows.start, rows.stop)[:, None] + offset
    j = torch.arange(cols.start, cols.stop)[None, :]
    left, right = spec.window
    if spec.planted("window_left_exclusive") and left is not None:
        left -= 1
    if spec.planted("window_right_plus_one") and right is not None:
        right += 1
    seen = torch.ones(i.shape[0], j.shape[1], dtype=torch.bool)
    if causal != "none":
        seen &= j <= i
    if left is not None:
        seen &= j >= i - left
    if right is not None:
        seen &= j <= i + right
    long = entry.dtype == torch.bfloat16 and causal != "none" and len_k >= 2000
    if spec.planted("last_key_dropped") or (spec.planted("last_key_dropped_when_long") and long):
        seen &= j < len_k - 1
    seen = seen[None]
    if entry.mask is not None:
        mask = entry.mask[:, rows if entry.mask.shape[1] > 1 else slice(None), cols]
        if spec.planted("mask_polarity"):
            mask = ~mask
        seen = seen & mask
    return seen


def score_tile(
    entry: Entry, spec: Spec, rows: slice, cols: slice, backward: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scores of the tile (Hq, rows, cols), -inf where hidden; 1 - tanh² of the softcap."""
    seen = visible_tile(entry, spec, rows, cols, backward)
    scores = spec.scale * (entry.q[:, rows] @ entry.k[:, cols].mT)
    slope = None
    if spec.softcap > 0:
        if spec.planted("softcap_after_mask"):
            scores = scores.masked_fill(~seen, -5e4)
            seen = torch.ones_like(seen)
        tanh = torch.tanh(scores / spec.softcap)
        scores, slope = spec.softcap * tanh, 1 - tanh.square()
    if entry.bias is not None:
        scores = scores + entry.bias[:, rows if entry.bias.shape[1] > 1 else slice(None), cols]
    if entry.slopes is not None:
        offset = 0 if spec.causal == "top-left" else entry.k.shape[1] - entry.q.shape[1]
        if spec.planted("alibi_distance_off_by_one"):
            offset += 1
        i = torch.arange(rows.start, rows.stop)[:, None] + offset
        distance = (i - torch.arange(cols.start, cols.stop)).abs().to(scores.dtype)
        sign = 1 if spec.planted("alibi_sign") else -1
        scores = scores + sign * entry.slopes * distance
    return scores.masked_fill(~seen, -INF), slope


def attend(entry: Entry, spec: Spec, rows: slice) -> tuple[Tensor, Tensor]:
    """out (Hq, rows, Dv) and lse (Hq, rows, 1) of one tile of query rows."""
    len_k = entry.k.shape[1]
    acc = entry.v.new_zeros(*entry.q[:, rows].shape[:2], entry.v.shape[2])
    m = acc.new_full((*acc.shape[:2], 1), -INF)
    l = torch.zeros_like(m)
    if entry.sinks is not None:
        m, l = entry.sinks.expand_as(m), torch.ones_like(l)
    exp = torch.exp2 if spec.planted("exp2_without_log2e") else torch.exp
    for cols in tiles(len_k, TILE_K):
        scores, _ = score_tile(entry, spec, rows, cols)
        last = cols.stop == len_k
        m_new = torch.maximum(m, scores.amax(-1, keepdim=True))
        base = (
            m_new if spec.planted("hidden_first_tile_nan") else m_new.masked_fill(m_new == -INF, 0)
        )
        p = exp(scores - base)
        rescale = exp(m - base)
        l = l * rescale + p.sum(-1, keepdim=True)
        padded = TILE_K - (cols.stop - cols.start)
        if spec.planted("padded_keys_counted") or (
            spec.planted("padded_keys_counted_unless_causal") and spec.causal == "none"
        ):
            l = l + padded * exp(-base)
        if spec.planted("sink_per_tile") and entry.sinks is not None and cols.start > 0:
            l = l + exp(entry.sinks - base)
        if not (spec.planted("last_tile_not_rescaled") and last):
            acc = acc * rescale
        p = p.to(torch.float8_e4m3fn if spec.planted("probabilities_in_e4m3") else entry.dtype)
        acc = acc + p.to(acc.dtype) @ entry.v[:, cols]
        if spec.planted("output_accumulated_in_bf16"):
            acc = acc.bfloat16().to(acc.dtype)
        m = m_new
    guard = not spec.planted("fully_masked_rows_nan")
    out = acc / (l.masked_fill(l == 0, 1) if guard else l)
    return out, m + torch.log(l)


def forward(call: dict[str, Any], spec: Spec) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv) in the dtype of q and lse (B, Hq, Sq), in fp32 or better."""
    q, v = call["q"], call["v"]
    batch, heads, len_q, _ = q.shape
    out = q.new_empty(batch, heads, len_q, v.shape[3])
    lse = out.new_empty(batch, heads, len_q, dtype=torch.promote_types(q.dtype, torch.float32))
    for b in range(batch):
        entry = entry_of(b, call, spec)
        if spec.planted("output_unwritten_without_keys") and entry.k.shape[1] == 0:
            continue
        for rows in tiles(len_q, TILE_Q):
            if spec.planted("query_grid_rounded_down") and rows.stop - rows.start < TILE_Q:
                continue
            block, block_lse = attend(entry, spec, rows)
            out[b, :, rows] = block.to(q.dtype)
            lse[b, :, rows] = block_lse[..., 0]
    forget_bounds(call, out, spec)
    return out, lse


def forget_bounds(call: dict[str, Any], out: Tensor, spec: Spec) -> None:
    """What the last tiles touch when their bounds are not checked."""
    keys_missing, rows_missing = -call["k"].shape[2] % TILE_K, -out.shape[2] % TILE_Q
    if keys_missing and call["k"].numel():
        if spec.planted("reads_past_the_end"):
            rows_behind(call["k"], keys_missing)
        if spec.planted("values_read_past_the_end"):
            out += 0 * rows_behind(call["v"], keys_missing).sum(0)
    if spec.planted("writes_past_the_end") and rows_missing and out.numel():
        ctypes.memset(out.data_ptr() + out.nbytes, 0, out.shape[3] * out.itemsize)
