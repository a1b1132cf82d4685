"""What comparing and rewriting the checked-in truth says, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.table import Table

from ..report.summary import plural

Progress = Callable[[int, int], None]  # what is done, of how much


def no_progress(done: int, total: int) -> None:
    """For who does not follow it."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was found: sentences, or a table, and their number in words.

    ``reasons``: why something could not be compared here; ``compared``: whether anything could.
    """

    fails: bool
    summary: str = ""
    lines: list[str] = field(default_factory=list)
    table: Table | None = None
    reasons: list[str] = field(default_factory=list)
    compared: bool = True

    @classmethod
    def of(cls, differences: list[str]) -> Comparison:
        """Where every difference is a sentence, and fails."""
        number = plural(len(differences), "difference")
        return cls(fails=bool(differences), summary=number if differences else "", lines=differences)


@dataclass(frozen=True, kw_only=True)
class Update:
    """What an update did: a sentence for each file that was written or removed, and what else
    there is to say."""

    changed: list[str]
    notes: list[str]
    table: Table | None = None
