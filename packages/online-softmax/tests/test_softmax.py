"""Softmax in four ways: the same answer, the passes that each is said to make, and where the
naive one ends."""

from __future__ import annotations

import functools
import math
from collections import Counter

import pytest
import torch
from softmax_laws import Keys, allowed

from online_softmax.arithmetic import E
from online_softmax.softmax import (
    blockwise_online_softmax,
    naive_softmax,
    online_softmax,
    safe_softmax,
)

SAFE = [safe_softmax, online_softmax, blockwise_online_softmax]
EVERY = [naive_softmax, *SAFE]
every = pytest.mark.parametrize("softmax", EVERY, ids=lambda f: f.__name__)
safe = pytest.mark.parametrize("softmax", SAFE, ids=lambda f: f.__name__)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def error_allowed(x: torch.Tensor) -> torch.Tensor:
    """Of exp(x_j - m) / d in the dtype of x, a merge for each key: see softmax_laws."""
    u, n = torch.finfo(x.dtype).eps / 2, x.shape[-1]
    d_error = allowed(Keys(scores=x, values=x.new_zeros(n, 1), base=E), merges=n).d
    exact = torch.softmax(x.double(), -1)
    d = exact.amax(-1).reciprocal()
    distance = (x.double().amax(-1, keepdim=True) - x.double()).masked_fill(exact == 0, 0.0)
    # x - m, exp (1 ulp), the quotient; then the denominator.
    relative = torch.expm1(u * (distance + 4)) + (d_error / (d - d_error))[:, None]
    return exact * relative * (1 + relative) + 2 * torch.finfo(x.dtype).tiny


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_it_is_softmax(softmax, dtype):
    x = normal(5, 37).to(dtype) * 2
    found = softmax(x)
    assert found.dtype == dtype
    error = (found.double() - torch.softmax(x.double(), -1)).abs()
    # The naive one takes exp of x itself: arguments are as large as x, not as x - m.
    budget = error_allowed(x) if softmax is not naive_softmax else 2 * error_allowed(x)
    assert (error <= budget).all(), (error / budget).max()


@every
def test_leading_dimensions(softmax):
    x = normal(2, 3, 11)
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("dtype", "last", "first", "whole"),
    [(torch.float32, 88.72, 88.73, 89.0), (torch.float16, 11.0859375, 11.09375, 12.0)],
    ids=str,
)
def test_where_the_naive_one_overflows(dtype, last, first, whole):
    """exp(x) leaves fp32 beyond ln(2^128) = 88.7228, and fp16 beyond ln(65520) = 11.0901."""

    def of(score: float) -> torch.Tensor:
        return torch.tensor([[score]], dtype=dtype)

    assert naive_softmax(of(last)).item() == 1
    assert naive_softmax(of(whole - 1)).item() == 1
    for overflowing in (first, whole):
        assert naive_softmax(of(overflowing)).isnan().all()  # inf / inf
        for softmax in SAFE:
            assert softmax(of(overflowing)).item() == 1


def test_the_naive_one_overflows_earlier_in_the_sum_and_underflows():
    x = torch.full((1, 3), 88.0)  # each exponential is a number, their sum is not
    assert (naive_softmax(x) == 0).all()
    assert naive_softmax(torch.full((1, 3), -105.0)).isnan().all()  # 0 / 0
    for softmax in SAFE:
        for row in (x, torch.full((1, 3), -105.0)):
            torch.testing.assert_close(softmax(row), torch.full((1, 3), 1 / 3))


@safe
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_huge_and_tiny_scores(softmax, dtype):
    x = torch.tensor(
        [
            [6e4, -6e4, 6e4, -math.inf],
            [-6e4, -6e4, -6e4, -6e4],
            [1e-30, -1e-30, 1e-45, 0.0],
            [-6e4, 0.0, 6e4, -math.inf],
        ]
    ).to(dtype)
    expected = torch.softmax(x.double(), -1)
    found = softmax(x).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


@safe
def test_rows_that_see_nothing(softmax):
    x = normal(3, 9)
    x[1] = -math.inf
    x[2, :5] = -math.inf
    found = softmax(x)
    assert (found[1] == 0).all()
    assert (found[2, :5] == 0).all()
    torch.testing.assert_close(found[2], torch.softmax(x[2], -1), rtol=1e-14, atol=0)


@every
def test_rows_of_no_key_and_no_rows(softmax):
    assert softmax(torch.empty(3, 0)).shape == (3, 0)
    assert softmax(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("block", [1, 2, 7, 16, 36, 37, 38, 1000])
def test_the_size_of_blocks_does_not_matter(block):
    x = normal(4, 37) * 5
    x[3, :20] = -math.inf
    found = blockwise_online_softmax(x, block)
    torch.testing.assert_close(found, torch.softmax(x, -1), rtol=1e-13, atol=0)


class Read(torch.Tensor):
    """A tensor that notes which columns are taken from it; what comes of it is plain."""

    columns: Counter[int]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and isinstance(args[0], cls):
            column = args[1][-1]
            count = args[0].shape[-1]
            taken = range(count)[column] if isinstance(column, slice) else [range(count)[column]]
            args[0].columns.update(taken)
        elif function.__name__ not in {"__get__", "new_zeros", "new_full", "empty_like"}:
            raise AssertionError(f"{function.__name__} of the whole of x is not counted")
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return result.as_subclass(torch.Tensor) if isinstance(result, cls) else result


@pytest.mark.parametrize(
    ("softmax", "passes"),
    [
        (naive_softmax, 2),
        (safe_softmax, 3),
        (online_softmax, 2),
        (blockwise_online_softmax, 2),
        (functools.partial(blockwise_online_softmax, block=5), 2),
    ],
)
def test_passes(softmax, passes):
    x = normal(2, 23).as_subclass(Read)
    x.columns = Counter()
    found = softmax(x)
    assert type(found) is torch.Tensor
    assert x.columns == Counter(dict.fromkeys(range(23), passes))
