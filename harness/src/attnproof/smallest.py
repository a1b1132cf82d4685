"""Smallest problems that fail like the failing cases of a run, as far as a little time reaches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from .cases import Case, find_case
from .options import Options, make_subject
from .record import CaseRecord
from .replay import smallest
from .report.verdict_text import replay_command
from .subject import Subject
from .targets import LoadError
from .verdict import Status


@dataclass(frozen=True)
class Smallest:
    """The case with the smallest problem found that ends like the one asked about."""

    case: Case

    def text(self, options: Options) -> str:
        """Two lines: what it is, and how to see it."""
        command = replay_command(self.case.id, options)
        return f"smallest that fails: {self.case.problem.id}\n  {command}"


def smallest_of(
    options: Options, failing: Sequence[CaseRecord], seconds: float
) -> dict[str, Smallest]:
    """By the id of each failing case, the smallest that fails like it.

    Left out are cases for which nothing smaller was found in the time, and hangs, each of which
    takes the whole time limit. Empty when the target cannot be loaded again.
    """
    chosen = [record for record in failing if record.status != Status.TIMED_OUT]
    if not chosen:
        return {}
    try:
        subject = make_subject(options)
    except LoadError:
        return {}
    found: dict[str, Smallest] = {}
    deadline = time.monotonic() + seconds
    try:
        for n, record in enumerate(chosen):
            share = (deadline - time.monotonic()) / (len(chosen) - n)
            if share > 0 and (one := _smallest(record, subject, share)) is not None:
                found[record.id] = one
    finally:
        subject.runner.close()
    return found


def _smallest(record: CaseRecord, subject: Subject, seconds: float) -> Smallest | None:
    case = find_case(record.id)
    found, _ = smallest(case, subject, Status(record.status), seconds)
    return None if found == case else Smallest(found)
