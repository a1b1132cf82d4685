"""The pytest plugin: thin. ``pytest --pyargs attnproof.conformance --attn-target=TARGET`` judges
a target; without --attn-target it does nothing, and imports nothing, at all.

What is decided here is only what pytest decides: which cases are collected, what an outcome
is called, which process writes. Options are in ``options``, cases in ``cases``, records and
their journal in ``record`` and ``recorder``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from . import spread
from .markers import DECLARED, unmet
from .options import OptionError, Options, add_options, environment, read_options

if TYPE_CHECKING:
    from .recorder import Recorder
    from .subject import Subject

CONFORMANCE = Path(__file__).parent / "conformance"
PACKAGE = "attnproof.conformance"
OPTIONS: pytest.StashKey[Options] = pytest.StashKey()
RECORDER: pytest.StashKey[Recorder] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    add_options(parser.getgroup("attnproof", "judging an attention implementation").addoption)


def pytest_configure(config: pytest.Config) -> None:
    """Understand the options; give an xdist worker its GPU and cores before torch can start."""
    for line in DECLARED:
        config.addinivalue_line("markers", line)
    try:
        options = read_options(config.option)
    except OptionError as error:
        raise pytest.UsageError(str(error)) from None
    if options is None:
        if _asks_for_conformance(config):
            raise pytest.UsageError(
                "attnproof.conformance judges a target: name it with --attn-target, for instance "
                "--attn-target=sdpa or --attn-target=my_kernel.py:attention"
            )
        return
    config.stash[OPTIONS] = options
    spread.pytest_configure(config)
    from .recorder import Recorder

    recorder = Recorder(options, getattr(config, "workerinput", None))
    config.stash[RECORDER] = recorder
    config.pluginmanager.register(recorder, "attnproof-recorder")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Every option that was given and every variable that bears on the run."""
    options = config.stash.get(OPTIONS, None)
    if options is None:
        return []
    given = " ".join(f"{n}={v}" if v else n for n, v in options.shown().items())
    variables = " ".join(f"{name}={value}" for name, value in environment().items())
    return [
        f"attnproof: {given}",
        f"attnproof environment: {variables or 'nothing set'}",
        *config.stash[RECORDER].header(),
    ]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The chapters are not tests of whatever is being tested without a target."""
    if OPTIONS not in config.stash and CONFORMANCE in (collection_path, *collection_path.parents):
        return True
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise a check over the problems that it declares."""
    options = metafunc.config.stash.get(OPTIONS, None)
    if options is None or not {"problem", "subject"} <= set(metafunc.fixturenames):
        return
    from .recorder import chosen_cases

    chosen = chosen_cases(options, metafunc.function, Path(metafunc.module.__file__ or ""))
    if chosen is not None:
        metafunc.parametrize("problem", [pytest.param(c.problem, id=c.problem.id) for c in chosen])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the parametrisations that came out empty, and what a resumed run has done; in a
    worker, bring together what is compiled together."""
    if OPTIONS not in config.stash:
        return
    recorder = config.stash[RECORDER]
    kept = [item for item in items if recorder.wants(item)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    if recorder.is_worker:
        items.sort(key=recorder.order)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs another GPU than there is; a judged case is recorded so."""
    reason = unmet(item)
    if reason is None:
        return
    if OPTIONS in item.config.stash:
        item.config.stash[RECORDER].refuse(item, reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """The target under judgement, in its process, which ends with the session."""
    recorder = request.config.stash.get(RECORDER, None)
    if recorder is None:
        raise pytest.UsageError("fixture 'subject' needs --attn-target, which names what to judge")
    subject = recorder.subject()
    yield subject
    subject.runner.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Give a judged case its outcome, its text and its record."""
    report = yield
    if OPTIONS in item.config.stash:
        item.config.stash[RECORDER].judged(item, call, report)
    return report


def _asks_for_conformance(config: pytest.Config) -> bool:
    """Whether the command line names the chapters, as a package or as a path."""
    for argument in config.args:
        name = str(argument).partition("::")[0]
        if config.option.pyargs and f"{name}.".startswith(f"{PACKAGE}."):
            return True
        path = (config.invocation_params.dir / name).resolve()
        if CONFORMANCE in (path, *path.parents):
            return True
    return False
