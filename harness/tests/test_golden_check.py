"""A target judged on the golden vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnproof.cli.main import app
from attnproof.golden import judging
from attnproof.golden import vectors as golden
from attnproof.golden.problems import VECTORS

SOME = ("causal-top-left", "dropout", "window")
TARGET = """
import torch


def attention(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril({diagonal})
        scores = scores.masked_fill(~seen, float("-inf"))
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value
"""


@pytest.fixture
def some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with three vectors, which are all that there are."""
    chosen = {name: VECTORS[name] for name in SOME}
    monkeypatch.setattr(golden, "VECTORS", chosen)
    monkeypatch.setattr(judging, "VECTORS", chosen)
    golden.update(tmp_path / "vectors")
    return tmp_path / "vectors"


def check(vectors: Path, target: str, *options: str) -> tuple[int, str]:
    words = ["golden", "check", target, "--vectors", str(vectors), "--device=cpu", "--in-process"]
    result = CliRunner().invoke(app, [*words, *options])
    return result.exit_code, result.output


def written(folder: Path, *, diagonal: int) -> str:
    path = folder / f"target_{diagonal}.py"
    path.write_text(TARGET.format(diagonal=diagonal))
    return f"{path}:attention"


def test_a_target_that_conforms_and_what_it_does_not_support(some: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    status, said = check(some, "sdpa", f"--json={file}")
    assert status == 0, said
    assert "not run: 1 of 3 cases" in said
    assert "conforms: 2 cases, 1 unsupported" in said
    cases = {case["feature"]: case for case in json.loads(file.read_text())["cases"]}
    assert cases.keys() == set(SOME)
    assert cases["window"]["verdict"] == "unsupported"
    assert 0 < cases["causal-top-left"]["worst"] < 1
    assert cases["dropout"]["chapter"] == "golden"


def test_a_target_that_is_wrong_on_one_vector(some: Path, tmp_path: Path) -> None:
    assert check(some, written(tmp_path, diagonal=0))[0] == 0
    status, said = check(some, written(tmp_path, diagonal=1))
    assert status == 1
    assert "deviates: causal-top-left (1 of 1)" in said


def test_a_skip_budget_holds_here_too(some: Path) -> None:
    assert check(some, "sdpa", "--skip-budget=1")[0] == 0
    status, said = check(some, "sdpa", "--skip-budget=0")
    assert status == 1
    assert "1 case not run, and the skip budget is 0" in said


def test_a_target_that_is_not_here_is_not_judged(some: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    status, said = check(some, "sdpa-cudnn", f"--json={file}")
    assert status == 3
    assert "does not run on cpu" in said
    assert json.loads(file.read_text())["summary"]["unavailable"].startswith("does not run on cpu")


def test_nothing_is_judged_on_vectors_that_differ(some: Path) -> None:
    path = some / "window.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    status, said = check(some, "sdpa")
    assert status == 2
    assert "window: " in said
    assert "does not hold the vectors of this version" in said
