"""Which keys a query of a dense problem sees, as tensors: for backends whose functions take a mask.

Nothing here comes from the reference, so that the two check each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem


def without_padding(tensor: Tensor, inputs: Inputs) -> Tensor:
    """k or v with zeros beyond the lengths: what lies there may be NaN, and 0 * NaN is NaN."""
    if inputs.key_lengths is None:
        return tensor
    return tensor.masked_fill(~within_lengths(inputs)[:, :, 0, :, None], 0.0)


def within_lengths(inputs: Inputs) -> Tensor:
    """Whether a key is one, (B, 1, 1, Sk)."""
    assert inputs.key_lengths is not None
    j = torch.arange(inputs.k.shape[2], device=inputs.k.device)
    return j < inputs.key_lengths[:, None, None, None]


def distance_from_diagonal(inputs: Inputs, problem: Problem) -> Tensor:
    """j - i - offset, (B or 1, 1, Sq, Sk): how far key j lies to the right of query i's key."""
    device = inputs.q.device
    i = torch.arange(problem.seqlen_q, device=device)[:, None]
    j = torch.arange(problem.keys, device=device)
    if problem.causal == "top-left":
        return (j - i)[None, None]
    if inputs.key_lengths is None:
        return (j - i - (problem.keys - problem.seqlen_q))[None, None]
    return j - i - (inputs.key_lengths[:, None, None, None] - problem.seqlen_q)


def visible(inputs: Inputs, problem: Problem, distance: Tensor) -> Tensor:
    """Which keys a query sees, bool, broadcasting to (B, Hq, Sq, Sk)."""
    seen = torch.ones_like(distance, dtype=torch.bool)
    left, right = problem.window or (None, None)
    if left is not None:
        seen = seen & (distance >= -left)
    if right is not None:
        seen = seen & (distance <= right)
    if problem.causal != "none":
        seen = seen & (distance <= 0)
    if inputs.key_lengths is not None:
        seen = seen & within_lengths(inputs)
    if inputs.mask is not None:
        seen = seen & inputs.mask
    return seen
