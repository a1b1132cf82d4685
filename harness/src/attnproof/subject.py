"""The subject of a run: a target, and the way from a problem to a verdict on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from attn_reference.inputs import Inputs
from attn_reference.precision import Precision
from attn_reference.problem import Problem

from .backend import Description
from .cases import shown_features
from .inputs.make import make_inputs
from .judge.judging import judge
from .judge.vacuity import vacuous_features
from .plan import Call, CallResult, Outcome, Plan, Reply
from .verdict import Finding, NotConforming, Status, Verdict


class Runner(Protocol):
    """Where a target runs: in a process of its own, or in this one."""

    def describe(self) -> Description:
        """What the target says of itself; LoadError when it cannot be loaded."""
        ...

    def run(self, plan: Plan, timeout: float) -> Reply:
        """Carry out a plan; never raises for what the target does."""
        ...

    def close(self) -> None:
        """End the process, if there is one."""
        ...


@dataclass(kw_only=True)
class Subject:
    """A target under judgement. Chapters call ``check``, or ``run`` and ``judge``."""

    runner: Runner
    description: Description
    precision: Precision
    device: str = "cpu"
    timeout: float = 60.0
    seed: int = 0
    # Called with every verdict that deviates, to add the diagnosis and the heat map.
    explain: Callable[[Problem, Inputs, CallResult, Verdict], None] | None = None
    last_verdict: Verdict | None = field(default=None, init=False)
    last_plan: Plan | None = field(default=None, init=False)

    def check(self, problem: Problem, **plan: object) -> Verdict:
        """Run one call and judge it; each of its ``shown_features`` must change the answer.

        ``plan`` are further fields of ``Plan``. Raises NotConforming for any verdict but CONFORMS.
        """
        problem, inputs = self.prepare(problem)
        if idle := vacuous_features(problem, inputs, shown_features(problem), self.precision):
            raise self.verdict_error(
                Status.VACUOUS, f"{', '.join(idle)}: no effect on the answer beyond the noise"
            )
        result = self.run(Plan(calls=[Call(problem=problem, inputs=inputs)], **plan))[0]  # type: ignore[arg-type]
        return self.judge(problem, inputs, result)

    def prepare(self, problem: Problem) -> tuple[Problem, Inputs]:
        """The problem under this run's seed, and its inputs.

        NotConforming if the target is unavailable here or does not support the problem.
        """
        problem = replace(problem, seed=problem.seed + self.seed)
        if self.description.unavailable is not None:
            raise self.verdict_error(Status.UNAVAILABLE, self.description.unavailable)
        reasons = self.description.capabilities.unsupported_reasons(problem)
        if refused := self.description.refused_dtypes.get(problem.dtype):
            reasons.append(refused)
        if reasons:
            raise self.verdict_error(Status.UNSUPPORTED, "; ".join(reasons))
        return problem, make_inputs(problem)

    def run(self, plan: Plan) -> list[CallResult]:
        """Carry out a plan; NotConforming when the process did not answer every call, or, unless
        the plan's inputs are invalid, a call raised or declared its problem unsupported."""
        self.last_plan = plan
        start = time.perf_counter()
        reply = self.runner.run(plan, self.timeout)
        seconds = time.perf_counter() - start
        if reply.outcome is not Outcome.ANSWERED:
            status = Status.TIMED_OUT if reply.outcome is Outcome.TIMED_OUT else Status.CRASHED
            raise self.verdict_error(status, f"{reply.outcome}: {reply.reason}", seconds=seconds)
        for result in () if plan.invalid else reply.results:
            if result.unsupported is not None:
                raise self.verdict_error(Status.UNSUPPORTED, result.unsupported, seconds=seconds)
            if result.raised is not None:
                raise self.verdict_error(
                    Status.CRASHED, f"raised {result.raised}\n{result.traceback}", seconds=seconds
                )
        return reply.results

    def judge(self, problem: Problem, inputs: Inputs, result: CallResult) -> Verdict:
        """The verdict on the result of one call; raises NotConforming unless it conforms."""
        verdict = judge(problem, inputs, result, self.precision, self.description.capabilities)
        verdict.seconds = result.seconds
        if verdict.status is not Status.CONFORMS:
            if self.explain is not None:
                self.explain(problem, inputs, result, verdict)
            raise NotConforming(verdict)
        self.last_verdict = verdict
        return verdict

    def deviates(self, rule: str, message: str, tensor: str = "out") -> NotConforming:
        """The error to raise when a check of a chapter's own finds something wrong."""
        error = self.verdict_error(Status.DEVIATES, message)
        error.verdict.findings.append(Finding(tensor=tensor, rule=rule, message=message))
        return error

    def verdict_error(self, status: Status, reason: str, *, seconds: float = 0.0) -> NotConforming:
        """A NotConforming that carries a verdict of this status."""
        return NotConforming(Verdict(status=status, reason=reason, seconds=seconds))
