"""The problems of golden/vectors, by name, and how their inputs and answers are computed.

The problems are small, and together use every feature of a Problem. Sizes are odd and differ
from each other, so that no dimension can be taken for another. To add one, add a line to
VECTORS and run ``attnproof golden update``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from attn_reference.backward import gradients
from attn_reference.forward import attention
from attn_reference.inputs import Inputs
from attn_reference.precision import FLASH
from attn_reference.problem import Problem

from ..budget.expectation import expectation
from ..inputs.make import make_inputs, make_keep_mask

_BASE = Problem(
    batch=2,
    heads_q=4,
    heads_kv=2,
    seqlen_q=9,
    seqlen_k=13,
    head_dim=8,
    gradients=("q", "k", "v"),
)
# More queries than keys: the first rows see no key when the alignment is bottom-right.
_TALL = _BASE.replace(seqlen_q=13, seqlen_k=9)
_BIAS = ("q", "k", "v", "bias")
_SINKS = ("q", "k", "v", "sinks")

VECTORS: Mapping[str, Problem] = {
    "dense-fp64": _BASE.replace(dtype="fp64"),
    "dense-fp32": _BASE,
    "dense-fp16": _BASE.replace(dtype="fp16"),
    "dense-bf16": _BASE.replace(dtype="bf16"),
    "one-query": _BASE.replace(seqlen_q=1),
    "one-key": _BASE.replace(seqlen_k=1),
    "no-keys": _BASE.replace(seqlen_k=0),
    "no-queries": _BASE.replace(seqlen_q=0),
    "scale": _BASE.replace(scale=0.75),
    "scale-negative": _BASE.replace(scale=-0.5),
    "scores-large": _BASE.replace(distribution="large"),
    "causal-top-left": _BASE.replace(causal="top-left"),
    "causal-bottom-right": _BASE.replace(causal="bottom-right"),
    "causal-top-left-tall": _TALL.replace(causal="top-left"),
    "causal-bottom-right-tall": _TALL.replace(causal="bottom-right"),
    "window": _BASE.replace(window=(3, 1)),
    "window-zero": _BASE.replace(window=(0, 0)),
    "window-left": _BASE.replace(window=(2, None)),
    "window-right": _BASE.replace(window=(None, 2)),
    "window-causal": _BASE.replace(window=(3, 0), causal="bottom-right"),
    "window-causal-top-left": _BASE.replace(window=(3, 0), causal="top-left"),
    "softcap": _BASE.replace(softcap=1.5, distribution="normal:4"),
    "softcap-causal": _BASE.replace(softcap=1.5, distribution="normal:4", causal="bottom-right"),
    "alibi": _BASE.replace(alibi=True),
    "alibi-six-heads": _BASE.replace(alibi=True, heads_q=6, causal="bottom-right"),
    "mask": _BASE.replace(mask="random"),
    "mask-keys": _BASE.replace(mask="random", mask_shape="b11k"),
    "mask-empty-rows": _BASE.replace(mask="empty-rows", mask_shape="1hqk"),
    "bias": _BASE.replace(bias="normal", gradients=_BIAS),
    "bias-heads": _BASE.replace(bias="normal", bias_shape="1h1k", gradients=_BIAS),
    "bias-rows": _BASE.replace(bias="normal", bias_shape="11qk", gradients=_BIAS),
    "bias-minus-infinity": _BASE.replace(bias="neginf-rows", gradients=_BIAS),
    "sinks": _BASE.replace(sinks=True, gradients=_SINKS),
    "sinks-empty-rows": _TALL.replace(sinks=True, gradients=_SINKS, causal="bottom-right"),
    "mha": _BASE.replace(heads_kv=4),
    "mqa": _BASE.replace(heads_kv=1),
    "gqa-three": _BASE.replace(heads_q=6),
    "head-dim-v": _BASE.replace(head_dim_v=5),
    "key-lengths": _BASE.replace(key_lengths=(0, 7)),
    "key-lengths-causal": _BASE.replace(key_lengths=(11, 4), causal="bottom-right"),
    "packed": _BASE.replace(packed=((3, 5), (0, 4), (6, 0), (7, 7))),
    "packed-causal": _BASE.replace(packed=((3, 5), (1, 1), (7, 4)), causal="bottom-right"),
    "paged": _BASE.replace(page_size=4, gradients=("q",)),
    "paged-lengths": _BASE.replace(
        page_size=4, key_lengths=(9, 2), causal="bottom-right", window=(5, 0), gradients=("q",)
    ),
    "dropout": _BASE.replace(dropout=0.25),
    "lse-gradient": _BASE.replace(lse_gradient=True),
    "everything": _BASE.replace(
        scale=0.75,
        causal="bottom-right",
        window=(6, None),
        softcap=3.0,
        alibi=True,
        mask="random",
        bias="normal",
        sinks=True,
        head_dim_v=5,
        key_lengths=(13, 8),
        dropout=0.25,
        gradients=("q", "k", "v", "bias", "sinks"),
        lse_gradient=True,
    ),
}


def vector_inputs(problem: Problem) -> Inputs:
    """The inputs of a vector: those of the problem, and with dropout a keep mask."""
    inputs = make_inputs(problem)
    if problem.dropout:
        inputs.keep_mask = make_keep_mask(problem)
    return inputs


def answers(inputs: Inputs, problem: Problem) -> dict[str, Tensor]:
    """out, lse and the gradients that the problem asks for, in fp64, by name."""
    result = attention(inputs, problem)
    assert result.lse is not None
    named = {"out": result.out, "lse": result.lse}
    if problem.gradients:
        found = gradients(inputs, problem).tensors()
        named |= {f"d{name}": gradient for name, gradient in found.items()}
    return named


def rounding_bounds(inputs: Inputs, problem: Problem) -> dict[str, Tensor]:
    """By how much two fp64 computations of each answer may differ, element by element.

    Each is within the error budget of a kernel that computes in fp64, so that they are within
    twice the budget of each other, whatever the order of their sums.
    """
    widened = {
        name: getattr(inputs, name).double()
        for name in ("q", "k", "v", "bias", "sinks", "grad_out")
        if getattr(inputs, name) is not None
    }
    expected = expectation(problem.replace(dtype="fp64"), replace(inputs, **widened), FLASH)
    return {name: 2 * answer.bound for name, answer in expected.items()}
