"""What came of one target in one cell: times, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any, Self

from .suites import Cell


class Ended(StrEnum):
    """How a measurement ended. Only MEASURED has times to show."""

    MEASURED = "measured"
    UNSUPPORTED = "unsupported"
    UNAVAILABLE = "unavailable"
    DEVIATES = "deviates"  # a timed call returned something that is not attention
    TOO_FAST = "too fast"  # faster than the device can be
    CRASHED = "crashed"
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"
    SKIPPED = "skipped"  # it timed out on less


FAILED = frozenset(
    {Ended.DEVIATES, Ended.TOO_FAST, Ended.CRASHED, Ended.TIMED_OUT, Ended.OUT_OF_MEMORY}
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One target in one cell. Rates are the work of a call over the median time."""

    cell: Cell
    target: str
    ended: Ended
    reason: str = ""
    seconds: tuple[float, ...] = ()  # of every timed call, or the mean of ``iterations``
    iterations: int = 1
    judged: int = 0  # calls whose results were judged
    sample: str = ""  # what of each of them
    notes: tuple[str, ...] = ()
    flops: float = 0.0  # of a call
    bytes: int = 0
    ceilings: Mapping[str, float] = field(default_factory=dict)  # matmul FLOP/s, memory bytes/s
    startup: Mapping[str, float] = field(default_factory=dict)  # seconds of import, first result

    @property
    def typical(self) -> float:
        """Seconds of a call: the median."""
        return median(self.seconds)

    @property
    def value(self) -> float:
        """In the unit of the cell: TFLOP/s, GB/s, or µs per call."""
        if self.cell.unit == "µs":
            return self.typical * 1e6
        amount = self.flops / 1e12 if self.cell.unit == "TFLOP/s" else self.bytes / 1e9
        return amount / self.typical

    @property
    def ceiling(self) -> float | None:
        """What the device reaches, in the unit of the cell; None where there is no such thing."""
        if self.cell.unit == "µs" or not self.ceilings:
            return None
        if self.cell.unit == "TFLOP/s":
            return self.ceilings["matmul"] / 1e12
        return self.ceilings["memory"] / 1e9

    @property
    def share(self) -> float | None:
        """Of the ceiling; None where there is none."""
        return None if self.ceiling is None else self.value / self.ceiling

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, without the times."""
        return {
            **self.cell.as_dict(),
            "target": self.target,
            "ended": str(self.ended),
            "reason": self.reason,
            "judged": self.judged,
            "sample": self.sample,
            "notes": list(self.notes),
            "flops": self.flops,
            "bytes": self.bytes,
            "ceilings": dict(self.ceilings),
            "startup": dict(self.startup),
        }

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], seconds: tuple[float, ...], iterations: int
    ) -> Self:
        """The inverse of ``as_dict``; KeyError or ValueError for other values."""
        names = ("suite", "direction", "problem", "clock")
        rest = {name: value for name, value in values.items() if name not in names}
        return cls(
            **{
                **rest,
                "cell": Cell.from_dict({name: values[name] for name in names}),
                "ended": Ended(values["ended"]),
                "notes": tuple(values["notes"]),
                "seconds": seconds,
                "iterations": iterations,
            }
        )
