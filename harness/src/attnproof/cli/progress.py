"""Following a run: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..report.summary import FAILED

QUIET_SECONDS = 20.0  # between lines when there is no terminal
PROPERTY = "attnproof"  # of a test report: the record, as JSON


class Watcher:
    """A pytest plugin, for the whole run or the controller of pytest-xdist."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.counts: Counter[str] = Counter()
        self.total = 0
        self._bar = Progress(
            TextColumn("judging"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[counts]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("judging", total=None, counts="loading the target")
        self._started = self._said = time.monotonic()

    def pytest_sessionstart(self) -> None:
        """Show the bar."""
        self._bar.start()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """The cases are known."""
        if session.items:
            self._expect(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """The cases are known, under pytest-xdist."""
        self._expect(len(ids))

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a record as it arrives."""
        texts = [text for name, text in report.user_properties if name == PROPERTY]
        if not texts:
            return
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
        self._bar.stop()

    def _expect(self, total: int) -> None:
        self.total = total
        self._bar.update(self._task, total=total, counts="")

    def _text(self) -> str:
        styled = []
        for status, count in sorted(self.counts.items()):
            text = f"{count} {status}"
            styled.append(f"[red]{text}[/red]" if status in FAILED else text)
        return ", ".join(styled)
