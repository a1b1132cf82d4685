"""What is known to deviate, and what a run makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ..verdict import Status


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One known deviation: which cases, how they end, why, and where that is proved."""

    cases: tuple[str, ...]  # patterns of case ids
    reason: str
    proof: str
    excepted: tuple[str, ...] = ()  # patterns of case ids that it is not about
    verdict: Status = Status.DEVIATES
    always: bool = True  # not: it depends on chance, or on what ran before in the same process
    source: str = ""  # file and entry

    def matches(self, case_id: str) -> bool:
        """Whether a pattern fits the whole id, and none of those excepted does."""
        if any(fnmatchcase(case_id, pattern) for pattern in self.excepted):
            return False
        return any(fnmatchcase(case_id, pattern) for pattern in self.cases)

    def __str__(self) -> str:
        return f"{', '.join(self.cases)}: {self.reason} ({self.proof})"


@dataclass(kw_only=True)
class Deviations:
    """The deviations that apply to a run. It remembers which cases they met."""

    entries: tuple[Deviation, ...] = ()
    _matched: set[Deviation] = field(default_factory=set, init=False)
    _conforming: dict[str, Deviation] = field(default_factory=dict, init=False)

    def match(self, case_id: str) -> Deviation | None:
        """The first deviation that is about a case of this run, or None."""
        return next(iter(self._all(case_id)), None)

    def _all(self, case_id: str) -> list[Deviation]:
        found = [entry for entry in self.entries if entry.matches(case_id)]
        self._matched.update(found)
        return found

    def observe(self, case_id: str, status: Status) -> Deviation | None:
        """The deviation that explains how this case ended; None when nothing does.

        A known deviation explains only the verdict that it names: a crash is not explained
        by a deviation. Of several about a case the first that names its verdict does.
        """
        found = self._all(case_id)
        expected = next((entry for entry in found if entry.always), None)
        if expected is not None and status is Status.CONFORMS:
            self._conforming[case_id] = expected
        return next((entry for entry in found if entry.verdict is status), None)

    def unmatched(self) -> list[Deviation]:
        """The deviations that no case of the run has met."""
        return [entry for entry in self.entries if entry not in self._matched]

    def conforming(self) -> dict[str, Deviation]:
        """The cases that were said to deviate, and conform."""
        return dict(self._conforming)

    def complaints(self, shipped: Callable[[], Iterable[str]] = tuple) -> list[str]:
        """What is out of date in the deviations file, a sentence each.

        An entry that matches one of the ``shipped`` ids is about cases that this run left out.
        """
        unmatched = self.unmatched()
        left_out = list(shipped()) if unmatched else []
        said = [
            f"{entry.source}: matches no case of this run: {entry}"
            for entry in unmatched
            if not any(entry.matches(case_id) for case_id in left_out)
        ]
        for case_id, entry in self._conforming.items():
            said.append(f"{entry.source}: {case_id} no longer deviates: {entry.reason}")
        return said
