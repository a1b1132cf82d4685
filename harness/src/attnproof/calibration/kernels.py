"""The kernels of torch that the calibration measures, beside every target that can be named.

On CUDA these call the operators below ``scaled_dot_product_attention``, which also return the
LSE, and FlexAttention, which has a softcap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import FLASH, FLASH_FP32_P, Precision
from attn_reference.problem import Problem

from ..backend import Backend, Capabilities
from ..precision import cuda_efficient_precision
from ..signatures.common import FunctionBackend
from ..targets import TargetSpec, load
from .problems import COMPILED, CPU, CUDA, Space


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A backend to calibrate, and the problems to draw for it."""

    backend: Backend
    space: Space
    empty_rows: bool = True  # whether it is known what it gives for rows without a key


def kernel(name: str, device: str) -> Kernel:
    """The kernel of that name on that device: one of CUDA_KERNELS, or any target.

    Raises LoadError when a target cannot be loaded.
    """
    if device == "cuda" and name in CUDA_KERNELS:
        return CUDA_KERNELS[name]
    return Kernel(backend=load(TargetSpec(name)), space=CUDA if device == "cuda" else CPU)


def _repeated(inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor]:
    """k and v with a head for each query head."""
    if problem.group == 1:
        return inputs.k, inputs.v
    return (
        inputs.k.repeat_interleave(problem.group, 1),
        inputs.v.repeat_interleave(problem.group, 1),
    )


def _additive(inputs: Inputs, problem: Problem) -> Tensor | None:
    """Mask and bias as one additive bias of full shape, in memory whose rows are aligned."""
    if inputs.mask is None and inputs.bias is None:
        return None
    shape = (problem.batch, problem.heads_q, problem.seqlen_q, problem.keys)
    bias = inputs.q.new_zeros(()) if inputs.bias is None else inputs.bias
    if inputs.mask is not None:
        bias = bias.masked_fill(~inputs.mask, -math.inf) if bias.dim() else torch.where(
            inputs.mask, bias, torch.full_like(bias, -math.inf)
        )  # fmt: skip
    aligned = inputs.q.new_zeros((*shape[:-1], -(-problem.keys // 16) * 16))
    aligned[..., : problem.keys] = bias
    return aligned[..., : problem.keys]


def _flash(inputs: Inputs, problem: Problem) -> Attention:
    k, v = _repeated(inputs, problem)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        inputs.q, k, v, 0.0, problem.causal == "bottom-right", False, scale=problem.softmax_scale
    )
    return Attention(out=out, lse=lse[..., : problem.seqlen_q])


def _efficient(inputs: Inputs, problem: Problem) -> Attention:
    k, v = _repeated(inputs, problem)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        inputs.q,
        k,
        v,
        _additive(inputs, problem),
        True,
        0.0,
        problem.causal == "top-left",
        scale=problem.softmax_scale,
    )
    return Attention(out=out, lse=lse[..., : problem.seqlen_q])


def _cudnn(inputs: Inputs, problem: Problem) -> Attention:
    k, v = _repeated(inputs, problem)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        inputs.q,
        k,
        v,
        _additive(inputs, problem),
        True,
        0.0,
        problem.causal == "top-left",
        False,
        scale=problem.softmax_scale,
    )
    lse = lse.squeeze(-1) if lse.dim() == 4 else lse
    return Attention(out=out, lse=lse[..., : problem.seqlen_q])


def _math(inputs: Inputs, problem: Problem) -> Attention:
    k, v = _repeated(inputs, problem)
    out, _ = torch.ops.aten._scaled_dot_product_attention_math(
        inputs.q,
        k,
        v,
        _additive(inputs, problem),
        0.0,
        problem.causal == "top-left",
        scale=problem.softmax_scale,
    )
    return Attention(out=out)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = 256
    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(len_q: int, len_k: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    return create_block_mask(seen, None, None, len_q, len_k, device=device)


@cache
def _softcap(device: str) -> tuple[Callable[..., Tensor], Tensor]:
    cap = torch.ones((), device=device)  # one tensor, filled anew: no compilation for each value

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped, cap


def _flex(inputs: Inputs, problem: Problem) -> Attention:
    device = str(inputs.q.device)
    capped, cap = _softcap(device)
    cap.fill_(problem.softcap or 1.0)
    out, lse = _compiled_flex()(
        inputs.q,
        inputs.k,
        inputs.v,
        score_mod=capped if problem.softcap else None,
        block_mask=(
            _block_mask(problem.seqlen_q, problem.keys, device)
            if problem.causal == "top-left"
            else None
        ),
        scale=problem.softmax_scale,
        enable_gqa=problem.group > 1,
        return_lse=True,
    )
    return Attention(out=out, lse=lse)


_PLAIN = Capabilities(
    dtypes=("fp16", "bf16"),
    devices=("cuda",),
    features=frozenset({"causal top-left", "scale", "gqa"}),
    gradients=("q", "k", "v"),
    head_dim_max=256,
    head_dim_multiple=8,
    returns_lse=True,
    empty_inputs=False,
    excludes=(("causal top-left", "boolean mask"), ("causal top-left", "bias")),
)
_MASKED = replace(_PLAIN, features=_PLAIN.features | {"boolean mask", "bias"})


def _kernel(
    name: str,
    call: Callable[[Inputs, Problem], Attention],
    capabilities: Capabilities,
    precision: Precision = FLASH,
    space: Space = CUDA,
) -> tuple[str, Kernel]:
    backend = FunctionBackend(name=name, capabilities=capabilities, call=call, declared=precision)
    return name, Kernel(backend=backend, space=space, empty_rows=False)


CUDA_KERNELS: dict[str, Kernel] = dict(
    (
        # The operator aligns causality as flash_attn does; SDPA calls it for square problems only.
        _kernel(
            "sdpa-flash",
            _flash,
            replace(
                _PLAIN, features=_PLAIN.features - {"causal top-left"} | {"causal bottom-right"}
            ),
        ),
        _kernel(
            "sdpa-efficient",
            _efficient,
            replace(_MASKED, dtypes=("fp32", "fp16", "bf16")),
            cuda_efficient_precision(),
        ),
        _kernel("sdpa-cudnn", _cudnn, _PLAIN),
        _kernel(
            "sdpa-math",
            _math,
            replace(_MASKED, dtypes=("fp32", "fp16", "bf16"), returns_lse=False),
            FLASH_FP32_P,
        ),
        _kernel(
            "flex",
            _flex,
            replace(_PLAIN, features=_PLAIN.features | {"softcap"}),
            space=COMPILED,
        ),
    )
)
