"""The command line: exit status, one clear line for a user's mistake, what is printed and written.

Whole runs go through a subprocess, over the smallest chapters.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnproof.cli.main import app, main

TARGETS = Path(__file__).parent / "planted" / "small.py"
CASE = "heads/groups/b1_h4x2_q5_k9_d16_fp32"


def attnproof(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command; results must not depend on the folder or on a pytest set-up around it."""
    return subprocess.run(
        [sys.executable, "-m", "attnproof", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "--no-such-option"},
        check=False,
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert result.stdout == ""
    assert result.stderr.startswith("attnproof: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


MISTAKES = [
    (["check", "sdpa", "--chapter", "nope"], "--chapter nope: unknown; accepted are "),
    (["check", "sdpa", "--level", "slow"], "--level slow: unknown; accepted are quick, full"),
    (["check", "sdpa", "--dtype", "fp8"], "--dtype fp8: unknown; accepted are fp64, fp32"),
    (["check", "sdpa", "--device", "tpu"], "--device tpu: unknown; accepted are auto, cpu, cuda"),
    (["check", "sdpa", "--precision", "x"], "--precision x: unknown; accepted are flash"),
    (["check", "sdpa", "--timeout", "-1"], "--timeout -1: accepted is a time above 0 seconds"),
    (["check", "sdpa", "--resume"], "--resume: needs --json"),
    (["check", "sdpa", "--json", "/"], "--json '/': is a folder; accepted is a file"),
    (["check", "sdpa", "--json", ""], "--json '.': is a folder; accepted is a file"),
    (["check", "sdpa", "--json", "/nonexistent/x"], "'/nonexistent/x': there is no folder"),
    (["check", "sdpa", "--report", __file__], "test_cli.py: is a file; accepted is a folder"),
    (["replay", "nope/x/b1", "--target", "sdpa"], "chapter 'nope': unknown; known are "),
    (["replay", "mask/x/b1", "--target", "sdpa"], "'mask': unknown, did you mean masks?"),
    (["replay", "masks/nope/b1", "--target", "sdpa"], "chapter masks has no check 'nope'"),
    (["replay", "masks/windw/b1", "--target", "sdpa"], "'windw', did you mean window?"),
    (
        ["replay", "masks/window/b1_h1x1_q130_k150_d64_fp32_windo=1,0", "--target", "sdpa"],
        "not understood, did you mean b1_h1x1_q130_k150_d64_fp32_window=1,0?",
    ),
    (["replay", "masks/window/zz", "--target", "sdpa"], "part 'zz' is not understood"),
    (["list", "--device", "tpu"], "--device tpu: unknown"),
    (["explain", "/nonexistent.safetensors"], "does not exist"),
    (["golden", "verify", "/nonexistent"], "golden verify: /nonexistent: no such directory"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_a_mistake_gives_one_line_and_status_2(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("attnproof: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check"], "Missing argument 'TARGET'"),
        (["check", "sdpa", "--bogus"], "--bogus"),
        (["check", "sdpa", "--timeout", "abc"], "Invalid value for '--timeout'"),
        (["frobnicate"], "'frobnicate'"),
    ],
)
def test_what_is_no_command_line_gives_one_line_and_status_2(
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["attnproof", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("attnproof: ")
    assert words in said.err
    assert said.err.count("\n") == 1


def test_help_says_what_the_exit_status_means() -> None:
    result = CliRunner().invoke(app, ["check", "--help"])
    assert result.exit_code == 0
    assert "0 it conforms, 1 it does not, or more cases" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nosuch", "unknown backend; registered are "),
        ("egaer", "unknown backend; did you mean eager? registered are "),
        ("", "'': is not a target"),
        (str(TARGETS.parent), "is a folder; a target is "),
        ("math:sin", "match no signature"),
        (f"{TARGETS}:nosuch", f"file '{TARGETS}' has no attribute 'nosuch'"),
    ],
)
def test_a_target_that_cannot_be_loaded_gives_one_line_and_status_2(
    target: str, words: str
) -> None:
    result = CliRunner().invoke(app, ["replay", CASE, "--target", target, "--in-process"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_check_refuses_such_a_target_in_the_same_way() -> None:
    result = attnproof("check", f"{TARGETS}:nosuch", "--chapter", "heads", "--device", "cpu")
    assert result.returncode == 2
    assert "has no attribute 'nosuch'" in one_line(result)


def test_a_target_that_conforms(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["check", f"{TARGETS}:right", "--device=cpu", "--chapter=heads", "--dtype=fp32"]
    result = attnproof(*arguments, "--workers=2", f"--json={out}", folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-2] == f"{TARGETS}:right"
    assert lines[-1].startswith("conforms: ")
    assert any(line.split()[:1] == ["gqa"] for line in lines)
    found = json.loads(out.read_text())
    assert found["summary"]["exit_status"] == 0
    assert found["summary"]["line"] == lines[-1]
    assert found["run"]["chapters"] == ["heads"]
    assert "torch" in found["environment"]["versions"]
    assert {case["verdict"] for case in found["cases"]} <= {"conforms", "unsupported"}
    journal = (tmp_path / "out.jsonl").read_text().splitlines()
    assert len(journal) == 1 + len(found["cases"])


def test_a_target_that_deviates(tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "report"
    arguments = ["check", "small.py:modulo", "--device=cpu", "--chapter=heads", "--workers=1"]
    result = attnproof(*arguments, f"--json={out}", f"--report={page}", folder=TARGETS.parent)
    assert result.returncode == 1, result.stdout + result.stderr
    text = result.stdout
    assert text.splitlines()[-1].startswith("deviates: gqa (")
    assert text.splitlines()[-1].endswith(
        " – looks like: attention with query head h reading kv head h % heads_kv"
    )
    assert "out equals attention with query head h reading kv head h % heads_kv" in text
    assert "error over budget of out: query rows down, heads across" in text
    assert "replay: attnproof replay heads/groups/b1_" in text
    # At least two key heads of two query heads each are needed to see it.
    assert "smallest that fails: b1_h4x2_q1_k" in text
    found = json.loads(out.read_text())
    assert found["summary"]["verdict"] == "does not conform"
    gqa = next(row for row in found["features"] if row["feature"] == "gqa")
    assert gqa["deviates"] > 0
    assert "background:" in (page / "index.html").read_text()


@pytest.mark.parametrize("head_dim", [40, 80])
def test_a_target_of_one_dtype_meets_every_head_dimension(head_dim: int, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    target = f"{TARGETS}:bf16_wrong_at_{head_dim}"
    arguments = ["check", target, "--device=cpu", "--chapter=numerics", f"--json={out}"]
    result = attnproof(*arguments)
    assert result.returncode == 1, result.stdout + result.stderr
    deviates = [c["id"] for c in json.loads(out.read_text())["cases"] if c["verdict"] == "deviates"]
    assert deviates == [f"numerics/head_dims/b1_h2x2_q33_k65_d{head_dim}_bf16"]


def test_a_target_that_supports_nothing_gives_status_3() -> None:
    arguments = ["check", f"{TARGETS}:nothing", "--device=cpu", "--chapter=heads", "--workers=1"]
    result = attnproof(*arguments)
    assert result.returncode == 3, result.stdout + result.stderr
    last = result.stdout.splitlines()[-1]
    assert last.startswith("could not be judged: ")
    assert last.endswith("unsupported: not today")


def test_a_target_that_is_not_available_here_gives_its_reason_and_status_3() -> None:
    result = attnproof("check", f"{TARGETS}:away", "--device=cpu", "--chapter=heads")
    assert result.returncode == 3
    assert "cannot be judged here: needs another planet" in one_line(result)


def test_a_skip_budget_makes_an_absent_target_a_failure_and_its_reason_is_in_the_json(
    tmp_path: Path,
) -> None:
    words = ["--device=cpu", "--chapter=heads", "--json", str(tmp_path / "run.json")]
    result = attnproof("check", f"{TARGETS}:away", *words)
    assert result.returncode == 3
    summary = json.loads((tmp_path / "run.json").read_text())["summary"]
    assert (summary["exit_status"], summary["unavailable"]) == (3, "needs another planet")
    result = attnproof("check", f"{TARGETS}:away", *words, "--skip-budget=9")
    assert result.returncode == 1
    assert "needs another planet; the skip budget is 9" in one_line(result)
    summary = json.loads((tmp_path / "run.json").read_text())["summary"]
    assert (summary["exit_status"], summary["verdict"]) == (1, "not run")


@pytest.mark.parametrize(("function", "status"), [("right", 0), ("modulo", 1), ("nothing", 3)])
def test_replay_runs_one_case(function: str, status: int, tmp_path: Path) -> None:
    target, saved = f"{TARGETS}:{function}", tmp_path / "call.safetensors"
    options = ["--target", target, "--device", "cpu", "--in-process"]
    wanted = ["--shrink", "--save", str(saved)] if status == 1 else []
    result = CliRunner().invoke(app, ["replay", CASE, *options, *wanted])
    assert result.exit_code == status, result.output
    if status != 1:
        assert result.stdout.splitlines()[0] == CASE
        assert ("largest error over its budget: out 0." in result.stdout) == (status == 0)
        return
    assert "smaller problems tried; the smallest that fails:\n" in result.stdout
    assert "heads/groups/b1_h4x2_q1_k1_d8_fp32" in result.stdout
    explained = CliRunner().invoke(app, ["explain", str(saved)])
    assert explained.exit_code == 1
    assert "b1_h4x2_q1_k1_d8_fp32" in explained.stdout


def test_nothing_to_save_does_not_change_the_verdict(tmp_path: Path) -> None:
    target, saved = f"{TARGETS}:right", tmp_path / "call.safetensors"
    options = ["--target", target, "--device", "cpu", "--in-process", "--save", str(saved)]
    result = CliRunner().invoke(app, ["replay", CASE, *options])
    assert result.exit_code == 0
    assert "no call deviates by value, nothing written" in result.stderr
    assert not saved.exists()


def test_golden_says_what_differs(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["golden", "verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "manifest.json: missing" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("differs: ")
