"""The statistics: limits that fit the number of elements, and what they see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnproof.budget.expected import Expected
from attnproof.judge.statistics import (
    INFLATION,
    Statistic,
    largest_normal,
    root_mean_square,
    statistics,
)


def expected(rows: int, width: int, freedom: float | None = None) -> Expected:
    value = torch.zeros(1, 1, rows, width, dtype=torch.float64)
    none = torch.zeros_like(value, dtype=torch.bool)
    return Expected(
        value=value,
        bound=torch.full_like(value, 100.0),
        zero=none,
        exact=none,
        dtype=torch.float32,
        sigma=torch.ones_like(value),
        freedom=torch.full(value.shape[:-1], float(width if freedom is None else freedom)).double(),
    )


def by_name(found: list[Statistic]) -> dict[str, Statistic]:
    return {statistic.name: statistic for statistic in found}


@pytest.mark.parametrize(
    ("freedom", "chance", "quantile"),  # upper quantiles of chi-square, from tables
    [
        (10, 0.01, 23.209),
        (30, 0.001, 59.703),
        (100, 1e-4, 161.319),
        (64, 1e-6, 130.59),
    ],
)
def test_the_quantile_of_wilson_and_hilferty(freedom: int, chance: float, quantile: float) -> None:
    found = root_mean_square(torch.tensor([float(freedom)]), chance).item()
    assert found == pytest.approx(math.sqrt(quantile / freedom), rel=0.01)


def test_for_few_degrees_of_freedom_it_errs_upwards() -> None:
    # Chi-square with 2 degrees of freedom is exponential: its quantile is -2 ln(chance).
    exact = math.sqrt(-2 * math.log(1e-9) / 2)
    assert exact < root_mean_square(torch.tensor([2.0]), 1e-9).item() < 1.2 * exact


def test_the_largest_of_many() -> None:
    assert largest_normal(1) == pytest.approx(5.327, abs=0.01)  # two-sided, 1e-7
    assert largest_normal(10**6) > largest_normal(10**3)


def test_limits_shrink_with_width_and_grow_with_rows() -> None:
    def limit(rows: int, width: int) -> float:
        found = statistics(expected(rows, width), torch.randn(1, 1, rows, width))
        return by_name(found)["z_row"].limit

    assert limit(64, 128) < limit(64, 16)
    assert limit(64, 64) < limit(4096, 64)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (7, 16), (64, 64), (500, 128)])
def test_chance_alone_is_not_accused(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        actual = torch.randn(1, 1, rows, width, generator=generator)
        assert all(s.ratio < 1 for s in statistics(expected(rows, width), actual))


def test_one_narrow_row_is_given_more_room_than_a_fixed_limit() -> None:
    """z_global 1.25 for everyone accuses one correct output of head_dim 8 in thirty."""
    found = by_name(statistics(expected(1, 8), torch.randn(1, 1, 1, 8)))
    assert found["z_global"].limit > 2
    many = by_name(statistics(expected(512, 64), torch.randn(1, 1, 512, 64)))
    assert many["z_global"].limit < 1.03 * INFLATION


def test_a_small_error_spread_over_a_row_is_seen() -> None:
    actual = torch.randn(1, 1, 100, 64, generator=torch.Generator().manual_seed(1))
    actual[0, 0, 42] *= 2.3  # no element is out of the ordinary
    found = by_name(statistics(expected(100, 64), actual))
    assert found["z_row"].ratio > 1
    assert found["z_row"].index == (0, 0, 42)
    assert found["z_max"].ratio < 1


def test_a_small_error_spread_over_everything_is_seen() -> None:
    actual = 1.2 * torch.randn(1, 1, 500, 64, generator=torch.Generator().manual_seed(1))
    found = by_name(statistics(expected(500, 64), actual))
    assert found["z_global"].ratio > 1
    assert found["z_row"].ratio < 1


def test_one_element_is_seen() -> None:
    actual = torch.randn(1, 1, 100, 64, generator=torch.Generator().manual_seed(1))
    actual[0, 0, 7, 9] = 9.0
    found = by_name(statistics(expected(100, 64), actual))
    assert found["z_max"].ratio > 1
    assert found["z_max"].index == (0, 0, 7, 9)


def test_few_independent_roundings_widen_the_limit_of_a_row() -> None:
    """Where one key carries a row, its one rounding error scales the whole row."""
    actual = torch.randn(1, 1, 100, 64, generator=torch.Generator().manual_seed(1))
    actual[0, 0, 3] *= 2.3
    assert by_name(statistics(expected(100, 64), actual))["z_row"].ratio > 1
    assert by_name(statistics(expected(100, 64, freedom=2.0), actual))["z_row"].ratio < 1


@pytest.mark.parametrize("what", ["sigma", "rows", "freedom", "nan"])
def test_nothing_is_said_where_nothing_is_known(what: str) -> None:
    wanted = expected(0 if what == "rows" else 4, 8, freedom=0.0 if what == "freedom" else None)
    actual: Tensor = torch.zeros_like(wanted.value)
    if what == "sigma":
        wanted.sigma = None
    if what == "nan":
        actual += torch.nan
    assert statistics(wanted, actual) == []


def test_rows_that_are_not_judged_do_not_count() -> None:
    wanted = expected(4, 8)
    wanted.bound[0, 0, 2] = torch.inf
    actual = torch.zeros_like(wanted.value)
    actual[0, 0, 2] = 50.0
    assert all(s.value == 0 for s in statistics(wanted, actual))
