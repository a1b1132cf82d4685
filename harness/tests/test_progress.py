"""Following a run without a terminal: a line now and then."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from attnproof.cli import progress as cli_progress
from attnproof.cli.progress import Watcher


def report(status: str, known: str | None = None) -> Any:
    record = {"known": known, "verdict": {"status": status}}
    return SimpleNamespace(user_properties=[("attnproof", json.dumps(record))])


def watched(monkeypatch: pytest.MonkeyPatch, quiet: float) -> tuple[Watcher, io.StringIO]:
    monkeypatch.setattr(cli_progress, "QUIET_SECONDS", quiet)
    text = io.StringIO()
    return Watcher(Console(file=text, width=100)), text


def test_every_outcome_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, text = watched(monkeypatch, quiet=-1.0)
    watcher.pytest_sessionstart()
    watcher.pytest_collection_finish(SimpleNamespace(items=[1, 2, 3, 4]))  # type: ignore[arg-type]
    watcher.pytest_runtest_logreport(report("conforms"))
    watcher.pytest_runtest_logreport(SimpleNamespace(user_properties=[]))  # type: ignore[arg-type]
    watcher.pytest_runtest_logreport(report("deviates"))
    watcher.pytest_runtest_logreport(report("deviates", known="a bug of torch"))
    watcher.pytest_sessionfinish()
    assert [line.split(" s: ")[1] for line in text.getvalue().splitlines() if line] == [
        "1 conforms",
        "1 conforms, 1 deviates",
        "1 conforms, 1 deviates, 1 known",
    ]
    assert "3 of 4 cases" in text.getvalue()


def test_lines_are_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, text = watched(monkeypatch, quiet=3600.0)
    for _ in range(5):
        watcher.pytest_runtest_logreport(report("conforms"))
    assert text.getvalue() == ""
    assert watcher.counts["conforms"] == 5


def test_the_number_of_cases_is_known_under_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, _ = watched(monkeypatch, quiet=3600.0)
    watcher.pytest_xdist_node_collection_finished(None, ["a", "b"])
    assert watcher.total == 2
