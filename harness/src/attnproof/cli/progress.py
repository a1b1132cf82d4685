"""Following a run: what is waited for and a progress bar on a terminal, a line now and then
elsewhere."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from ..options import Options, loading_text
from ..report.summary import FAILED

QUIET_SECONDS = 20.0  # between lines when there is no terminal
PROPERTY = "attnproof"  # of a test report: the record, as JSON


@contextmanager
def loading(console: Console, options: Options) -> Iterator[None]:
    """Say that the target is loaded in the block; nothing moves in front of a debugger."""
    text = loading_text(options)
    if console.is_terminal and not options.in_process:
        with console.status(escape(text)):
            yield
        return
    reminder = Reminder(console, text)
    reminder.start()
    try:
        yield
    finally:
        reminder.stop()


def counting(console: Console, text: str, *beside: ProgressColumn, width: int = 30) -> Progress:
    """A bar of how much is done, of how much, and for how long; none where there is no terminal."""
    return Progress(
        TextColumn(escape(text)),
        BarColumn(bar_width=width),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *beside,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def advancing(console: Console, text: str) -> Iterator[Callable[[int, int], None]]:
    """Say what is done in the block; it reports how much is done, of how much, where it can."""
    bar = counting(console, text)
    task = bar.add_task(text, total=None)
    started = said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        bar.update(task, completed=done, total=total)
        now = time.monotonic()
        if not console.is_terminal and now - said > QUIET_SECONDS:
            said = now
            words = f"{text}: {done} of {total}, {now - started:.0f} s"
            console.print(words, markup=False, soft_wrap=True)

    with bar:
        yield progress


class Reminder:
    """Prints what is waited for when that takes a while, where there is no terminal."""

    def __init__(self, console: Console, text: str) -> None:
        self._timer: threading.Timer | None = None
        self._console = console
        self._text = text

    def start(self) -> None:
        """Begin to wait, unless that has begun."""
        if self._timer is None and not self._console.is_terminal:
            self._timer = threading.Timer(QUIET_SECONDS, self._say)
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        """What was waited for is there."""
        if self._timer is not None:
            self._timer.cancel()

    def _say(self) -> None:
        self._console.print(self._text, markup=False, soft_wrap=True)


class Watcher:
    """A pytest plugin, for the whole run or the controller of pytest-xdist."""

    def __init__(self, console: Console, options: Options) -> None:
        self.console = console
        self._options = options
        self._workers_load = Reminder(console, loading_text(options))
        self.counts: Counter[str] = Counter()
        self.total = 0
        self._bar = counting(console, "judging", TextColumn("{task.fields[counts]}"))
        self._task = self._bar.add_task("judging", total=None, counts="")
        self._started = self._said = time.monotonic()

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionstart(self) -> Generator[None, object, object]:
        """Show the bar when the target is loaded, which the session starts with."""
        with loading(self.console, self._options):
            result = yield
        self._bar.start()
        return result

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """The cases are known."""
        if session.items:
            self._expect(len(session.items), "")

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """The cases are known, under pytest-xdist; each worker loads the target for its first."""
        if not self.counts:
            self._expect(len(ids), escape(loading_text(self._options)))
            self._workers_load.start()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a record as it arrives."""
        texts = [text for name, text in report.user_properties if name == PROPERTY]
        if not texts:
            return
        self._workers_load.stop()
        record = json.loads(str(texts[-1]))
        status = "known" if record["known"] else str(record["verdict"]["status"])
        self.counts[status] += 1
        self._bar.update(self._task, completed=self.counts.total(), counts=self._text())
        now = time.monotonic()
        if not self.console.is_terminal and now - self._said > QUIET_SECONDS:
            self._said = now
            done, seconds = self.counts.total(), now - self._started
            self.console.print(f"{done} of {self.total} cases, {seconds:.0f} s: {self._text()}")

    def pytest_sessionfinish(self) -> None:
        """Take the bar away."""
        self._workers_load.stop()
        self._bar.stop()

    def _expect(self, total: int, text: str) -> None:
        self.total = total
        self._bar.update(self._task, total=total, counts=text)

    def _text(self) -> str:
        styled = []
        for status, count in sorted(self.counts.items()):
            text = f"{count} {status}"
            styled.append(f"[red]{text}[/red]" if status in FAILED else text)
        return ", ".join(styled)
