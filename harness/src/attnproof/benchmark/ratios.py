"""How many times as fast as a baseline, cell by cell, and on the geometric mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from .measurement import Ended, Measurement
from .suites import Cell

ByCell = Mapping[str, Mapping[str, Measurement]]  # name of a cell -> target -> measurement


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Of one target to the baseline, by the name of the cell: above 1 it is faster."""

    by_cell: Mapping[str, float]

    @property
    def mean(self) -> float | None:
        """The geometric mean; None without a cell that both were measured in."""
        return geometric_mean(self.by_cell.values()) if self.by_cell else None

    @property
    def smallest(self) -> str | None:
        """The name of the cell where it does worst."""
        return min(self.by_cell, key=lambda name: self.by_cell[name], default=None)


def ratios(found: ByCell, target: str, baseline: str) -> Ratios:
    """Median time of the baseline over that of the target, where both were measured."""
    by_cell = {}
    for name, row in found.items():
        one, other = row.get(target), row.get(baseline)
        if one and other and one.ended is other.ended is Ended.MEASURED:
            by_cell[name] = other.typical / one.typical
    return Ratios(by_cell=by_cell)


def kind(cell: Cell) -> str:
    """What is compared together: cells of one suite and direction, in one unit."""
    return f"{cell.suite} {cell.direction}, {cell.problem.dtype}, {cell.unit}"


def by_kind(measurements: Sequence[Measurement]) -> dict[str, dict[str, dict[str, Measurement]]]:
    """Measurements by kind, cell and target, in their order."""
    found: dict[str, dict[str, dict[str, Measurement]]] = {}
    for one in measurements:
        cells = found.setdefault(kind(one.cell), {})
        cells.setdefault(one.cell.name, {})[one.target] = one
    return found
