"""FlashInfer's ``single_prefill_with_kv_cache``: a sequence at a time, (seqlen, heads, head_dim),
causal from the bottom right, the LSE to the base 2.

Source: https://docs.flashinfer.ai/generated/flashinfer.prefill.single_prefill_with_kv_cache.html
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_reference.inputs import Attention, Inputs, output_shape
from attn_reference.problem import Problem
from attn_reference.sequences import sequences

from ..backend import Capabilities
from ..requirement import Requirement
from .library import LibraryBackend

HEAD_DIMS = (64, 128, 256)


def call(function: Callable[..., Any], inputs: Inputs, problem: Problem) -> Attention:
    """Attention by ``function``, once for each sequence; NotImplementedError for a window that
    is bounded on the right of the diagonal, and for head dimensions that it has no kernel for."""
    left, right = problem.window or (None, None)
    if problem.causal == "none" and right:
        raise NotImplementedError(f"window={problem.window}: only the left side can be bounded")
    if problem.head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"head_dim {problem.head_dim} is not one of {HEAD_DIMS}")
    shape = output_shape(problem)
    out = inputs.q.new_zeros(shape)
    lse = inputs.q.new_full(shape[:-1], -math.inf, dtype=torch.float32)
    for sequence in sequences(inputs, problem):
        if not sequence.len_q or not sequence.len_k:
            continue
        part, part_lse = function(
            _swapped(sequence.q),
            _swapped(sequence.k),
            _swapped(sequence.v),
            causal=problem.causal != "none" or right == 0,
            kv_layout="NHD",
            sm_scale=problem.softmax_scale,
            window_left=-1 if left is None else left,
            logits_soft_cap=problem.softcap or None,
            return_lse=True,
        )
        out[sequence.rows] = _swapped(part)
        lse[sequence.rows] = part_lse.T
    return Attention(out=out, lse=lse)


def _swapped(tensor: Tensor) -> Tensor:
    """(heads, seqlen, head_dim) from (seqlen, heads, head_dim), or the other way round."""
    return tensor.transpose(0, 1)


def _prefill(inputs: Inputs, problem: Problem) -> Attention:
    from flashinfer import single_prefill_with_kv_cache

    return call(single_prefill_with_kv_cache, inputs, problem)


flashinfer = LibraryBackend(
    name="flashinfer",
    module="flashinfer",
    install="pip install flashinfer-python",
    capabilities=Capabilities(
        dtypes=("fp16", "bf16"),
        devices=("cuda",),
        features=frozenset(
            {"causal bottom-right", "window", "softcap", "scale", "gqa", "key lengths", "packed"}
        ),
        gradients=(),
        head_dim_max=max(HEAD_DIMS),
        head_dim_multiple=min(HEAD_DIMS),
        returns_lse=True,
        lse_base="2",
    ),
    call=_prefill,
    requirement=Requirement(who="flashinfer", arch_min="sm_75", dtypes=(("bf16", "sm_80"),)),
)
