"""attnproof bench: options, exit statuses, and a run that is gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnproof.benchmark import ceilings, suites
from attnproof.benchmark.suites import Cell
from attnproof.cli.main import app

PLANTED = Path(__file__).parent / "planted" / "benchmarked.py"
SQUARE = suites.Problem(heads_q=2, seqlen_q=32, head_dim=16, causal="top-left")


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "--device=cpu", *words], env={"COLUMNS": "100"})
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite of two cells."""
    cells = [
        Cell(suite="tiny", direction="forward", problem=SQUARE.replace(causal=causal))
        for causal in ("none", "top-left")
    ]
    monkeypatch.setitem(suites.SUITES, "tiny", lambda dtype: iter(cells))
    monkeypatch.setattr(ceilings, "REPEATS", 2)
    monkeypatch.setitem(ceilings.MEMORY_BYTES, "cpu", 1 << 24)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite=paper"], "--suite paper: unknown; accepted are papers, decoding, overhead"),
        (["--dtype=int8"], "--dtype int8: unknown; accepted are fp64, fp32"),
        (["--rounds=0"], "--rounds 0: accepted is 1 or more"),
        (["--seconds=-1"], "--seconds -1: accepted is a time above 0 seconds"),
        (["--only=d4096"], "--only d4096: in the name of no cell; one is forward-"),
        (["--only=d(64"], "--only d(64: accepted is a regular expression: missing )"),
        (["--resume"], "--resume: needs --json"),
        (["--plot=rates.txt"], "--plot rates.txt: accepted are files named .svg, .png, .pdf"),
        (["--json=nowhere/b.json"], "--json 'nowhere/b.json': there is no folder nowhere"),
        (["--device=tpu"], "--device tpu: unknown; accepted are auto, cpu, cuda"),
        (["sdqa"], "sdqa: unknown backend; did you mean sdpa"),
        (["sdpa", "--baseline=eager"], "--baseline eager: accepted is one of the targets: sdpa"),
        (["--show=README"], "--show README: cannot be read: No such file or directory"),
    ],
)
def test_bad_usage_is_one_line(words: list[str], said: str) -> None:
    status, text = run(*words)
    assert status == 2
    assert said in text
    assert len(text.strip().splitlines()) == 1


def test_what_cannot_run_here_is_said() -> None:
    status, text = run("sdpa-efficient")
    assert status == 3
    assert "nothing can be measured here: sdpa-efficient: " in text


@pytest.mark.usefixtures("_tiny")
def test_a_run_that_is_out_of_time_says_how_to_go_on(tmp_path: Path) -> None:
    words = ["sdpa", "--suite=tiny", "--rounds=1", f"--json={tmp_path / 'run.json'}"]
    status, text = run(*words, "--seconds=1e-9")
    assert status == 130
    assert "2 cells not measured; go on with the same command and --resume" in text


@pytest.mark.usefixtures("_tiny")
def test_a_run_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    words = ["sdpa", "sdpa-math", "--suite=tiny", "--rounds=1", f"--json={path}"]
    status, text = run(*words, "--only=causal")
    assert status == 0, text
    before = json.loads(path.read_text("utf-8"))["benchmarks"]
    status, text = run(*words, "--resume", "--baseline=sdpa", f"--plot={tmp_path / 'a.svg'}")
    assert status == 0, text
    assert "2 measurements taken over from the earlier run" in text
    assert "geometric mean" in text
    assert (tmp_path / "a.svg").exists()
    after = json.loads(path.read_text("utf-8"))["benchmarks"]
    assert after[: len(before)] == before
    assert len(after) == 4
    _, shown = run(f"--show={path}", "--baseline=sdpa")
    assert "geometric mean" in shown
    status, text = run(f"--show={path}", "--baseline=eager")
    assert status == 2
    assert f"--baseline eager: accepted is one of the targets of {path}: sdpa, sdpa-math" in text
    _, shown = run(f"--show={path}", "--only=forward", "--only=causal")
    assert "S32 causal" in shown
    assert "S32 full" not in shown
    status, text = run(*words, "--resume", "--seed=1")
    assert status == 2
    assert "is of a run with seed 0, not 1; it cannot be resumed with this one" in text


@pytest.mark.usefixtures("_tiny")
def test_a_failed_measurement_is_no_success(tmp_path: Path) -> None:
    words = [f"{PLANTED}:zeros", "--signature=sdpa", "--suite=tiny", "--rounds=1", "--only=k32_d"]
    status, text = run(*words)
    assert status == 1
    assert "deviates" in text
    assert "causal top-left is not supported" in text
    assert "0 measured (0 timed calls, 0 of them judged), 1 failed, 1 not measured" in text
