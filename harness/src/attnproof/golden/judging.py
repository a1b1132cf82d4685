"""A target judged on the golden vectors: the stored inputs go in, and what comes out must be within
the error budget of the stored answers.

The judge computes its answers anew; that they are those of the vectors is what ``verify`` shows,
which goes before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..computation import load_computation
from ..plan import Call, Plan
from ..record import CaseRecord
from ..subject import Subject
from ..verdict import NotConforming, Verdict
from .problems import VECTORS
from .vectors import DIRECTORY, SUFFIX

CHAPTER = "golden"


def judge_vectors(subject: Subject, directory: Path = DIRECTORY) -> Iterator[CaseRecord]:
    """A record for each vector; its feature is the vector's name."""
    for name in VECTORS:
        stored = load_computation(directory / (name + SUFFIX))
        verdict = _verdict(subject, Call(problem=stored.problem, inputs=stored.inputs))
        yield CaseRecord(
            id=f"{CHAPTER}/{name}/{stored.problem.id}",
            chapter=CHAPTER,
            feature=name,
            problem=stored.problem.id,
            verdict=verdict.as_dict(),
            seconds=round(verdict.seconds, 4),
        )


def _verdict(subject: Subject, call: Call) -> Verdict:
    try:
        subject.prepare(call.problem)
        # What dropout keeps is the target's own to decide; it is judged on that.
        call.inputs.keep_mask = None
        (result,) = subject.run(Plan(calls=[call]))
        return subject.judge(call.problem, call.inputs, result)
    except NotConforming as error:
        return error.verdict
