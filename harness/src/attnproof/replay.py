"""One case again: its verdict, the computation that fails, the smallest that still does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem

from .cases import Case, checks
from .plan import CallResult
from .shrink import shrink
from .subject import Subject
from .verdict import NotConforming, Status, Verdict


@dataclass(frozen=True)
class Computation:
    """One call that deviates: what was asked, and what came."""

    problem: Problem
    inputs: Inputs
    result: CallResult


@dataclass(frozen=True)
class Replayed:
    """The verdict on a case and, where the numbers of a call deviate, that call."""

    verdict: Verdict
    computation: Computation | None = None


def replay(case: Case, subject: Subject) -> Replayed:
    """Run the check of a case on its problem, and say how it ended; never raises for the target."""
    check = checks(case.chapter)[case.check]
    kept: list[Computation] = []
    subject.last_verdict = None
    with _keeping(subject, kept):
        try:
            check(problem=case.problem, subject=subject)
        except NotConforming as error:
            return Replayed(error.verdict, kept[-1] if kept else None)
        except BaseExceptionGroup as group:  # hypothesis found several
            verdicts = [error.verdict for error in _flat(group)]
            if not verdicts:
                raise
            return Replayed(verdicts[0], kept[-1] if kept else None)
    return Replayed(subject.last_verdict or Verdict(status=Status.CONFORMS))


def smallest(case: Case, subject: Subject, status: Status, seconds: float) -> tuple[Case, int]:
    """The case with the smallest problem that ends in the same way, and how many were tried."""

    def fails(problem: Problem) -> bool:
        try:
            return replay(replace(case, problem=problem), quiet).verdict.status is status
        except (ValueError, AssertionError):  # the check cannot be made of such a problem
            return False

    quiet = replace(subject, explain=None)
    with _one_thread():
        problem, tried = shrink(case.problem, fails, seconds)
    return replace(case, problem=problem), tried


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread in this process: small problems gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _keeping(subject: Subject, kept: list[Computation]) -> Iterator[None]:
    """Collect the calls that the judge finds deviating."""
    explain: Callable[[Problem, Inputs, CallResult, Verdict], None] | None = subject.explain

    def keep(problem: Problem, inputs: Inputs, result: CallResult, verdict: Verdict) -> None:
        kept.append(Computation(problem, inputs, result))
        if explain is not None:
            explain(problem, inputs, result, verdict)

    subject.explain = keep
    try:
        yield
    finally:
        subject.explain = explain


def _flat(group: BaseExceptionGroup[BaseException]) -> Iterator[NotConforming]:
    """The verdicts that a group of exceptions holds."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flat(error)
        elif isinstance(error, NotConforming):
            yield error
