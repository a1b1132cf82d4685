"""Rounding to tf32, and profiles as plain data."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_reference import EAGER, FLASH, FLASH_FP32_P, PROFILES, Precision, Problem
from attn_reference.rounding import Rounding, round_to_tf32


@settings(deadline=None)
@given(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100, allow_subnormal=False))
def test_tf32_is_the_nearest_with_ten_bits(x):
    rounded = round_to_tf32(torch.tensor([x])).item()
    assert abs(rounded - x) <= 2.0**-11 * abs(x)
    fraction, _ = torch.frexp(torch.tensor(rounded, dtype=torch.float64))
    assert (fraction * 2**11).item().is_integer()


def test_tf32_ties_go_to_even_and_the_rest_stays():
    x = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11, 0.0])
    assert round_to_tf32(x).tolist() == [1.0, 1 + 2.0**-9, -1.0, 0.0]
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(round_to_tf32(infinite), infinite)
    # The NaNs that rounding bits would turn into zero and infinity.
    nans = torch.tensor([-1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert round_to_tf32(nans).isnan().all()
    strided = torch.randn(4, 6).T
    assert torch.equal(round_to_tf32(strided), round_to_tf32(strided.contiguous()))


def test_unfused_means_scores_in_sixteen_bits():
    for precision, dtype, unfused in (
        (FLASH, "bf16", False),
        (EAGER, "bf16", True),
        (EAGER, "fp32", False),
        (EAGER, "fp64", False),
        (None, "bf16", False),
    ):
        assert Rounding(Problem(dtype=dtype), precision).unfused is unfused


def test_exact_is_fp64_and_keeps_everything():
    exact = Rounding(Problem(dtype="fp16"), None)
    x = torch.tensor([1 + 2.0**-40], dtype=torch.float64)
    assert exact.compute == exact.result == torch.float64
    assert torch.equal(exact.keep(x, "probabilities"), x)
    assert torch.equal(exact.store(x), x)


def test_a_profile_survives_json():
    for precision in PROFILES.values():
        assert Precision.from_dict(json.loads(json.dumps(precision.as_dict()))) == precision


def test_dtype_of_a_role():
    assert FLASH.dtype_of("probabilities", "bf16") == "bf16"
    assert FLASH_FP32_P.dtype_of("probabilities", "bf16") == "fp32"
    assert EAGER.dtype_of("scores", "fp16") == "fp16"
    assert FLASH.dtype_of("scores", "fp64") == "fp64"


def test_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"scores='fp8': accepted are input, fp64, fp32"):
        Precision(name="mine", scores="fp8")
