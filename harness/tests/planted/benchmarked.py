"""Targets for the tests of the benchmark: an honest one, and some that only look fast."""

from __future__ import annotations

import os
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

_kept: dict[str, torch.Tensor] = {}
_calls: dict[str, int] = {}


def honest(query, key, value, is_causal=False, enable_gqa=False):
    return scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, enable_gqa=enable_gqa
    )


def zeros(query, key, value):
    return torch.zeros_like(query)


def wrong_scale(query, key, value):
    return scaled_dot_product_attention(query, key, value, scale=1.0)


def cached(query, key, value):
    """What the first call of all gave."""
    if "out" not in _kept:
        _kept["out"] = scaled_dot_product_attention(query, key, value)
    return _kept["out"].clone()


def cached_by_address(query, key, value):
    """The result is right as long as nothing is written where the queries are."""
    name = str(query.data_ptr())
    if name not in _kept:
        _kept[name] = scaled_dot_product_attention(query, key, value)
    return _kept[name].clone()


def half_a_result(query, key, value):
    return scaled_dot_product_attention(query, key, value)[:, :, ::2]


def raises(query, key, value):
    raise ValueError("not today")


def refuses(query, key, value):
    raise NotImplementedError("queries of an even number")


def exits_later(query, key, value):
    _calls["exits"] = _calls.get("exits", 0) + 1
    if _calls["exits"] > 3:
        print("leaving early")
        os._exit(7)
    return scaled_dot_product_attention(query, key, value)


def hangs(query, key, value):
    time.sleep(1000)


def hangs_on_64(query, key, value):
    if query.shape[-2] == 64:
        time.sleep(1000)
    return scaled_dot_product_attention(query, key, value)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def wrong_gradient(query, key, value):
    """The right out; the gradient of the keys is twice as large."""
    return scaled_dot_product_attention(query, _Doubled.apply(key), value)
