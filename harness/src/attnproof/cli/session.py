"""Running the chapters: pytest in this process, quiet, apart from the caller's own pytest.

Configuration, plugins and options of the project that the caller stands in are left out, so
that a verdict does not depend on where it is asked for.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from ..environment import cores
from ..options import Options
from ..record import CaseRecord
from ..report.results import write_results
from ..report.summary import Exit

CONFORMANCE = Path(__file__).parents[1] / "conformance"
PLUGINS = ("attnproof.plugin", "xdist.plugin", "_hypothesis_pytestplugin")
THREADS = "OMP_NUM_THREADS"
RECORDER = "attnproof-recorder"  # the name that the plugin registers its recorder under


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run that ended: its records, taken over ones included, and what else there is to say."""

    records: tuple[CaseRecord, ...]
    taken_over: int  # from the run that was resumed
    complaints: tuple[str, ...]  # of the deviations file
    problems: tuple[str, ...]  # results that could not be written and the like
    interrupted: bool
    refused: str | None = None  # why nothing was run: a usage error, in one line
    unavailable: str | None = None  # why the target cannot run here
    broken: str | None = None  # what pytest printed when the harness itself failed


def run_session(options: Options, workers: int, watcher: object) -> Session:
    """Judge: ``workers`` processes share the cases, 0 and 1 do without pytest-xdist.

    ``watcher`` is a pytest plugin that follows the run.
    """
    quiet = _Quiet()
    arguments = [
        f"--rootdir={CONFORMANCE}",
        f"--confcutdir={CONFORMANCE}",
        f"-c={os.devnull}",
        "--import-mode=importlib",
        "-pno:cacheprovider",
        *(f"-p{name}" for name in PLUGINS),
        *pytest_options(options),
        *([f"-n{workers}", "--dist=worksteal"] if workers > 1 else []),
        *_chapter_files(options),
    ]
    said = io.StringIO()
    with _apart(workers), _workers_stderr(workers) as told, contextlib.redirect_stderr(said):
        ended = pytest.main(arguments, plugins=[quiet, watcher])
        said.write(told())
    if ended == pytest.ExitCode.USAGE_ERROR:
        return _nothing(refused=_one_line(said.getvalue()))
    recorder = quiet.recorder
    if recorder is not None and recorder.unavailable is not None:
        why, finished = recorder.unavailable, list(recorder.finished.values())
        lost = write_results(options, finished, [], why) if options.json is not None else []
        return _nothing(unavailable=why, problems=tuple(lost))
    if ended == pytest.ExitCode.INTERNAL_ERROR or recorder is None:
        return _nothing(broken=quiet.text() + said.getvalue())
    taken = list(recorder.finished.values())
    return Session(
        records=(*taken, *recorder.records),
        taken_over=len(taken),
        complaints=tuple(recorder.complaints()),
        problems=tuple(recorder.problems),
        interrupted=ended == pytest.ExitCode.INTERRUPTED and not quiet.failed_to_collect,
        broken=quiet.text() if quiet.failed_to_collect else None,
    )


def _chapter_files(options: Options) -> list[str]:
    """What is collected: the chapters asked for, or all."""
    if not options.chapters:
        return [str(CONFORMANCE)]
    return [str(CONFORMANCE / f"test_{chapter}.py") for chapter in options.chapters]


def pytest_options(options: Options) -> list[str]:
    """``options`` as options of the plugin, those alone that differ from the default."""
    given: list[str] = []
    for f in fields(options):
        value = getattr(options, f.name)
        name = "--attn-" + {"dtypes": "dtype", "chapters": "chapter"}.get(f.name, f.name)
        name = name.replace("_", "-")
        if value == f.default:
            continue
        if isinstance(value, bool):
            given.append(name)
        else:
            given += [f"{name}={one}" for one in (value if isinstance(value, tuple) else (value,))]
    return given


class _Quiet:
    """A pytest plugin that keeps what pytest would print, and finds the recorder."""

    def __init__(self) -> None:
        self.recorder: Any = None
        self.failed_to_collect = False
        self._printed = io.StringIO()

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Put a reporter that writes to memory in the place of pytest's own."""
        from _pytest.terminal import TerminalReporter

        self.recorder = config.pluginmanager.getplugin(RECORDER)
        if own := config.pluginmanager.getplugin("terminalreporter"):
            config.pluginmanager.unregister(own)
        silent = TerminalReporter(config, self._printed)
        config.pluginmanager.register(silent, "terminalreporter")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        """Go no further with a target that cannot run here."""
        if self.recorder is not None and self.recorder.unavailable is not None:
            pytest.exit(self.recorder.unavailable, returncode=int(Exit.NOT_JUDGED))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A chapter that cannot be imported is a fault of the harness."""
        self.failed_to_collect |= report.failed

    def text(self) -> str:
        """What pytest printed."""
        return self._printed.getvalue()


@contextlib.contextmanager
def _apart(workers: int) -> Iterator[None]:
    """Without the plugins and options that pytest takes from the environment, and with the cores
    shared out: threads of several workers that wait for each other make small problems ten
    times slower."""
    names = ("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTEST_ADDOPTS", "PYTEST_PLUGINS", THREADS)
    before = {name: os.environ.get(name) for name in names}
    os.environ[names[0]] = "1"
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ.pop("PYTEST_PLUGINS", None)
    if workers > 1:
        os.environ.setdefault(THREADS, str(max(1, cores() // workers)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _workers_stderr(workers: int) -> Iterator[Callable[[], str]]:
    """With what the processes of pytest-xdist print on standard error in a file; gives a function
    that reads it. A worker that Ctrl-C meets in the middle of an import has a traceback to tell,
    which is nobody's business."""
    if workers < 2:
        yield lambda: ""
        return
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)

        def told() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield told
        finally:
            os.dup2(before, 2)
            os.close(before)


def _nothing(*, problems: tuple[str, ...] = (), **why: str) -> Session:
    """A session without records."""
    return Session(
        records=(), taken_over=0, complaints=(), problems=problems, interrupted=False, **why
    )


def _one_line(text: str) -> str:
    """The message of a usage error, with the options as ``attnproof check`` calls them."""
    lines: Sequence[str] = [line for line in text.splitlines() if line.startswith("ERROR: ")]
    message = (lines or text.strip().splitlines() or ["pytest refused its options"])[0]
    return message.removeprefix("ERROR: ").removeprefix("--attn-target: ").replace("--attn-", "--")
