"""The JUnit file and the summary page of results that ``attnproof`` wrote."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from attnproof.record import CaseRecord
from attnproof.report.summary import document
from attnproof.verdict import Status, Verdict

TOOLS = Path(__file__).parents[1]


def record(number, status, reason="", known=None):
    return CaseRecord(
        id=f"masks/window/{number}",
        chapter="masks",
        feature="window",
        problem="b1",
        verdict=Verdict(status=Status(status), reason=reason).as_dict(),
        seconds=0.5,
        known=known,
    )


@pytest.fixture
def folder(tmp_path):
    """Results of a backend that deviates, one that cannot run here, and a golden one."""
    records = [
        record(1, "conforms"),
        record(2, "deviates", "out is off\nby \x00 much"),
        record(3, "unsupported", "no window"),
        record(4, "deviates", "as known", known="a bug of torch"),
    ]
    (tmp_path / "golden").mkdir()
    for name, found in (
        ("wrong", document(records, {}, {})),
        ("away", document([], {}, {}, unavailable="needs sm_90; this is Tesla T4, sm_75")),
        ("golden/wrong", document(records[:1], {}, {})),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    return tmp_path


def run(tool, *words):
    return subprocess.run(
        [sys.executable, TOOLS / tool, *words], capture_output=True, text=True, check=False
    )


def test_junit(folder):
    done = run("junit.py", folder, folder / "golden")
    assert done.returncode == 0, done.stderr
    suites = {suite.get("name"): suite for suite in ElementTree.fromstring(done.stdout)}
    assert suites.keys() == {"away", "wrong", "golden.wrong"}
    counts = [suites["wrong"].get(name) for name in ("tests", "failures", "skipped")]
    assert counts == ["4", "1", "2"]
    (failure,) = suites["wrong"].iter("failure")
    assert failure.get("message") == "deviates: out is off"
    assert failure.text == "out is off\nby ? much"
    assert {skip.get("message") for skip in suites["wrong"].iter("skipped")} == {
        "unsupported: no window",
        "deviates: a bug of torch",
    }
    (skipped,) = suites["away"].iter("skipped")
    assert "needs sm_90; this is Tesla T4, sm_75" in skipped.get("message")


def test_junit_without_results_is_an_error(tmp_path):
    assert "no results" in run("junit.py", tmp_path).stderr


def test_the_page(folder):
    report = {
        "hardware": {
            "driver": "580.1",
            "gpus": [{"name": "H100", "sm": "sm_90", "multiprocessors": 132, "memory_gib": 79.2}],
        },
        "torch": {"version": "2.11.0", "cuda": "13.0"},
    }
    (folder / "doctor.json").write_text(json.dumps(report))
    said = run("step_summary.py", folder).stdout
    assert "- H100, sm_90, 132 SMs, 79.2 GiB" in said
    assert "- driver 580.1, torch 2.11.0, CUDA 13.0" in said
    assert "- wrong: conforms: 1 case" in said
    assert "- **away** was not judged: needs sm_90; this is Tesla T4, sm_75" in said
    assert "- **wrong**: 1 of 4\n  - 1: no window" in said
    assert "**1 of 3 fail**" in said
