"""What a verdict that deviates is given beside its findings: a heat map, what it looks like."""

from __future__ import annotations

import time

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem

from .diagnosis import SECONDS, examine
from .plan import CallResult
from .subject import Subject
from .verdict import Status, Verdict

SECONDS_IN_ALL = 30.0  # a kernel that is all wrong must not make the run slow


class Explainer:
    """The ``explain`` of a subject. When its time is used up, verdicts stay as they are."""

    def __init__(self, subject: Subject, seconds: float = SECONDS_IN_ALL) -> None:
        self._subject = subject
        self._left = seconds

    def __call__(
        self, problem: Problem, inputs: Inputs, result: CallResult, verdict: Verdict
    ) -> None:
        """Fill ``verdict.looks_like`` and ``verdict.heat_map``."""
        if verdict.status is not Status.DEVIATES or self._left <= 0:
            return
        start = time.monotonic()
        examined = examine(
            problem,
            inputs,
            result,
            self._subject.precision,
            self._subject.description.capabilities,
            self._earlier(inputs),
            seconds=min(SECONDS, self._left),
        )
        self._left -= time.monotonic() - start
        verdict.looks_like = list(examined.looks_like)
        verdict.heat_map = examined.heat_map

    def _earlier(self, inputs: Inputs) -> list[tuple[Problem, Inputs]]:
        """The calls of the same plan that came before the one on these inputs."""
        plan = self._subject.last_plan
        before: list[tuple[Problem, Inputs]] = []
        for call in plan.calls if plan is not None else ():
            if call.inputs is inputs:
                return before
            before.append((call.problem, call.inputs))
        return []
