"""Floats that numpy does not have, as numpy arrays: bf16 as its bits, and tf32 as fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def from_bfloat16(bits: Array) -> Array:
    """The fp32 numbers that bits of bf16 stand for: exact, as bf16 is the upper half of fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """The bits of the bf16 numbers nearest to fp32 ones, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    upper = bits >> np.uint32(16)
    # Half of the last place that stays, less one where that place is even: a carry rounds up, into
    # the exponent where need be.
    rounded = (bits + ((upper & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    nan = np.isnan(values)
    if nan.any():
        rounded = np.where(nan, upper | np.uint32(0x0040), rounded)  # its payload may be cut to 0
    return rounded.astype(np.uint16)


def double_to_bfloat16(values: Array) -> Array:
    """The same of fp64 numbers, rounded once: fp32 rounded to odd keeps on which side of a tie."""
    nearest = values.astype(np.float32)
    inexact = nearest.astype(np.float64) != values
    even = (nearest.view(np.uint32) & np.uint32(1)) == 0
    towards = np.where(values > nearest, np.inf, -np.inf).astype(np.float32)
    return to_bfloat16(np.where(inexact & even, np.nextafter(nearest, towards), nearest))


def to_tf32(values: Array) -> Array:
    """fp32 numbers with 10 bits of mantissa, ties away from zero, as cvt.rna.tf32 rounds."""
    rounded = (values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)
