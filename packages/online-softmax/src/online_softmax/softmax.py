"""Softmax of one row after another, x (..., N), in four ways that differ in how often x is read.

Each loop over j is a pass over memory. Passes are what a kernel pays for: the arithmetic is
the same in all of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arithmetic import finite
from .state import State, identity, merge, state_of


def naive_softmax(x: Tensor) -> Tensor:
    """exp(x) / Σ exp(x), in two passes: NaN from x = 88.73 on in fp32, from 11.1 on in fp16.

    There exp(x) overflows (a sum of several does so earlier), and where all scores of a row are
    -104 (-17.4) or lower, all of them underflow: 0 / 0. (Milakov & Gimelshein 2018,
    arXiv 1805.02867, algorithm 1.)
    """
    d = x.new_zeros(x.shape[:-1])
    for j in range(x.shape[-1]):  # pass 1: the sum
        d = d + torch.exp(x[..., j])
    y = torch.empty_like(x)
    for j in range(x.shape[-1]):  # pass 2: the quotients
        y[..., j] = torch.exp(x[..., j]) / d
    return y


def safe_softmax(x: Tensor) -> Tensor:
    """exp(x - max) / Σ exp(x - max), in three passes: nothing overflows.

    (Algorithm 2 of the same paper.) Rows of nothing but -inf get 0.
    """
    m = x.new_full(x.shape[:-1], -math.inf)
    for j in range(x.shape[-1]):  # pass 1: the maximum
        m = torch.maximum(m, x[..., j])
    d = x.new_zeros(x.shape[:-1])
    for j in range(x.shape[-1]):  # pass 2: the sum
        d = d + torch.exp(x[..., j] - finite(m))
    return _quotients(x, State(m=m, d=d))  # pass 3


def online_softmax(x: Tensor) -> Tensor:
    """The same in two passes: when the maximum rises, the sum so far is rescaled.

    (Algorithm 3 of the same paper: m_j = max(m_(j-1), x_j),
    d_j = d_(j-1) exp(m_(j-1) - m_j) + exp(x_j - m_j).)
    """
    m, d = x.new_full(x.shape[:-1], -math.inf), x.new_zeros(x.shape[:-1])
    for j in range(x.shape[-1]):  # pass 1: maximum and sum together
        x_j = x[..., j]
        m_new = torch.maximum(m, x_j)
        d = d * torch.exp(m - finite(m_new)) + torch.exp(x_j - finite(m_new))
        m = m_new
    return _quotients(x, State(m=m, d=d))  # pass 2


def blockwise_online_softmax(x: Tensor, block: int = 16) -> Tensor:
    """The same over blocks of keys: a block's own (m, d) is merged into that of the row.

    (Section 3.1 of the same paper, with the blocks of one row folded in sequence.)
    """
    state = identity(x.shape[:-1], like=x)
    for start in range(0, x.shape[-1], block):  # pass 1
        state = merge(state, state_of(x[..., start : start + block]))
    return _quotients(x, state)  # pass 2


def _quotients(x: Tensor, state: State) -> Tensor:
    """The last pass of all: exp(x_j - m) / d, and 0 where a row saw no key."""
    y = torch.empty_like(x)
    m, d = finite(state.m), state.d.masked_fill(state.d == 0, 1.0)
    for j in range(x.shape[-1]):
        y[..., j] = torch.exp(x[..., j] - m) / d
    return y
