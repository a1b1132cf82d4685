"""The verdict on one case: what was found, where, by how much."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a case ended. Only CONFORMS is a pass."""

    CONFORMS = "conforms"
    DEVIATES = "deviates"
    CRASHED = "crashed"
    TIMED_OUT = "timed out"
    UNSUPPORTED = "unsupported"
    UNAVAILABLE = "unavailable"
    VACUOUS = "vacuous"


NOT_JUDGED = frozenset({Status.UNSUPPORTED, Status.UNAVAILABLE, Status.VACUOUS})


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong with one tensor.

    rule: bound | row statistic | global statistic | max statistic | exact | structural zero |
    non-finite pattern | shape | dtype | missing | memory | state | ... (one or two words).
    worst is the error over its budget (1 is the limit); index is where, in the tensor.
    """

    tensor: str  # out, lse, dq, dk, dv, dbias, dsinks, or inputs
    rule: str
    message: str
    worst: float | None = None
    index: tuple[int, ...] | None = None
    count: int | None = None  # elements that break the rule
    elements: int | None = None  # elements there are


@dataclass(kw_only=True)
class Verdict:
    """The verdict on one case. ``worst`` is the largest error over budget, by tensor."""

    status: Status
    reason: str = ""
    findings: list[Finding] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)  # z_row, z_max, z_global
    looks_like: list[str] = field(default_factory=list)  # the diagnosis
    heat_map: str = ""  # plain text
    conforms_under: str | None = None  # a looser profile under which it would conform
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        values["status"] = str(self.status)
        return values


class NotConforming(Exception):
    """Raised by a check whose verdict is anything but CONFORMS; carries the verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(f"{verdict.status}: {verdict.reason}")
        self.verdict = verdict
