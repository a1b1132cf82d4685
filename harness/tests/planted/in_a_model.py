"""Targets for ``attnproof check --model``: attention in torch, right, and with a fault that a model
shows: of padding, of decoding with a cache, of heads, of precision, of gradients.

``in_a_model.py:correct`` conforms; every name in ``FAULTS`` is a function of this module that does
not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FAULTS = (
    "padding_ignored",
    "top_left_in_decoding",
    "scale_two_percent_off",
    "heads_by_modulo",
    "rotated_one_further_beside_left_padding",
    "newest_key_not_in_the_cache",
    "cache_of_the_first_sequence",
    "padding_gives_nan",
    "probabilities_in_eight_bits",
    "keys_without_gradient",
    "gradient_of_one_head_of_a_group",
)
ROPE_THETA = 10000.0


def attend(fault: str | None) -> Callable[..., Tensor]:
    """Attention with this fault."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        causal: str = "none",
        mask: Tensor | None = None,
    ) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        decoding = queries == 1
        offset = 0 if causal == "top-left" else keys - queries
        if fault == "top_left_in_decoding":
            offset = 0
        band = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(offset)
        seen = mask if mask is not None else band
        if mask is None and causal == "none":
            seen = torch.ones_like(band)
        if fault == "padding_ignored" and mask is not None:
            seen = band
        if fault == "scale_two_percent_off":
            scale *= 1.02
        if fault == "rotated_one_further_beside_left_padding" and decoding and mask is not None:
            first_hidden = ~mask[:, :, :, :1]
            q = torch.where(first_hidden, rotated(q), q)
        if fault == "newest_key_not_in_the_cache" and decoding:
            k, v = (torch.cat([x[:, :, :-1], x[:, :, -2:-1]], 2) for x in (k, v))
        if fault == "cache_of_the_first_sequence" and decoding:
            k, v = (x[:1].expand_as(x) for x in (k, v))
        if fault == "keys_without_gradient":
            k = k.detach()
        group = q.shape[1] // k.shape[1]
        if fault == "heads_by_modulo":
            k, v = (x.repeat(1, group, 1, 1) for x in (k, v))
        elif fault == "gradient_of_one_head_of_a_group":
            k, v = (first_alone(x, group) for x in (k, v))
        else:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = q.float() @ k.float().transpose(-1, -2) * scale
        scores = scores.masked_fill(~seen, -torch.inf)
        empty = ~seen.any(-1, keepdim=True)
        p = scores.masked_fill(empty, 0.0).softmax(-1)
        if fault == "probabilities_in_eight_bits":
            p = p + (p.to(torch.float8_e4m3fn).float() - p).detach()
        nothing = torch.nan if fault == "padding_gives_nan" else 0.0
        out = p.to(v.dtype).float() @ v.float()
        return out.masked_fill(empty, nothing).to(q.dtype)

    return attention


def rotated(q: Tensor) -> Tensor:
    """q at the position after its own."""
    half = q.shape[-1] // 2
    angle = ROPE_THETA ** (-torch.arange(half, device=q.device) / half)
    a, b = q.float().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(q.dtype)


def first_alone(x: Tensor, group: int) -> Tensor:
    """Each head for its group, a gradient from the first of them alone."""
    copies = [x, *[x.detach()] * (group - 1)]
    return torch.stack(copies, 2).flatten(1, 2)


correct = attend(None)
for _fault in FAULTS:
    globals()[_fault] = attend(_fault)
