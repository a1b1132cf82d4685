"""What is known of the precision of torch's own kernels, as measured: docs/calibration.md.

The profiles that a user can name are ``attn_reference.precision.PROFILES``; these are for the
backends that this package ships.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attn_reference.precision import EAGER, FLASH, FLASH_FP32_P, INPUT, Precision

# Relative error of the vectorised exponential (exp_u20) of the 16-bit CPU flash kernel.
EXP_U20_ERROR = 2.0**-13


def cpu_flash_precision() -> Precision:
    """torch's flash kernel on this CPU, with the instruction set that torch uses here.

    P is cast to the dtype of the inputs; with 16-bit inputs and AVX2 or AVX512 the exponential
    errs by up to 2^-13; the gradients are added up in their own dtype, over blocks of 32 query
    rows (64 from 192 rows on, 256 from 768 on) and 512 keys. Blocks of 32 cover all of them.
    """
    plain = torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    return replace(
        FLASH,
        name="torch-cpu-flash",
        accumulate_dq=INPUT,
        accumulate_dk=INPUT,
        accumulate_dv=INPUT,
        exp_error=0.0 if plain else EXP_U20_ERROR,
        flushes_subnormals=True,
    )


def cpu_math_precision() -> Precision:
    """torch's math implementation on CPU: everything in fp32, also with 16-bit inputs."""
    return replace(FLASH_FP32_P, name="torch-cpu-math", flushes_subnormals=True)


def cpu_eager_precision() -> Precision:
    """Unfused attention written in torch, on CPU: every step stored in the inputs' dtype."""
    return replace(EAGER, name="torch-cpu-eager", flushes_subnormals=True)


def cuda_efficient_precision() -> Precision:
    """torch's memory-efficient kernel on CUDA.

    Its backward forms dS from the P that it stored, in the dtype of the inputs, for dV
    (kernel_backward.h, "dSij = (dPij - Di) * Pij"). Dropout multiplies the tile of P in shared
    memory by 1 / (1 - p), both in that dtype: si *= static_cast<scalar_t>(dropout_scale * …) in
    kernel_forward.h, Zij in kernel_backward.h.
    """
    return replace(
        FLASH,
        name="torch-cuda-efficient",
        gradient_probabilities=INPUT,
        drops_stored_probabilities=True,
    )
