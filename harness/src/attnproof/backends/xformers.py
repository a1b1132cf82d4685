"""xformers' ``memory_efficient_attention``: (batch, seqlen, heads, head_dim), the rule of what is
hidden as an object of ``xformers.ops.fmha.attn_bias``, or mask and bias as one additive tensor.

Grouped heads are a fifth dimension, (batch, seqlen, key heads, group, head_dim).
Source: https://facebookresearch.github.io/xformers/components/ops.html
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attn_reference.inputs import Attention, Inputs
from attn_reference.problem import Problem

from ..backend import Capabilities
from ..precision import cuda_efficient_precision
from .library import LibraryBackend
from .sdpa_operators import additive

RULES = ("causal top-left", "causal bottom-right", "window")
TENSORS = ("boolean mask", "bias")


def call(function: Callable[..., Any], rules: Any, inputs: Inputs, problem: Problem) -> Attention:
    """Attention by ``function``; ``rules`` is the module ``xformers.ops.fmha.attn_bias``.

    NotImplementedError for what xformers has no rule for: a window from the top left, and packed
    sequences that are causal from the bottom right with fewer keys than queries.
    """
    out = function(
        _grouped(inputs.q, problem),
        _grouped(inputs.k, problem),
        _grouped(inputs.v, problem),
        attn_bias=attn_bias(rules, inputs, problem),
        scale=problem.softmax_scale,
    )
    return Attention(out=out.reshape(*out.shape[:2], problem.heads_q, -1).transpose(1, 2))


def attn_bias(rules: Any, inputs: Inputs, problem: Problem) -> Any:
    """What is hidden, and what is added: a rule, a tensor, or None."""
    if problem.packed is not None:
        lengths_q, lengths_k = ([pair[n] for pair in problem.packed] for n in (0, 1))
        rule = rules.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)
        if problem.causal == "none":
            return rule
        if problem.causal == "top-left":
            return rule.make_causal()
        if any(keys < queries for queries, keys in problem.packed):
            raise NotImplementedError(
                "a packed sequence with fewer keys than queries, causal from the bottom right"
            )
        return rule.make_causal_from_bottomright()
    if problem.window is not None:
        if problem.causal == "top-left":
            raise NotImplementedError("a window that is measured from the top left")
        everything = max(problem.seqlen_q, problem.keys)
        left, right = (everything if side is None else side for side in problem.window)
        right = 0 if problem.causal != "none" else right
        return rules.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)
    if problem.causal == "top-left":
        return rules.LowerTriangularMask()
    if problem.causal == "bottom-right":
        return rules.LowerTriangularFromBottomRightMask()
    bias = additive(inputs, problem)
    if bias is None or problem.group == 1:
        return bias
    return bias.view(-1, problem.kv_heads, problem.group, *bias.shape[2:])


def _grouped(tensor: Tensor, problem: Problem) -> Tensor:
    """(B, S, H, D), or (B, S, Hkv, group, D) where heads are shared."""
    tensor = tensor.transpose(1, 2)
    if problem.group == 1:
        return tensor
    if tensor.shape[2] == problem.kv_heads:  # not the queries: there are more of their heads
        return tensor.unsqueeze(3).expand(-1, -1, -1, problem.group, -1)
    return tensor.view(*tensor.shape[:2], problem.kv_heads, problem.group, -1)


def _memory_efficient(inputs: Inputs, problem: Problem) -> Attention:
    from xformers.ops import fmha, memory_efficient_attention

    return call(memory_efficient_attention, fmha.attn_bias, inputs, problem)


xformers = LibraryBackend(
    name="xformers",
    module="xformers",
    install="pip install xformers",
    capabilities=Capabilities(
        devices=("cuda",),
        features=frozenset({*RULES, *TENSORS, "scale", "gqa", "packed"}),
        head_dim_multiple=8,
        head_dim_max=256,
        empty_inputs=False,
        excludes=(
            *((rule, tensor) for rule in RULES for tensor in TENSORS),
            *(("packed", other) for other in ("window", *TENSORS)),
        ),
    ),
    call=_memory_efficient,
    declared=cuda_efficient_precision(),
)
