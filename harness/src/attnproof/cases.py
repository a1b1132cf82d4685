"""The cases of the conformance suite: what a chapter declares, found by id.

A chapter is a module ``attnproof.conformance.test_<chapter>`` whose functions
``test_<check>(problem, subject)`` carry their problems::

    @cases(quick=[Problem(...)], full=[Problem(...)], feature="window")
    def test_window(problem, subject): ...

The id of a case is ``<chapter>/<check>/<problem id>``. Level full contains level quick.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from attn_reference.problem import Problem

LEVELS = ("quick", "full")
PACKAGE = "attnproof.conformance"
_ATTRIBUTE = "attnproof_cases"
_PREFIX = "test_"

Feature = str | Callable[[Problem], str]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem under one check; ``feature`` is its row in the table of the report."""

    chapter: str
    check: str
    problem: Problem
    feature: str
    level: str  # the level from which it is run

    @property
    def id(self) -> str:
        """``<chapter>/<check>/<problem id>``."""
        return f"{self.chapter}/{self.check}/{self.problem.id}"


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """The problems that a check declares, by level."""

    quick: tuple[Problem, ...]
    full: tuple[Problem, ...]  # beyond those of quick
    feature: Feature

    def feature_of(self, problem: Problem) -> str:
        """The row of the table that a problem counts for."""
        return self.feature if isinstance(self.feature, str) else self.feature(problem)


def cases(
    *, quick: Iterable[Problem] = (), full: Iterable[Problem] = (), feature: Feature
) -> Callable[[Function], Function]:
    """Declare the problems of a check; ``full`` are those that level full adds.

    ValueError when a problem is declared twice within ``quick``.
    """
    first = tuple(quick)
    if len(set(first)) < len(first):
        twice = sorted({p.id for p in first if first.count(p) > 1})
        raise ValueError(f"quick: declared twice: {', '.join(twice)}")
    more = tuple(dict.fromkeys(p for p in full if p not in first))

    def declare(function: Function) -> Function:
        setattr(function, _ATTRIBUTE, Declaration(quick=first, full=more, feature=feature))
        return function

    return declare


def declaration(function: object) -> Declaration | None:
    """What ``cases`` declared for this function; None when it declared nothing."""
    found: Declaration | None = getattr(function, _ATTRIBUTE, None)
    return found


def chapters() -> tuple[str, ...]:
    """The names of the chapters, sorted; none of them is imported."""
    package = importlib.import_module(PACKAGE)
    modules = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(m.removeprefix(_PREFIX) for m in modules if m.startswith(_PREFIX)))


def case_of(chapter: str, check: str, declared: Declaration, problem: Problem) -> Case:
    """One problem under a check, declared or not: those that are not belong to level full."""
    return Case(
        chapter=chapter,
        check=check,
        problem=problem,
        feature=declared.feature_of(problem),
        level="quick" if problem in declared.quick else "full",
    )


def cases_of(chapter: str, check: str, declared: Declaration, level: str) -> list[Case]:
    """The cases of one check at that level, in the order in which they were declared."""
    found = declared.quick if level == "quick" else (*declared.quick, *declared.full)
    return [case_of(chapter, check, declared, problem) for problem in found]


def checks(chapter: str) -> dict[str, Callable[..., Any]]:
    """The checks of a chapter by name, in the order in which they are written.

    ValueError listing the known chapters for an unknown one.
    """
    if chapter not in chapters():
        raise ValueError(
            f"chapter {chapter!r}: unknown{_meant(chapter, chapters())}; "
            f"known are {', '.join(chapters())}"
        )
    module = importlib.import_module(f"{PACKAGE}.{_PREFIX}{chapter}")
    return {
        name.removeprefix(_PREFIX): function
        for name, function in vars(module).items()
        if name.startswith(_PREFIX) and declaration(function) is not None
    }


def all_cases(level: str = "full") -> list[Case]:
    """Every case that ships, at that level, by chapter."""
    found: list[Case] = []
    for chapter in chapters():
        for check, function in checks(chapter).items():
            declared = declaration(function)
            assert declared is not None
            found += cases_of(chapter, check, declared, level)
    return found


def find_case(case_id: str) -> Case:
    """The case of that id; its problem need not be one that is declared.

    ValueError saying which part of the id is not understood, and what is known.
    """
    chapter, _, rest = case_id.partition("/")
    check, _, problem_id = rest.partition("/")
    known = checks(chapter)
    if check not in known:
        raise ValueError(
            f"case {case_id!r}: chapter {chapter} has no check {check!r}"
            f"{_meant(check, known)}; it has {', '.join(known)}"
        )
    declared = declaration(known[check])
    assert declared is not None
    try:
        problem = Problem.from_id(problem_id)
    except ValueError as error:
        every = {case.problem.id for case in cases_of(chapter, check, declared, "full")}
        hint = _meant(problem_id, sorted(every), 0.9)
        raise ValueError(f"case {case_id!r}: {error}{hint}") from None
    return case_of(chapter, check, declared, problem)


def _meant(given: str, known: Iterable[str], like: float = 0.6) -> str:
    """The known name that a misspelt one is most like, as the end of a sentence."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=like)
    return f", did you mean {near[0]}?" if near else ""


# Distributions under which one key has all the weight, or values are next to nothing: dQ and dK
# are zero, or all but zero beside the errors of what they are the difference of.
_WITHOUT_GRADIENTS = frozenset({"integers", "large", "needles", "tiny"})


def shown_features(problem: Problem) -> tuple[str, ...]:
    """The features of a problem whose absence must show, or else the case proves nothing.

    All that it has, except where there is nothing to show them on: no queries or keys; no
    gradients of any size, as where a query has a single key; no key that the bottom right corner
    hides, from a single query or behind a window that ends at the diagonal.
    """
    if 0 in (problem.batch, problem.seqlen_q, problem.keys):
        return ()
    hidden = set()
    single = problem.keys == 1 or (problem.seqlen_q == 1 and problem.causal == "top-left")
    if single or problem.distribution in _WITHOUT_GRADIENTS:
        hidden.add("gradients")
    if problem.seqlen_q == 1 or (problem.window is not None and problem.window[1] == 0):
        hidden.add("causal bottom-right")
    return tuple(name for name in problem.features if name not in hidden)
