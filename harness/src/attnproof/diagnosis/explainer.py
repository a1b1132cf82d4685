"""What a verdict that deviates is given beside its findings: a heat map, what it looks like."""

from __future__ import annotations

import time

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem

from ..plan import CallResult
from ..subject import Subject
from ..verdict import Status, Verdict
from .case import MISTAKES, Mistake
from .examine import SECONDS, examine

SECONDS_IN_ALL = 15.0  # a kernel that is all wrong must not make the run slow
SECONDS_AGAIN = 1.0  # for a case after that


class Explainer:
    """The ``explain`` of a subject. When its time is used up, only those mistakes are tried that
    explained something before: where much is wrong, most of it is wrong in the same way."""

    def __init__(self, subject: Subject, seconds: float = SECONDS_IN_ALL) -> None:
        self._subject = subject
        self._left = seconds
        self._seen: dict[Mistake, None] = {}

    def __call__(
        self, problem: Problem, inputs: Inputs, result: CallResult, verdict: Verdict
    ) -> None:
        """Fill ``verdict.looks_like`` and ``verdict.heat_map``."""
        if verdict.status is not Status.DEVIATES:
            return
        in_time = self._left > 0
        start = time.monotonic()
        try:
            examined = examine(
                problem,
                inputs,
                result,
                self._subject.precision,
                self._subject.description.capabilities,
                self._earlier(inputs),
                table=MISTAKES if in_time else list(self._seen),
                seconds=min(SECONDS, self._left) if in_time else SECONDS_AGAIN,
            )
        except Exception as error:
            # The verdict stands, whatever is wrong with its explanation; but it must show.
            verdict.reason += f"; the diagnosis failed: {type(error).__name__}: {error}"
            return
        self._left -= time.monotonic() - start
        self._seen |= dict.fromkeys(examined.mistakes)
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
