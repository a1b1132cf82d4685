"""Exploring: hypothesis draws sizes and seeds around the problem of a case.

Two profiles of the project's own, for the cases of level quick and those that level full adds.
Both are derandomised, without deadline and without a database: a case always tries the same
things, here and when it is replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem

from ..budget.expectation import expectation
from ..budget.expected import Expected
from ..cases import declaration
from ..judge.form import canonical_lse
from ..plan import Call, CallResult, Plan
from ..subject import Subject
from ..verdict import NotConforming

QUICK = "attnproof-quick"
FULL = "attnproof-full"
MAX_LENGTH = 140

_common: dict[str, Any] = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": (Phase.explicit, Phase.generate, Phase.shrink),
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
    "print_blob": False,
    "verbosity": Verbosity.quiet,
}
settings.register_profile(QUICK, settings(max_examples=3, **_common))
settings.register_profile(FULL, settings(max_examples=8, **_common))


def around(problem: Problem) -> st.SearchStrategy[Problem]:
    """Problems like this one, of other lengths, batches and seeds."""
    lengths = st.integers(1, MAX_LENGTH)
    return st.builds(
        partial(replace, problem),
        seqlen_q=lengths,
        seqlen_k=lengths,
        batch=st.integers(1, 2),
        seed=st.integers(0, 9999),
    )


def explore(
    check: Callable[..., None],
    problem: Problem,
    holds: Callable[[Problem], None],
    *regressions: tuple[int, int],
) -> None:
    """Call ``holds`` with the regressions (seqlen_q, seqlen_k), then with problems drawn around.

    ``check`` is the test function, whose declaration says which profile this problem gets. The
    error is that of the smallest problem found for which ``holds`` raises, and names it.
    """
    declared = declaration(check)
    quick = declared is not None and problem in declared.quick

    def named(variation: Problem) -> None:
        try:
            holds(variation)
        except NotConforming as error:
            error.verdict.reason += f", for {variation.id}"
            raise

    explored = given(variation=around(problem))(named)
    for seqlen_q, seqlen_k in reversed(regressions):
        variation = problem.replace(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
        explored = example(variation=variation)(explored)
    settings.get_profile(QUICK if quick else FULL)(explored)()


def answers(subject: Subject, *asked: tuple[Problem, Inputs]) -> list[CallResult]:
    """The answers to several calls, made one after another."""
    return subject.run(Plan(calls=[Call(problem=p, inputs=i) for p, i in asked]))


def tensor(result: CallResult, name: str, subject: Subject) -> Tensor:
    """One tensor of an answer, fp64, the LSE in base e and (B, H, S); NotConforming if missing."""
    found: Tensor | None
    if name in ("out", "lse"):
        found = None if result.attention is None else getattr(result.attention, name)
    else:
        found = None if result.gradients is None else getattr(result.gradients, name[1:])
    if found is None:
        raise subject.deviates("missing", f"{name} is missing", name)
    if name == "lse":
        found = canonical_lse(found, subject.description.capabilities)
    exact: Tensor = found.double()
    return exact


def allowed(subject: Subject, problem: Problem, inputs: Inputs) -> dict[str, Expected]:
    """How far each tensor of an answer may honestly be from the truth."""
    return expectation(problem, inputs, subject.precision)


def require_equal(
    subject: Subject, one: Tensor, other: Tensor, budget: Tensor, what: str, name: str = "out"
) -> None:
    """Raise unless two fp64 tensors agree within the budget; NaN agrees with nothing."""
    if one.shape != other.shape:
        text = f"{what}: {name} has shapes {tuple(one.shape)} and {tuple(other.shape)}"
        raise subject.deviates("shape", text, name)
    error = (one - other).abs()
    same = (one == other) | (error <= budget)
    if bool(same.all()):
        return
    ratio = (error / budget).masked_fill(same, 0.0).nan_to_num(nan=float("inf"))
    raise _broken(subject, what, name, ratio)


def _broken(subject: Subject, what: str, name: str, ratio: Tensor) -> NotConforming:
    worst = ratio.max().item()
    return subject.deviates(
        "property",
        f"{what}: {name} differs in {int((ratio > 0).sum())} of {ratio.numel()} elements, by up to "
        f"{worst:.3g} times what rounding allows",
        name,
    )
