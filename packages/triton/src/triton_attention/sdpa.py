"""V2 with the meaning of torch's ``scaled_dot_product_attention``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """A drop-in for ``torch.nn.functional.scaled_dot_product_attention``.

    query (…, Hq, L, E), key (…, H, S, E), value (…, H, S, Ev), in fp32, fp16 or bf16; H is Hq, or
    divides it with ``enable_gqa``; what comes before the heads broadcasts, and heads may be
    missing. attn_mask: bool, True where visible, or a bias in the dtype of the query, which may
    have a gradient; it broadcasts to (…, Hq, L, S). is_causal: from the top left. scale: None for
    1/sqrt(E). Gives (…, Hq, L, Ev); a query that sees no key gets 0.

    Raises RuntimeError, as torch does, for what has no meaning there: attn_mask with is_causal,
    heads that differ without enable_gqa, shapes that do not broadcast; ValueError for other
    arguments that V2 does not accept; NotImplementedError for an attn_mask in fp32 with queries in
    16 bits, which torch takes.
    """
    if attn_mask is not None and is_causal:
        raise RuntimeError("attn_mask is given with is_causal=True: accepted is one of them")
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dim() < 2:
            raise RuntimeError(f"{name} has {tensor.dim()} dimensions: accepted are 2 or more")
    # (…, H, L, E); without heads there is one.
    query, key, value = (t[None] if t.dim() == 2 else t for t in tensors.values())
    heads_q, heads = query.shape[-3], key.shape[-3]
    if heads_q != heads and not enable_gqa:
        raise RuntimeError(
            f"key has {heads} heads: accepted are {heads_q}, as query has, or fewer with "
            "enable_gqa=True"
        )
    batch = query.shape[:-3]
    if not batch == key.shape[:-3] == value.shape[:-3]:
        shapes = [tensor.shape[:-3] for tensor in (query, key, value)]
        batch = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    rows, columns = query.shape[-2], value.shape[-1]
    mask = bias = None
    if attn_mask is not None:
        mask = _scores(attn_mask, (*batch, heads_q, rows, key.shape[-2]), query.dtype)
        if mask.dtype != torch.bool:
            mask, bias = None, mask
    out = attention(
        _entries(query, batch),
        _entries(key, batch),
        _entries(value, batch),
        mask=mask,
        bias=bias,
        causal="top-left" if is_causal else "none",
        scale=scale,
        dropout_p=dropout_p,
    )
    assert isinstance(out, Tensor)  # neither an LSE nor a keep mask was asked for
    if max(tensor.dim() for tensor in tensors.values()) == 2:
        return out[0, 0]
    return out if len(batch) == 1 else out.reshape(*batch, heads_q, rows, columns)


def _entries(tensor: Tensor, batch: torch.Size) -> Tensor:
    """(B, H, L, E), where ``batch`` becomes B."""
    if tensor.shape[:-3] == batch and len(batch) == 1:
        return tensor
    return tensor.expand(*batch, *tensor.shape[-3:]).reshape(math.prod(batch), *tensor.shape[-3:])


def _scores(attn_mask: Tensor, scores: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The mask in four dimensions, of size 1 where it broadcasts, as far as that needs no copy."""
    if attn_mask.dtype not in (torch.bool, dtype):
        refused = NotImplementedError if attn_mask.dtype == torch.float32 else RuntimeError
        raise refused(f"attn_mask has dtype {attn_mask.dtype}: accepted are torch.bool and {dtype}")
    missing = len(scores) - attn_mask.dim()
    sizes = zip(attn_mask.shape, scores[max(missing, 0) :], strict=False)
    if missing < 0 or any(size not in (1, whole) for size, whole in sizes):
        raise RuntimeError(
            f"attn_mask has shape {tuple(attn_mask.shape)}: accepted is what broadcasts to {scores}"
        )
    attn_mask = attn_mask[(None,) * missing]
    *before, heads, rows, keys = attn_mask.shape
    if len(before) == 1:
        return attn_mask
    batch = scores[:-3]
    if math.prod(before) == 1:
        return attn_mask.reshape(1, heads, rows, keys)
    return attn_mask.expand(*batch, heads, rows, keys).reshape(math.prod(batch), heads, rows, keys)
