"""Targets for the tests of the command line, in a few lines each; signature attnproof."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = scale * (q.double() @ k.double().mT)
    return (torch.softmax(scores, -1) @ v.double()).to(q.dtype)


def right(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return _attend(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), scale)


def modulo(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Query head h reads key head h % heads_kv."""
    head = torch.arange(q.shape[1]) % k.shape[1]
    return _attend(q, k[:, head], v[:, head], scale)


def _bf16_wrong_at(head_dim: int) -> Callable[..., Tensor]:
    """bf16 alone, and of this head dimension the last element is not read."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
        read = q if q.shape[-1] != head_dim else torch.cat([q[..., :-1], 0 * q[..., -1:]], -1)
        return right(read, k, v, scale=scale)

    attention.attnproof_capabilities = {"dtypes": ("bf16",)}
    return attention


bf16_wrong_at_40 = _bf16_wrong_at(40)
bf16_wrong_at_80 = _bf16_wrong_at(80)


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise NotImplementedError("not today")


class Away:
    """A backend that cannot run here."""

    def __init__(self) -> None:
        from attnproof.backend import Capabilities

        self.name = "away"
        self.capabilities = Capabilities()

    def precision(self, device: str) -> object:
        from attn_reference.precision import FLASH

        return FLASH

    def availability(self, device: str) -> str | None:
        return "needs another planet"

    def attention(self, inputs: object, problem: object) -> object:
        raise AssertionError


away = Away()
