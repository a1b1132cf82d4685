import numpy as np
import pytest
import torch

from triton_attention.interpreter.short_floats import (
    double_to_bfloat16,
    from_bfloat16,
    to_bfloat16,
    to_tf32,
)


@pytest.fixture(autouse=True)
def _silent():
    with np.errstate(all="ignore"):  # as in kernels
        yield


ALL = np.arange(2**16, dtype=np.uint16)


def as_torch(bits):
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def test_bfloat16_to_float32_is_exact():
    expected = as_torch(ALL).float().numpy()
    np.testing.assert_array_equal(from_bfloat16(ALL).view(np.uint32), expected.view(np.uint32))


def test_there_and_back_changes_nothing_but_the_payload_of_nan():
    back = to_bfloat16(from_bfloat16(ALL))
    nan = np.isnan(from_bfloat16(ALL))
    np.testing.assert_array_equal(back[~nan], ALL[~nan])
    assert np.isnan(from_bfloat16(back[nan])).all()


def float32_around_every_bfloat16():
    """Each number of bf16 with lower halves that are 0, below, at and above a tie, and all ones."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return ((ALL.astype(np.uint32) << 16)[:, None] | lower).view(np.float32).ravel()


def random_float32():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    return bits.view(np.float32)  # of all exponents: subnormals, infinities and NaN too


@pytest.mark.parametrize("values", [float32_around_every_bfloat16(), random_float32()])
def test_float32_to_bfloat16_rounds_as_torch_does(values):
    found = from_bfloat16(to_bfloat16(values))
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(found, expected)
    assert np.isinf(found).sum() > np.isinf(values).sum()  # some overflow


def test_float64_to_bfloat16_rounds_once():
    one, step = 1.0, 2.0**-7
    tie = one + step / 2
    above, below = tie + 2.0**-40, tie - 2.0**-40  # ties, once they are fp32
    values = np.array([tie, above, below, -above, 1e300, -1e300, 1e-300, np.inf, np.nan, 2**-149])
    found = from_bfloat16(double_to_bfloat16(values)).astype(np.float64)
    expected = [one, one + step, one, -one - step, np.inf, -np.inf, 0, np.inf, np.nan, 0]
    np.testing.assert_array_equal(found, expected)


def test_float64_to_bfloat16_agrees_with_float32():
    values = random_float32()
    np.testing.assert_array_equal(
        double_to_bfloat16(values.astype(np.float64))[~np.isnan(values)],
        to_bfloat16(values)[~np.isnan(values)],
    )


def test_tf32_keeps_ten_bits_of_mantissa():
    step = 2.0**-10
    values = [1 + step, 1 + step / 2, 1 + step / 2.001, -1 - step / 2, 3.5, np.inf, np.nan]
    expected = [1 + step, 1 + step, 1, -1 - step, 3.5, np.inf, np.nan]
    found = to_tf32(np.array(values, np.float32))
    np.testing.assert_array_equal(found, np.array(expected, np.float32))
    last_nan = np.array([2**31 - 1], np.uint32).view(np.float32)
    assert np.isnan(to_tf32(last_nan))
