"""torch's ``scaled_dot_product_attention``: as torch dispatches it, and each of its
implementations, forced.

What is declared of the CPU was tried with torch 2.13 on x86. The public dispatch sends dropout, a
gradient of the bias, head_dim_v != head_dim and empty inputs to the math implementation, and
everything else to the flash kernel; forced, the flash kernel refuses those.

What is declared of CUDA is what its kernels take on some GPU (sdp_utils.cpp); what they refuse
besides, torch says itself: a square of queries and keys for a causal flash kernel, head
dimensions, alignment, a dropout of so many sixteenths for cuDNN.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import FLASH, FLASH_FP32_P
from attn_reference.problem import Problem

from ..precision import cpu_flash_precision, cpu_math_precision, cuda_efficient_precision
from ..requirement import Requirement
from ..signatures import sdpa as signature
from ..signatures.common import FunctionBackend
from ..signatures.keep_mask import with_keep_mask
from . import sdpa_operators as operators
from .by_device import ByDevice

Call = Callable[[Inputs, Problem], Attention]

_dispatched = partial(signature.call, scaled_dot_product_attention, signature.CONTRACT)
_prepared = partial(signature.prepare, scaled_dot_product_attention, signature.CONTRACT)


def _forced(kernel: SDPBackend, inputs: Inputs, problem: Problem) -> Attention:
    """Attention by that implementation; NotImplementedError when torch has no kernel for it."""
    return _forced_call(kernel, _prepared(inputs, problem))


def _prepare_forced(
    kernel: SDPBackend, inputs: Inputs, problem: Problem
) -> Callable[[], Attention]:
    """The public function with that implementation, without the LSE of ``_with_lse``."""
    return partial(_forced_call, kernel, _prepared(inputs, problem))


def _forced_call(kernel: SDPBackend, call: Callable[[], Attention]) -> Attention:
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(kernel):
        warnings.simplefilter("always")
        try:
            return call()
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
    # torch says why in warnings.
    reasons = [str(warning.message).partition(" (Triggered")[0] for warning in said]
    raise NotImplementedError(f"torch has no kernel for this: {' '.join(reasons)}")


def _with_lse(kernel: SDPBackend, operator: Call, inputs: Inputs, problem: Problem) -> Attention:
    """Attention by that implementation, and its LSE from the operator below the public function,
    which does not check what the public function checks, and is not differentiable."""
    result = with_keep_mask(partial(_forced, kernel), inputs, problem)
    with torch.no_grad():
        return replace(result, lse=operator(inputs, problem).lse)


def _flash_on_cpu(inputs: Inputs, problem: Problem) -> Attention:
    mask = signature.attention_mask(inputs)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=inputs.q.dtype).masked_fill(~mask, -math.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        inputs.q,
        inputs.k,
        inputs.v,
        is_causal=problem.causal == "top-left",
        attn_mask=mask,
        scale=problem.scale,
    )
    return Attention(out=out, lse=lse)


_CONTRACT = signature.capabilities_of(signature.CONTRACT)
_CPU = replace(_CONTRACT, devices=("cpu",))
_CUDA = replace(_CONTRACT, devices=("cuda",))
# check_sm_version in sdp_utils.cpp
_AMPERE = Requirement(who="this kernel of torch", arch_min="sm_80")
_math = partial(with_keep_mask, partial(_forced, SDPBackend.MATH))

sdpa = ByDevice(
    cpu=FunctionBackend(
        name="sdpa",
        capabilities=_CPU,
        call=partial(with_keep_mask, _dispatched),
        prepared=_prepared,
        declared=cpu_flash_precision(),
    ),
    cuda=FunctionBackend(
        name="sdpa",
        capabilities=_CUDA,
        call=partial(with_keep_mask, _dispatched),
        prepared=_prepared,
        declared=cuda_efficient_precision(),
    ),
)

sdpa_flash = ByDevice(
    cpu=FunctionBackend(
        name="sdpa-flash",
        capabilities=replace(
            _CPU,
            features=_CPU.features - {"dropout", "head_dim_v"},
            gradients=("q", "k", "v"),
            keep_mask=False,
            returns_lse=True,
            empty_row_lse=0.0,
            empty_inputs=False,
        ),
        call=partial(_with_lse, SDPBackend.FLASH_ATTENTION, _flash_on_cpu),
        prepared=partial(_prepare_forced, SDPBackend.FLASH_ATTENTION),
        declared=cpu_flash_precision(),
    ),
    cuda=FunctionBackend(
        name="sdpa-flash",
        capabilities=replace(
            _CUDA,
            dtypes=("fp16", "bf16"),
            features=_CUDA.features - {"boolean mask", "bias", "head_dim_v"},
            gradients=("q", "k", "v"),
            head_dim_max=256,
            returns_lse=True,
            empty_inputs=False,
        ),
        call=partial(_with_lse, SDPBackend.FLASH_ATTENTION, operators.flash),
        prepared=partial(_prepare_forced, SDPBackend.FLASH_ATTENTION),
        declared=FLASH,
        requirement=_AMPERE,
    ),
)

sdpa_efficient = FunctionBackend(
    name="sdpa-efficient",
    capabilities=replace(
        _CUDA,
        head_dim_multiple=4,
        returns_lse=True,
        empty_row_lse=0.0,  # kernel_forward.h: "log(1) = 0"
        empty_inputs=False,
    ),
    call=partial(_with_lse, SDPBackend.EFFICIENT_ATTENTION, operators.efficient),
    prepared=partial(_prepare_forced, SDPBackend.EFFICIENT_ATTENTION),
    declared=cuda_efficient_precision(),
    requirement=Requirement(who="this kernel of torch", dtypes=(("bf16", "sm_80"),)),
)

sdpa_cudnn = FunctionBackend(
    name="sdpa-cudnn",
    capabilities=replace(
        _CUDA,
        dtypes=("fp16", "bf16"),
        gradients=("q", "k", "v"),
        head_dim_max=256,
        head_dim_multiple=8,
        returns_lse=True,
        empty_inputs=False,
    ),
    call=partial(_with_lse, SDPBackend.CUDNN_ATTENTION, operators.cudnn),
    prepared=partial(_prepare_forced, SDPBackend.CUDNN_ATTENTION),
    declared=FLASH,
    requirement=_AMPERE,
)

sdpa_math = ByDevice(
    cpu=FunctionBackend(
        name="sdpa-math",
        capabilities=_CPU,
        call=_math,
        declared=cpu_math_precision(),
        prepared=partial(_prepare_forced, SDPBackend.MATH),
    ),
    cuda=FunctionBackend(
        name="sdpa-math",
        capabilities=_CUDA,
        call=_math,
        declared=FLASH_FP32_P,
        prepared=partial(_prepare_forced, SDPBackend.MATH),
    ),
)
