"""Judging a target inside a model: which scenarios, run where, and the records that come of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING

from ..options import Options, resolved_device
from ..plan import Outcome
from ..record import CaseRecord
from ..targets import TargetSpec
from ..verdict import Finding, Status, Verdict
from .scenario import PADDINGS, Scenario

if TYPE_CHECKING:
    from ..backend import Description
    from ..worker.models import ModelReply
    from ..worker.runners import InProcessRunner, IsolatedRunner

CHAPTER = "model"
DTYPES = ("fp32", "fp16", "bf16")
SEEDS = {"quick": (0,), "full": (0, 1, 2)}  # by level
OLDEST = (5, 17)  # transformers, whose mask functions take q_length since about then
INSTALL = "pip install 'attnproof[transformers]'"
GRADIENTS = {"q", "k", "v"}


def unavailable() -> str | None:
    """Why no model can be run here, a sentence; None when it can."""
    if importlib.util.find_spec("transformers") is None:
        return f"transformers is not installed: {INSTALL}"
    found = version("transformers")
    if tuple(int(n) for n in found.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"transformers {found} is older than {oldest}, which is needed: {INSTALL}"
    return None


def scenarios(options: Options) -> list[Scenario]:
    """What is run, in order."""
    assert options.model is not None
    return [
        Scenario(model=options.model, dtype=dtype, padding=padding, seed=seed + options.seed)
        for seed in SEEDS[options.level]
        for dtype in options.dtypes or DTYPES
        for padding in PADDINGS
    ]


class ModelSession:
    """A target inside a model. ``records`` gives them as they come; ``close`` it at the end."""

    def __init__(self, options: Options) -> None:
        """Load the target; LoadError when that cannot be done."""
        from ..worker.runners import InProcessRunner, IsolatedRunner

        self._options = options
        self._device = resolved_device(options.device)
        spec = TargetSpec(options.target, options.signature)
        self._runner: InProcessRunner | IsolatedRunner
        self._runner = (InProcessRunner if options.in_process else IsolatedRunner)(
            spec, self._device
        )
        self.description: Description = self._runner.describe()

    def close(self) -> None:
        """End the process of the target."""
        self._runner.close()

    def records(self, scenario: Scenario) -> Iterator[CaseRecord]:
        """A record for each check of a scenario."""
        verdicts = self._verdicts(scenario)
        for check, verdict in verdicts.items():
            yield CaseRecord(
                id=f"{CHAPTER}/{check.replace(' ', '_')}/{scenario.id}",
                chapter=CHAPTER,
                feature=check,
                problem=scenario.id,
                verdict=verdict.as_dict(),
                seconds=round(verdict.seconds, 4),
            )

    def _verdicts(self, scenario: Scenario) -> dict[str, Verdict]:
        from .judging import CHECKS, judge
        from .running import run

        told = self.description
        if reason := _unsupported(told, scenario):
            return {check: Verdict(status=Status.UNSUPPORTED, reason=reason) for check in CHECKS}
        # The limit is one of a case, and a scenario is as many as there are checks.
        reply = self._runner.run_model(scenario, self._options.timeout * len(CHECKS))
        if reply.answer is None:
            failed = _failed(reply)
            return dict.fromkeys(CHECKS, failed)
        verdicts = judge(scenario, reply.answer, run(scenario, "eager", self._device))
        if not set(told.capabilities.gradients) >= GRADIENTS:
            reason = "gradients are not supported"
            verdicts["gradients"] = Verdict(status=Status.UNSUPPORTED, reason=reason)
        for verdict in verdicts.values():
            verdict.seconds = reply.seconds / len(CHECKS)
            _add(verdict, reply.complaints)
        return verdicts


def _unsupported(told: Description, scenario: Scenario) -> str | None:
    """Why the target is not asked; what else it does not support it says itself."""
    dtypes = told.capabilities.dtypes
    if scenario.dtype not in dtypes:
        return f"dtype {scenario.dtype} is not one of {', '.join(dtypes)}"
    if refused := told.refused_dtypes.get(scenario.dtype):
        return refused
    if scenario.dtype == "fp32" and told.precision.products == "tf32":
        return "products in tf32 are declared, and the fp32 of eager attention has none"
    return None


def _failed(reply: ModelReply) -> Verdict:
    """The verdict where there is no answer."""
    if reply.outcome is not Outcome.ANSWERED:
        status = Status.TIMED_OUT if reply.outcome is Outcome.TIMED_OUT else Status.CRASHED
        return Verdict(status=status, reason=f"{reply.outcome}: {reply.reason}")
    if reply.unsupported is not None:
        return Verdict(status=Status.UNSUPPORTED, reason=reply.unsupported)
    return Verdict(status=Status.CRASHED, reason=f"raised {reply.raised}\n{reply.traceback}")


def _add(verdict: Verdict, complaints: list[str]) -> None:
    """What the target did beside computing is a deviation of every check."""
    if complaints and verdict.status in (Status.CONFORMS, Status.VACUOUS):
        verdict.status, verdict.reason = Status.DEVIATES, "; ".join(complaints)
    verdict.findings += [
        Finding(tensor="process", rule="integrity", message=text) for text in complaints
    ]
