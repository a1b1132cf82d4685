"""What there is to judge, and to judge by: backends, chapters, checks."""

from __future__ import annotations

from dataclasses import dataclass

from .backend import Description
from .cases import LEVELS, cases_of, chapters, checks, declaration
from .registry import registered
from .targets import LoadError, TargetSpec
from .worker.runners import IsolatedRunner


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A registered backend: where it comes from, and what it says of itself or why it cannot."""

    name: str
    source: str
    description: Description | None = None
    error: str | None = None

    @property
    def problem(self) -> str | None:
        """Why it cannot run here; None when it can."""
        return self.error or (self.description.unavailable if self.description else None)


def backends(device: str) -> list[Listed]:
    """The registered backends, each described in a process of its own."""
    return [_listed(name, point.value, device) for name, point in registered().items()]


def _listed(name: str, source: str, device: str) -> Listed:
    runner = IsolatedRunner(TargetSpec(name), device)
    try:
        return Listed(name=name, source=source, description=runner.describe())
    except LoadError as error:
        return Listed(name=name, source=source, error=str(error))
    finally:
        runner.close()


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of a chapter: what it shows, and how many cases it has at each level."""

    name: str
    about: str  # first line of its docstring
    cases: dict[str, int]  # level -> cases, those of the levels below included


def catalogue() -> dict[str, list[Check]]:
    """The chapters that ship and their checks."""
    found: dict[str, list[Check]] = {}
    for chapter in chapters():
        found[chapter] = []
        for name, function in checks(chapter).items():
            declared = declaration(function)
            assert declared is not None
            about = (function.__doc__ or "").strip().splitlines()
            counts = {lv: len(cases_of(chapter, name, declared, lv)) for lv in LEVELS}
            found[chapter].append(Check(name=name, about=about[0] if about else "", cases=counts))
    return found
