"""Faults of online softmax, each caught twice: by a law of the state, and by the harness.

The laws see the same operations that the kernel is made of which the harness judges.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import planted_steps
import pytest
import torch
from softmax_laws import LAWS, breaks

from online_softmax.arithmetic import TWO, E

TARGETS = Path(planted_steps.__file__)
BASES = {"e": E, "2": TWO}

# The laws that must not hold.
BROKEN = {
    "no_rescale": {"associative", "exact", "splits", "absorb", "passes", "values shift"},
    "m_starts_at_zero": {"neutral", "empty states", "monotone", "scores shift", "finite"},
    "d_starts_at_one": {"neutral"},
    "merge_forgets_one_exponent": {"commutative", "associative", "exact", "splits", "absorb"},
    "bases_mixed": {"associative", "splits", "absorb", "passes", "bases"},
}
# Laws that it takes a fault of another kind to break: what is found is told apart.
KEPT = {
    "no_rescale": {"commutative", "neutral", "monotone", "finite"},
    "m_starts_at_zero": {"commutative", "associative", "exact", "splits"},
    "d_starts_at_one": set(LAWS) - {"neutral"},
    "merge_forgets_one_exponent": {"passes", "monotone", "scores shift"},
    "bases_mixed": {"commutative", "exact", "neutral", "monotone"},
}
# Where the harness must find it: chapter, and the features of the table that must fail.
FOUND = {
    "no_rescale": ("heads", {"gqa", "head_dim_v"}),
    # Where all scores are far below 0, nothing is left of a sum relative to 0.
    "m_starts_at_zero": ("masks", {"boolean mask"}),
    # A key, even a hidden one, removes what is there at the start. Sequences of no key keep it.
    "d_starts_at_one": ("varlen", {"key lengths"}),
    "merge_forgets_one_exponent": ("heads", {"gqa", "head_dim_v"}),
    "bases_mixed": ("heads", {"gqa", "head_dim_v"}),
}
# The others run where slow tests do; the laws run always.
EXEMPLARY = {"d_starts_at_one"}


def test_every_fault_must_be_caught_twice():
    assert set(BROKEN) == set(KEPT) == set(FOUND) == set(planted_steps.FAULTS)


@pytest.mark.parametrize("law", LAWS)
def test_the_correct_copy_keeps_every_law(law):
    for base in BASES.values():
        for dtype in (torch.float32, torch.float64):
            assert not breaks(law, planted_steps.CORRECT, dtype, base)


@pytest.mark.parametrize(
    ("fault", "law"), [(f, law) for f, laws in BROKEN.items() for law in sorted(laws)]
)
def test_a_law_catches_it(fault, law):
    assert breaks(law, planted_steps.IMPLEMENTATIONS[fault], torch.float32, TWO)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fault", planted_steps.FAULTS)
def test_laws_that_have_nothing_to_do_with_it_hold(fault, base):
    impl = planted_steps.IMPLEMENTATIONS[fault]
    for law in KEPT[fault]:
        assert not breaks(law, impl, torch.float32, BASES[base]), law


def check(target: str, folder: Path, *chapters: str) -> tuple[int, str, dict[str, Any]]:
    """Exit status, output and JSON of the command line."""
    result = folder / "result.json"
    main = "from attnproof.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", main, "check", f"{TARGETS}:{target}", "--device=cpu"]
        + ["--dtype=fp32", "--workers=1", f"--json={result}"]
        + [f"--chapter={chapter}" for chapter in chapters],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.exists(), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads(result.read_text())


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(fault, marks=() if fault in EXEMPLARY else pytest.mark.slow)
        for fault in planted_steps.FAULTS
    ],
)
def test_the_harness_catches_it(fault, tmp_path):
    chapter, features = FOUND[fault]
    status, out, result = check(fault, tmp_path, chapter)
    assert status == 1, out
    rows = {row["feature"]: row for row in result["features"]}
    for feature in features:
        assert rows[feature]["deviates"] > 0, out
        assert feature in result["summary"]["line"]
    assert not any(row["crashed"] for row in rows.values()), out


@pytest.mark.slow
def test_the_correct_copy_conforms(tmp_path):
    chapters = {chapter for chapter, _ in FOUND.values()} | {"numerics", "lse"}
    status, out, result = check("correct", tmp_path, *sorted(chapters))
    assert status == 0, out
    judged = {row["feature"] for row in result["features"] if row["conforms"]}
    assert judged >= {"lse", "distributions"}.union(*(features for _, features in FOUND.values()))
