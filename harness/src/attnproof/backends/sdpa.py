"""torch's ``scaled_dot_product_attention`` on CPU: as torch dispatches it, and each of the two
implementations that torch has there, forced.

What is declared was tried with torch 2.13 on x86. The public dispatch sends dropout, a
gradient of the bias, head_dim_v != head_dim and empty inputs to the math implementation, and
everything else to the flash kernel; forced, the flash kernel refuses those.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attn_reference.inputs import Attention, Inputs
from attn_reference.problem import Problem

from ..precision import cpu_flash_precision, cpu_math_precision
from ..signatures import sdpa as signature
from ..signatures.common import FunctionBackend
from ..signatures.keep_mask import with_keep_mask

_dispatched = partial(signature.call, scaled_dot_product_attention, signature.CONTRACT)


def _forced(kernel: SDPBackend, inputs: Inputs, problem: Problem) -> Attention:
    """Attention by that implementation; NotImplementedError when torch has no kernel for it."""
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(kernel):
        warnings.simplefilter("always")
        try:
            return _dispatched(inputs, problem)
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
    # torch says why in warnings.
    reasons = [str(warning.message).partition(" (Triggered")[0] for warning in said]
    raise NotImplementedError(f"torch has no kernel for this: {' '.join(reasons)}")


def _flash(inputs: Inputs, problem: Problem) -> Attention:
    """The flash kernel; its LSE comes from the operator below the public function, which does
    not check what the public function checks, and is not differentiable."""
    result = _forced(SDPBackend.FLASH_ATTENTION, inputs, problem)
    mask = signature.attention_mask(inputs)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=inputs.q.dtype).masked_fill(~mask, -math.inf)
    with torch.no_grad():
        _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            inputs.q,
            inputs.k,
            inputs.v,
            is_causal=problem.causal == "top-left",
            attn_mask=mask,
            scale=problem.scale,
        )
    return replace(result, lse=lse)


_CPU = replace(signature.capabilities_of(signature.CONTRACT), devices=("cpu",))

sdpa = FunctionBackend(
    name="sdpa",
    capabilities=_CPU,
    call=partial(with_keep_mask, _dispatched),
    declared=cpu_flash_precision(),
)

sdpa_flash = FunctionBackend(
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
    call=_flash,
    declared=cpu_flash_precision(),
)

sdpa_math = FunctionBackend(
    name="sdpa-math",
    capabilities=_CPU,
    call=partial(with_keep_mask, partial(_forced, SDPBackend.MATH)),
    declared=cpu_math_precision(),
)
