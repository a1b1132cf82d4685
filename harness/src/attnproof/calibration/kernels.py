"""The kernels of torch that the calibration measures, beside every target that can be named.

On CUDA these are the operators below ``scaled_dot_product_attention``, which return the LSE in the
same call, and FlexAttention, compiled for few problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import FLASH, FLASH_FP32_P, Precision
from attn_reference.problem import Problem

from ..backend import Backend, Capabilities
from ..backends import sdpa_operators as operators
from ..backends.flex import flex
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
    return Kernel(backend=load(TargetSpec(name), device), space=CUDA if device == "cuda" else CPU)


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
            operators.flash,
            replace(
                _PLAIN, features=_PLAIN.features - {"causal top-left"} | {"causal bottom-right"}
            ),
        ),
        _kernel(
            "sdpa-efficient",
            operators.efficient,
            replace(_MASKED, dtypes=("fp32", "fp16", "bf16")),
            cuda_efficient_precision(),
        ),
        _kernel("sdpa-cudnn", operators.cudnn, _PLAIN),
        _kernel(
            "sdpa-math",
            operators.math_attention,
            replace(_MASKED, dtypes=("fp32", "fp16", "bf16"), returns_lse=False),
            FLASH_FP32_P,
        ),
        _kernel(
            "flex",
            flex.call,
            replace(_PLAIN, features=_PLAIN.features | {"softcap"}),
            flex.precision("cuda"),
            space=COMPILED,
        ),
    )
)
