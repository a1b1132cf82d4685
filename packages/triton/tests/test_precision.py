"""What is declared of the kernels' exponential and tanh, measured on the device at hand."""

import pytest
import torch
import triton
import triton.language as tl

from triton_attention import interpreter
from triton_attention.attnproof_backend import TANH_ERROR
from triton_attention.kernels.scores import tanh
from triton_attention.launch import Launch

ROUNDING = 2.0**-24
FUNCTION_ERROR = 4 * ROUNDING  # what the error budget allows without a declaration


@triton.jit
def apply(values, results, count, function: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + place, mask=place < count, other=0.0)
    tl.store(results + place, function(x), mask=place < count)


@triton.jit
def exp2(x):
    return tl.exp2(x)


def error(function: object, reference: object, values: torch.Tensor, device: str) -> float:
    """The largest relative error over these fp32 values."""
    x = values.to(device)
    y = torch.empty_like(x)
    block = 1 << 14
    grid = (-(-x.numel() // block),)
    arguments = {"values": x, "results": y, "count": x.numel(), "function": function}
    Launch(kernel=apply, grid=grid, arguments=arguments | {"BLOCK": block}, options={}).run()
    expected = reference(values.double())
    return ((y.cpu().double() - expected) / expected).abs().max().item()


def magnitudes(low: float, high: float) -> torch.Tensor:
    """Both signs, evenly over the logarithm and evenly over the values."""
    even = torch.linspace(low, high, 200_001, dtype=torch.float64)
    spread = torch.logspace(
        torch.tensor(low).log10(), torch.tensor(high).log10(), 200_001, dtype=torch.float64
    )
    return torch.cat([even, -even, spread, -spread]).float()


def test_tanh(device):
    measured = error(tanh, torch.tanh, magnitudes(1e-30, 20.0), device)
    print(f"tanh on {device}: {measured / ROUNDING:.2f} * 2^-24")
    assert measured <= FUNCTION_ERROR + TANH_ERROR[device]
    assert measured > ROUNDING / 2  # it was computed in fp32


@pytest.mark.usefixtures("gpu")
def test_tanh_of_every_float_where_it_matters():
    """All floats from 2^-4 to 16: below, the polynomial is all but x; above, tanh is all but 1."""
    worst = 0.0
    for exponent in range(-4, 4):
        first, last = (
            torch.tensor(2.0**n).view(torch.int32).item() for n in (exponent, exponent + 1)
        )
        bits = torch.arange(first, last, dtype=torch.int32)
        worst = max(worst, error(tanh, torch.tanh, bits.view(torch.float32), "cuda"))
    print(f"tanh on cuda, every float: {worst / ROUNDING:.2f} * 2^-24")
    assert worst <= FUNCTION_ERROR + TANH_ERROR["cuda"]


def test_the_polynomial_of_tanh_is_needed(device):
    @triton.jit
    def without(x):
        powers = tl.exp2(tl.abs(x) * -2.8853900817779268)
        far = (1.0 - powers) / (1.0 + powers)
        return tl.where(x < 0, -far, far)

    assert error(without, torch.tanh, magnitudes(1e-4, 1.0), device) > 1e-4


def test_exp2(device):
    measured = error(exp2, torch.exp2, magnitudes(1e-6, 125.0), device)
    print(f"exp2 on {device}: {measured / ROUNDING:.2f} * 2^-24")
    assert ROUNDING / 2 < measured <= FUNCTION_ERROR


def test_tanh_at_its_ends(device):
    values = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    x = values.to(device)
    y = torch.empty_like(x)
    arguments = {"values": x, "results": y, "count": 7, "function": tanh, "BLOCK": 16}
    Launch(kernel=apply, grid=(1,), arguments=arguments, options={}).run()
    torch.testing.assert_close(y.cpu(), torch.tanh(values), rtol=0, atol=0, equal_nan=True)
    assert interpreter.enabled() is (device == "cpu")
