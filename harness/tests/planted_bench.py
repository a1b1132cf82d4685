"""Targets to be measured: an honest one, and ones whose measurements must fail."""

import os

import torch

KEPT = {}


def honest(q, k, v, is_causal=False):
    s = q @ k.mT / q.shape[-1] ** 0.5
    if is_causal:
        s = s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), float("-inf"))
    return torch.softmax(s, -1) @ v


def wrong(q, k, v, is_causal=False):
    return honest(q, k, v, is_causal) * 1.01


def stale(q, k, v, is_causal=False):
    """What it computed for the first inputs of that shape."""
    return KEPT.setdefault((q.shape, is_causal), honest(q, k, v, is_causal).detach())


def zeros(q, k, v, is_causal=False):
    return torch.zeros_like(v)


def wrong_gradient(q, k, v, is_causal=False):
    return honest(q.detach(), k, v, is_causal) + 0 * q


def refuses(q, k, v, is_causal=False):
    raise NotImplementedError("only on Tuesdays")


def raises(q, k, v, is_causal=False):
    raise ValueError("no")


def dies(q, k, v, is_causal=False):
    os._exit(7)
