"""Following a run: what is said while a target loads; without a terminal, a line now and then."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from attnproof.cli import progress as cli_progress
from attnproof.cli.progress import Watcher, advancing, loading
from attnproof.options import Options, loading_text

OPTIONS = Options(target="some[thing].py:f")
LOADING = "loading some[thing].py:f, up to 300 s"
CASE = "heads/groups/b1_h4x2_q5_k9_d16_fp32"


def report(status: str, known: str | None = None) -> Any:
    record = {"known": known, "verdict": {"status": status}}
    return SimpleNamespace(user_properties=[("attnproof", json.dumps(record))])


def watched(
    monkeypatch: pytest.MonkeyPatch, quiet: float, *, terminal: bool = False
) -> tuple[Watcher, io.StringIO]:
    monkeypatch.setattr(cli_progress, "QUIET_SECONDS", quiet)
    text = io.StringIO()
    return Watcher(Console(file=text, width=100, force_terminal=terminal), OPTIONS), text


def started(watcher: Watcher, seconds: float = 0.0) -> None:
    """Let the session start, in which the target is loaded."""
    hook = watcher.pytest_sessionstart()
    next(hook)
    time.sleep(seconds)
    with pytest.raises(StopIteration):
        next(hook)


def test_every_outcome_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, text = watched(monkeypatch, quiet=-1.0)
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


def test_what_takes_long_to_load_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, text = watched(monkeypatch, quiet=0.05)
    started(watcher, seconds=0.5)
    assert text.getvalue() == f"{LOADING}\n"
    watcher, text = watched(monkeypatch, quiet=3600.0)
    started(watcher)
    assert text.getvalue() == ""


def test_the_bar_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, text = watched(monkeypatch, quiet=0.05, terminal=True)
    started(watcher, seconds=0.5)
    assert LOADING in text.getvalue()
    watcher.pytest_collection_finish(SimpleNamespace(items=[1]))  # type: ignore[arg-type]
    text.truncate(0)
    time.sleep(0.3)
    watcher.pytest_sessionfinish()
    assert "0/1" in text.getvalue()
    assert "loading" not in text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_workers_load_the_target_themselves_and_the_first_case_ends_that(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    watcher, text = watched(monkeypatch, quiet=0.1, terminal=terminal)
    started(watcher)
    for _ in range(2):  # workers
        watcher.pytest_xdist_node_collection_finished(None, ["a", "b"])
    time.sleep(0.5)
    assert LOADING in text.getvalue()
    assert terminal or text.getvalue() == f"{LOADING}\n"
    watcher.pytest_runtest_logreport(report("conforms"))
    text.truncate(0)
    time.sleep(0.5)
    watcher.pytest_sessionfinish()
    assert "loading" not in text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_command_says_what_it_loads(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(cli_progress, "QUIET_SECONDS", 0.05)
    text = io.StringIO()
    with loading(Console(file=text, force_terminal=terminal), OPTIONS):
        time.sleep(0.5)
    assert LOADING in text.getvalue()


def test_nothing_moves_in_front_of_a_debugger_and_no_limit_is_said() -> None:
    text = io.StringIO()
    options = Options(target="x", in_process=True)
    with loading(Console(file=text, force_terminal=True), options):
        time.sleep(0.3)
    assert text.getvalue() == ""
    assert loading_text(options) == "loading x"


COMMANDS = {
    "check": ["check", "{target}", "--chapter=heads", "--workers=1"],
    "replay": ["replay", CASE, "--target", "{target}"],
    "model": ["check", "{target}", "--model=llama-tiny"],
    "golden": ["golden", "check", "{target}", "--vectors", "{folder}/vectors"],
}
HURRIED = """
from attnproof.cli import progress
from attnproof.cli.main import main
from attnproof.golden import vectors
from attnproof.worker import runners

progress.QUIET_SECONDS = 0.2
runners.LOAD_SECONDS = 2.0
vectors.VECTORS = {}
vectors.update(vectors.Path(VECTORS_FOLDER))
main()
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_an_import_that_hangs_is_no_silence(tmp_path: Path, command: str) -> None:
    target = tmp_path / "hangs.py"
    target.write_text("import time\n\ntime.sleep(1000)\n")
    words = [word.format(target=f"{target}:f", folder=tmp_path) for word in COMMANDS[command]]
    hurried = HURRIED.replace("VECTORS_FOLDER", repr(str(tmp_path / "vectors")))
    ran = subprocess.run(
        [sys.executable, "-c", hurried, *words, "--device=cpu"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith(f"loading {target}:f, up to 2 s\n")
    assert "not loaded within 2 s" in ran.stderr


@pytest.mark.parametrize("quiet", [0.0, 60.0])
def test_what_is_done_is_said_now_and_then(monkeypatch: pytest.MonkeyPatch, quiet: float) -> None:
    monkeypatch.setattr(cli_progress, "QUIET_SECONDS", quiet)
    text = io.StringIO()
    with advancing(Console(file=text, width=100), "recomputing some[thing]") as progress:
        progress(1, 2)
    expected = "recomputing some[thing]: 1 of 2, 0 s\n" if not quiet else ""
    assert text.getvalue() == expected


def test_on_a_terminal_it_is_a_bar_that_goes_away() -> None:
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=True)
    with advancing(console, "recomputing some[thing]") as progress:
        progress(1, 2)
    assert "recomputing some[thing]" in text.getvalue()
    assert "1/2" in text.getvalue()
