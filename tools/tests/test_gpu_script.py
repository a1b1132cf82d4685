"""tools/gpu.sh tells when something failed, and shows nothing old."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gpu.sh"
PROGRAMS = ("python3", "attnproof", "compute-sanitizer")

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("bash") is None, reason="the script is one of bash"
)


def run(folder, status, *parts, **variables):
    """The script, with programs that only note how they are called, and end with that status."""
    return run_words(folder, status, folder / "results", *parts, **variables)


def run_words(folder, status, *words, programs=PROGRAMS, **variables):
    stubs = folder / "stubs"
    stubs.mkdir()
    for name in programs:
        stub = stubs / name
        stub.write_text(f'#!/bin/sh\necho "{name} $@" >>"{folder}/calls"\nexit {status}\n')
        stub.chmod(0o755)
    path = os.pathsep.join([str(stubs), os.environ["PATH"]])
    return subprocess.run(
        ["bash", SCRIPT, *words],
        env=os.environ | {"PATH": path} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("part", ["checks", "golden", "tests", "sanitize", "bench"])
def test_a_part_that_fails_fails_the_run(tmp_path, part):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tests.txt").write_text("")
    done = run(tmp_path, 7, part)
    assert done.returncode == 1
    assert f"{part}: " in done.stdout


def test_what_passes_passes(tmp_path):
    (tmp_path / "results").mkdir()
    assert run(tmp_path, 0, "tests").returncode == 0


def test_a_sanitizer_that_finds_nothing_planted_fails_the_run(tmp_path):
    done = run(tmp_path, 0, "sanitize")
    assert done.returncode == 1
    assert "racecheck did not find what was planted" in done.stdout


@pytest.mark.parametrize("part", ["chekcs", "", "fail", "calibrate", "checks golden", "*"])
def test_an_unknown_part_is_refused_before_anything_is_touched(tmp_path, part):
    old = tmp_path / "results" / "eager.json"
    old.parent.mkdir()
    old.write_text("{}")
    done = run(tmp_path, 0, "tests", part)
    assert done.returncode == 2
    assert done.stderr == (
        f"tools/gpu.sh: part '{part}': unknown; accepted are checks, golden, tests, sanitize, "
        "bench, cuda, cpu\n"
    )
    assert done.stdout == ""
    assert old.exists()
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("words", [(), ("",)])
def test_without_a_folder_for_results_nothing_is_run(tmp_path, words):
    # It wrote to / and removed what lay there; hence no rm.
    done = run_words(tmp_path, 0, *words, programs=(*PROGRAMS, "rm", "timeout"))
    assert done.returncode == 2
    assert done.stderr == "usage: tools/gpu.sh RESULTS [PART...]\n"
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(("resume", "kept"), [("", False), ("1", True)])
def test_results_of_before_are_shown_only_on_request(tmp_path, resume, kept):
    old = [
        tmp_path / "results" / name for name in ("eager.json", "eager.jsonl", "golden/eager.json")
    ]
    calibration = tmp_path / "results" / "cuda-flex.jsonl"
    (tmp_path / "results" / "golden").mkdir(parents=True)
    for file in (*old, calibration):
        file.write_text("{}")
    run(tmp_path, 0, "checks", RESUME=resume)
    assert [file.exists() for file in old] == [kept] * 3
    assert calibration.exists()


def test_the_benchmark_runs_when_it_is_named(tmp_path):
    given = {"BACKENDS": "triton-v2 flex", "BENCH": "--baseline flex --only forward"}
    run(tmp_path, 0, "bench", RESUME="1", SECONDS_EACH="60", **given)
    (call,) = [c for c in (tmp_path / "calls").read_text().splitlines() if " bench " in c]
    results = tmp_path / "results" / "bench"
    assert call == (
        "attnproof bench triton-v2 flex --device cuda --seconds 60 --resume --baseline flex "
        f"--only forward --json {results}/bench.json --plot {results}/bench.svg"
    )
    (tmp_path / "calls").unlink()
    shutil.rmtree(tmp_path / "stubs")
    run(tmp_path, 0)
    assert " bench " not in (tmp_path / "calls").read_text()
