"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), of part of the columns."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> Tensor:
    """x (B, S, H, D) with its first R columns rotated, in fp32, by the angles of its positions.

    cos and sin: (P, R / 2); positions: (B, S), integers below P. Pairs of columns are (0, 1), (2,
    3) … where interleaved, else (0, R / 2), (1, R / 2 + 1) …
    """
    width = 2 * cos.shape[1]
    c, s = (table[positions][:, :, None].float() for table in (cos, sin))  # (B, S, 1, R / 2)
    turning = x[..., :width].float()
    first, second = (
        (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    )
    pair = first * c - second * s, first * s + second * c
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned.to(x.dtype), x[..., width:]], -1)
