"""What a run amounts to: a row per feature, a verdict in one line, an exit status."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

from ..record import CaseRecord
from ..verdict import NOT_JUDGED, Status
from .verdict_text import gist

FAILED = frozenset({Status.DEVIATES, Status.CRASHED, Status.TIMED_OUT})
SUSPECTS = 2  # mistakes named in the verdict line
LINE_FEATURES = 6  # features named in the verdict line
REASONS = 12  # why cases were not run that are told one by one
NOT_RUN = frozenset({Status.UNSUPPORTED, Status.UNAVAILABLE})


class Exit(IntEnum):
    """Exit status of the command line."""

    CONFORMS = 0
    DOES_NOT = 1
    USAGE = 2
    NOT_JUDGED = 3
    INTERRUPTED = 130


VERDICTS = {
    Exit.CONFORMS: "conforms",
    Exit.DOES_NOT: "does not conform",
    Exit.NOT_JUDGED: "could not be judged",
}


def exit_status(status: str) -> Exit:
    """The exit status for a single case that ended so."""
    if status in FAILED:
        return Exit.DOES_NOT
    return Exit.NOT_JUDGED if status in NOT_JUDGED else Exit.CONFORMS


@dataclass(frozen=True, kw_only=True)
class FeatureRow:
    """The cases of one feature by how they ended; ``known`` deviations do not count as failures."""

    feature: str
    cases: int
    conforms: int
    deviates: int
    crashed: int  # or timed out
    unsupported: int  # or unavailable
    vacuous: int
    known: int
    worst: float | None  # the largest error over budget of all judged cases
    seconds: float

    @property
    def failed(self) -> int:
        """Cases that do not conform, known deviations left out."""
        return self.deviates + self.crashed

    @property
    def not_shown(self) -> bool:
        """Nothing but vacuous cases: the feature was judged, and nothing shown."""
        return self.vacuous > 0 and not (self.conforms or self.failed or self.known)

    @property
    def judged(self) -> int:
        """Cases that showed something."""
        return self.conforms + self.failed + self.known


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The whole run."""

    rows: tuple[FeatureRow, ...]
    total: FeatureRow
    suspects: tuple[str, ...] = ()  # what failing cases look like, most frequent first
    reasons: tuple[str, ...] = ()  # why cases were not judged, most frequent first
    complaints: tuple[str, ...] = field(default=())  # what is out of date in the deviations file
    not_run: tuple[tuple[str, int], ...] = ()  # why cases were not run, and how many, most first
    unavailable: str | None = None  # why the target cannot run here, where nothing was asked of it
    skip_budget: int | None = None  # cases that may go without being run; None: any number

    @property
    def over_budget(self) -> str | None:
        """How many cases more than the skip budget allows were not run, in a sentence; None when
        it holds. A target that cannot run here is over every budget."""
        if self.skip_budget is None:
            return None
        allowed = f"the skip budget is {self.skip_budget}"
        if self.unavailable is not None:
            return f"nothing was run, and {allowed}: {self.unavailable}"
        if self.total.unsupported > self.skip_budget:
            return f"{plural(self.total.unsupported, 'case')} not run, and {allowed}"
        return None

    @property
    def not_run_lines(self) -> list[str]:
        """How many cases were not run and why, for a terminal; empty when all were."""
        if not self.not_run:
            return []
        lines = [f"not run: {self.total.unsupported} of {plural(self.total.cases, 'case')}"]
        lines += [f"{count:>6}  {reason}" for reason, count in self.not_run[:REASONS]]
        if further := self.not_run[REASONS:]:
            count = sum(number for _, number in further)
            lines.append(f"{count:>6}  for {plural(len(further), 'further reason')}")
        return lines

    @property
    def failing(self) -> list[FeatureRow]:
        """The features that do not conform, those first of which the largest share fails."""
        rows = [row for row in self.rows if row.failed]
        return sorted(rows, key=lambda row: (-row.failed / row.judged, -row.failed))

    @property
    def exit(self) -> Exit:
        """The exit status that the run deserves."""
        if self.total.failed or self.over_budget:
            return Exit.DOES_NOT
        if not self.total.judged:
            return Exit.NOT_JUDGED
        return Exit.DOES_NOT if any(row.not_shown for row in self.rows) else Exit.CONFORMS

    @property
    def line(self) -> str:
        """The verdict in one line."""
        counts = ", ".join(self._asides())
        if self.total.failed:
            failing = self.failing
            named = [f"{r.feature} ({r.failed} of {r.judged})" for r in failing[:LINE_FEATURES]]
            if len(failing) > LINE_FEATURES:
                named.append(f"{len(failing) - LINE_FEATURES} more features")
            kinds = "deviates" if self.total.deviates else "crashes"
            guess = f" – looks like: {'; '.join(self.suspects)}" if self.suspects else ""
            return f"{kinds}: {', '.join(named)}{guess}"
        if self.over_budget:
            return f"not run: {self.over_budget}"
        if self.unavailable is not None:
            return f"could not be judged: {self.unavailable}"
        if not self.total.judged:
            why = f": {self.reasons[0]}" if self.reasons else ""
            return f"could not be judged: {counts or 'no cases'}{why}"
        if hidden := [row.feature for row in self.rows if row.not_shown]:
            return f"not shown: {', '.join(hidden)}: every case is vacuous"
        return f"conforms: {plural(self.total.conforms, 'case')}" + (
            f", {counts}" if counts else ""
        )

    def _asides(self) -> list[str]:
        named = (
            (self.total.known, plural(self.total.known, "known deviation")),
            (self.total.unsupported, f"{self.total.unsupported} unsupported"),
            (self.total.vacuous, f"{self.total.vacuous} vacuous"),
        )
        return [text for count, text in named if count]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; infinite numbers as text."""
        return {
            "verdict": "not run"
            if self.over_budget and not self.total.failed
            else VERDICTS[self.exit],
            "line": self.line,
            "exit_status": int(self.exit),
            "counts": {k: v for k, v in _plain(self.total).items() if k != "feature"},
            "looks_like": list(self.suspects),
            "not_judged_because": list(self.reasons),
            "not_run": [{"reason": reason, "cases": count} for reason, count in self.not_run],
            "unavailable": self.unavailable,
            "deviations_out_of_date": list(self.complaints),
        }


def summarise(
    records: Iterable[CaseRecord],
    complaints: Sequence[str] = (),
    *,
    unavailable: str | None = None,
    skip_budget: int | None = None,
) -> Summary:
    """The rows and the verdict of a run.

    complaints: of the deviations file. unavailable: why the target cannot run here, where that
    ended the run. skip_budget: how many cases may go without being run.
    """
    records = list(records)
    features = sorted({record.feature for record in records})
    failing = [r for r in records if r.known is None and r.status in FAILED]
    return Summary(
        rows=tuple(
            _row(feature, [r for r in records if r.feature == feature]) for feature in features
        ),
        total=_row("all", records),
        suspects=_suspects(failing),
        reasons=tuple(
            reason for reason, _ in _most_frequent(r for r in records if r.status in NOT_JUDGED)
        ),
        complaints=tuple(complaints),
        not_run=_most_frequent(r for r in records if r.status in NOT_RUN),
        unavailable=unavailable,
        skip_budget=skip_budget,
    )


def document(
    records: Iterable[CaseRecord],
    environment: Mapping[str, Any],
    run: Mapping[str, Any],
    complaints: Sequence[str] = (),
    unavailable: str | None = None,
) -> dict[str, Any]:
    """The JSON of a run: environment, options, summary, a row per feature and one per case."""
    records = sorted(records, key=lambda record: record.id)
    summary = summarise(
        records, complaints, unavailable=unavailable, skip_budget=run.get("skip_budget")
    )
    return {
        "environment": dict(environment),
        "run": dict(run),
        "summary": summary.as_dict(),
        "features": [_plain(row) for row in summary.rows],
        "cases": [_case(record) for record in records],
    }


def worst_of(record: CaseRecord) -> float | None:
    """The largest error over budget of a case, over its tensors; None when nothing was compared."""
    return max((_number(v) for v in record.verdict.get("worst", {}).values()), default=None)


def plural(count: int, noun: str) -> str:
    """'1 case', '2 cases'."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _row(feature: str, records: Sequence[CaseRecord]) -> FeatureRow:
    ended = Counter(r.status for r in records if r.known is None or r.status not in FAILED)
    errors = [worst for r in records if (worst := worst_of(r)) is not None]
    return FeatureRow(
        feature=feature,
        cases=len(records),
        conforms=ended[Status.CONFORMS],
        deviates=ended[Status.DEVIATES],
        crashed=ended[Status.CRASHED] + ended[Status.TIMED_OUT],
        unsupported=ended[Status.UNSUPPORTED] + ended[Status.UNAVAILABLE],
        vacuous=ended[Status.VACUOUS],
        known=len(records) - ended.total(),
        worst=max(errors, default=None),
        seconds=math.fsum(r.seconds for r in records),
    )


