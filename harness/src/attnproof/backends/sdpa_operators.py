"""The operators below torch's ``scaled_dot_product_attention`` on CUDA, which return the LSE.

They do not check what the public function checks, and align causality as their kernels do: the
flash kernel from the bottom right, the others from the top left.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_reference.inputs import Attention, Inputs
from attn_reference.problem import Problem

ALIGNMENT = 16  # elements, of the rows of a bias
HEAD_DIM_MULTIPLE = 8  # of the flash kernel; the public function pads as well


def flash(inputs: Inputs, problem: Problem) -> Attention:
    """The flash kernel."""
    head_dim = inputs.v.shape[-1]
    q, k, v = (_padded(tensor) for tensor in (inputs.q, *_repeated(inputs, problem)))
    causal = problem.causal != "none"
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=problem.softmax_scale
    )
    return Attention(out=out[..., :head_dim], lse=lse[..., : problem.seqlen_q])


def efficient(inputs: Inputs, problem: Problem) -> Attention:
    """The memory-efficient kernel."""
    k, v = _repeated(inputs, problem)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        inputs.q,
        k,
        v,
        additive(inputs, problem),
        True,
        0.0,
        problem.causal == "top-left",
        scale=problem.softmax_scale,
    )
    return Attention(out=out, lse=lse[..., : problem.seqlen_q])


def cudnn(inputs: Inputs, problem: Problem) -> Attention:
    """That of cuDNN."""
    k, v = _repeated(inputs, problem)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        inputs.q,
        k,
        v,
        additive(inputs, problem),
        True,
        0.0,
        problem.causal == "top-left",
        False,
        scale=problem.softmax_scale,
    )
    lse = lse.squeeze(-1) if lse.dim() == 4 else lse
    return Attention(out=out, lse=lse[..., : problem.seqlen_q])


def math_attention(inputs: Inputs, problem: Problem) -> Attention:
    """The math implementation, which has no LSE."""
    k, v = _repeated(inputs, problem)
    out, _ = torch.ops.aten._scaled_dot_product_attention_math(
        inputs.q,
        k,
        v,
        additive(inputs, problem),
        0.0,
        problem.causal == "top-left",
        scale=problem.softmax_scale,
    )
    return Attention(out=out)


def additive(inputs: Inputs, problem: Problem) -> Tensor | None:
    """Mask and bias as one additive bias of full shape, in memory whose rows are aligned."""
    if inputs.mask is None and inputs.bias is None:
        return None
    shape = (problem.batch, problem.heads_q, problem.seqlen_q, problem.keys)
    bias = inputs.q.new_zeros(()) if inputs.bias is None else inputs.bias
    if inputs.mask is not None:
        bias = torch.where(inputs.mask, bias, -math.inf)
    aligned = inputs.q.new_zeros((*shape[:-1], -(-problem.keys // ALIGNMENT) * ALIGNMENT))
    aligned[..., : problem.keys] = bias
    return aligned[..., : problem.keys]


def _repeated(inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor]:
    """k and v with a head for each query head."""
    if problem.group == 1:
        return inputs.k, inputs.v
    return (
        inputs.k.repeat_interleave(problem.group, 1),
        inputs.v.repeat_interleave(problem.group, 1),
    )


def _padded(tensor: Tensor) -> Tensor:
    missing = -tensor.shape[-1] % HEAD_DIM_MULTIPLE
    return pad(tensor, (0, missing)) if missing else tensor
