"""The options that the functions of the library share, in the words of V2, and what they return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Returned = Tensor | tuple[Tensor, ...]


def options(
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """Keywords of ``attention``. NotImplementedError for slopes of (batch, heads)."""
    if alibi_slopes is not None and alibi_slopes.dim() == 2:
        if alibi_slopes.shape[0] != 1:
            raise NotImplementedError(
                f"alibi_slopes has shape {tuple(alibi_slopes.shape)}: accepted is (heads,) here, "
                "the same for all sequences"
            )
        alibi_slopes = alibi_slopes[0]
    return {
        "scale": softmax_scale,
        "causal": "bottom-right" if causal else "none",
        "window": window(window_size),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }


def window(window_size: tuple[int, int]) -> tuple[int | None, int | None] | None:
    """Sides without a bound are None, and not negative."""
    left, right = window_size
    if left < 0 and right < 0:
        return None
    return (None if left < 0 else left, None if right < 0 else right)


def signs(kept: Tensor | None, q: Tensor) -> Tensor:
    """``S_dmask``: 1 where dropout kept, -1 where it dropped, in the dtype of q; empty without."""
    if kept is None:
        return q.new_empty(0)
    return torch.where(kept, 1.0, -1.0).to(q.dtype)


def unpacked(name: str, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """The tensors that are packed in one, along the dimension before heads and head_dim."""
    if tensor.dim() < 3 or tensor.shape[-3] != count:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: accepted is (…, {count}, heads, head_dim)"
        )
    return tensor.unbind(-3)