def _suspects(failing: Sequence[CaseRecord]) -> tuple[str, ...]:
    """What the failing cases look like, those alone that look like something."""
    guesses = Counter(gist(r.verdict) for r in failing if r.verdict.get("looks_like"))
    return tuple(guess for guess, _ in guesses.most_common(SUSPECTS))


def _most_frequent(records: Iterable[CaseRecord]) -> tuple[tuple[str, int], ...]:
    """The reasons of verdicts, and of how many, the most frequent first."""
    reasons = (str(record.verdict.get("reason", "")) for record in records)
    return tuple(Counter(reason for reason in reasons if reason).most_common())


def _case(record: CaseRecord) -> dict[str, Any]:
    verdict = record.verdict
    return {
        "id": record.id,
        "chapter": record.chapter,
        "feature": record.feature,
        "problem": record.problem,
        "verdict": record.status,
        "worst": _text(worst_of(record)),
        "worst_by_tensor": {n: _text(_number(v)) for n, v in verdict.get("worst", {}).items()},
        "statistics": {n: _text(_number(v)) for n, v in verdict.get("statistics", {}).items()},
        "reason": verdict.get("reason", ""),
        "looks_like": list(verdict.get("looks_like", ())),
        "conforms_under": verdict.get("conforms_under"),
        "known_deviation": record.known,
        "seconds": round(record.seconds, 4),
    }


def _plain(row: FeatureRow) -> dict[str, Any]:
    values = asdict(row)
    values["worst"] = _text(row.worst)
    values["seconds"] = round(row.seconds, 3)
    values["not_shown"] = row.not_shown
    return values


def _number(value: Any) -> float:
    """A number of a record, NaN counted as infinite."""
    number = float(value)
    return math.inf if math.isnan(number) else number


def _text(value: float | None) -> float | str | None:
    """A finite number as it is, an infinite one as text: JSON has none."""
    return value if value is None or math.isfinite(value) else repr(value)
