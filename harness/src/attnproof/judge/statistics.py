"""Statistics of the error of iid problems, and how large chance alone lets them become.

The bound sees a large error of one element; these see a small one spread over a row or over
everything. With z = error / sigma, they are the largest root mean square of a row (``z_row``),
the largest element (``z_max``) and the root mean square of everything (``z_global``).

Limits depend on how many numbers there are. A mean square of n independent errors follows
chi-square over n, whose quantile is that of Wilson and Hilferty (1931); where few keys carry
a row, few roundings are independent, and ``Expected.freedom`` says how many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ..budget.expected import Expected
from ..position import position

# Chance that an honest kernel exceeds one of the three limits on one problem.
FALSE_ALARM = 1e-7
# What honest kernels exceed the model by: the calibrated z are at most this times what chance
# allows (docs/calibration.md).
INFLATION = 1.1


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """One statistic, its limit for that number of elements and rows, and where it is largest."""

    name: str  # z_row, z_max or z_global
    rule: str  # of the finding that it makes
    value: float
    limit: float
    index: tuple[int, ...] | None  # the row or element; None for z_global

    @property
    def ratio(self) -> float:
        """Value over limit: above 1 is too much."""
        return self.value / self.limit


def statistics(expected: Expected, actual: Tensor) -> list[Statistic]:
    """z_row, z_max and z_global of out; empty without sigma, elements or finite errors.

    ``actual`` has the shape of ``expected.value``, (..., rows, elements).
    """
    if expected.sigma is None or expected.freedom is None or expected.value.numel() == 0:
        return []
    actual = actual.to(expected.value.device, torch.float64)
    z = (actual - expected.value) / expected.sigma.clamp_min(1e-300)
    usable = expected.judged.all(-1) & z.isfinite().all(-1) & (expected.freedom > 0)
    if not bool(usable.any()):
        return []
    count = int(usable.sum())
    mean_square = torch.where(usable, z.square().mean(-1), 0.0)
    row, row_limit, row_index = _largest_row(mean_square, expected.freedom, usable, count)
    single = torch.where(usable[..., None], z.abs(), 0.0)
    highest = single.flatten().argmax()
    overall = mean_square.sum() / count
    freedom = 1 / (1 / expected.freedom[usable]).mean() * count
    return [
        Statistic(name="z_row", rule="row statistic", value=row, limit=row_limit, index=row_index),
        Statistic(
            name="z_max",
            rule="max statistic",
            value=single.max().item(),
            limit=largest_normal(count * z.shape[-1]) * INFLATION,
            index=position(highest, single.shape),
        ),
        Statistic(
            name="z_global",
            rule="global statistic",
            value=math.sqrt(overall.item()),
            limit=root_mean_square(freedom.reshape(1), FALSE_ALARM).item() * INFLATION,
            index=None,
        ),
    ]


def root_mean_square(freedom: Tensor, chance: float) -> Tensor:
    """What the root mean square of ``freedom`` normal numbers exceeds with that chance.

    The square root of the chi-square quantile over its degrees of freedom, after Wilson and
    Hilferty; for few degrees it errs upwards.
    """
    spread = 2 / (9 * freedom)
    return (1 - spread + _normal_quantile(chance) * spread.sqrt()).pow(1.5)


def largest_normal(count: int) -> float:
    """What the largest of ``count`` absolute normal numbers exceeds with chance FALSE_ALARM."""
    return _normal_quantile(FALSE_ALARM / (2 * count))


def _normal_quantile(chance: float) -> float:
    """What a normal number exceeds with that chance."""
    return -NormalDist().inv_cdf(chance)


def _largest_row(
    mean_square: Tensor, freedom: Tensor, usable: Tensor, rows: int
) -> tuple[float, float, tuple[int, ...]]:
    """The row whose rms is largest against its own limit: rms, limit, index."""
    limit = root_mean_square(freedom.clamp_min(1e-3), FALSE_ALARM / rows) * INFLATION
    rms = mean_square.sqrt()
    worst = torch.where(usable, rms / limit, -1.0).flatten().argmax()
    return (
        rms.flatten()[worst].item(),
        limit.flatten()[worst].item(),
        position(worst, rms.shape),
    )
