"""attnproof traffic and golden/traffic: what is printed, pinned, and found to differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnproof.cli.main import app
from attnproof.golden import traffic as golden
from attnproof.traffic.sources import Setting, Traffic, sources
from attnproof.traffic.table import saved, short

ROOT = Path(__file__).parents[2]


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["traffic", *words], env={"COLUMNS": "110"})
    return result.exit_code, result.output


def test_the_table_shows_what_was_counted() -> None:
    status, text = run("-N", "64", "-d", "16", "-M", "1024")
    assert status == 0
    assert "one head, N=64 d=16 M=1024 fp16 forward" in text
    rows = [line.split() for line in text.splitlines()]
    standard = next(row for row in rows if row[:1] == ["standard"])
    # Q, K and V of 64 x 16; S and P of 64 x 64, each in and out; O.
    assert standard[1] == short(3 * 1024 + 2 * 4096)
    assert standard[2] == short(2 * 4096 + 1024)
    assert "load Q, load K, store S, load S, store P, load P, load V, store O" in text
    assert "V2 saves" in text


def test_what_takes_too_many_steps_comes_from_its_formula_and_says_so() -> None:
    _, few = run("one-pass", "-N", "32", "-d", "8", "-M", "256")
    _, many = run("one-pass", "-N", "128", "-d", "8", "-M", "256")
    assert "by its closed form" not in few
    assert "one-pass *" in many
    assert "by its closed form" in many


def test_json_and_causal_and_backward() -> None:
    status, text = run("tiled-v2", "-N", "64", "-d", "16", "-M", "1024", "--backward", "--json")
    full = json.loads(text)
    assert status == 0
    assert full["setting"]["backward"] is True
    _, text = run(
        "tiled-v2", "-N", "64", "-d", "16", "-M", "1024", "--backward", "--causal", "--json"
    )
    causal = json.loads(text)
    assert causal["counts"]["tiled-v2"]["matmul"] < full["counts"]["tiled-v2"]["matmul"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"traffic.{suffix}"
    status, _ = run("standard", "one-pass", "-N", "64", "--plot", str(file))
    assert status == 0
    assert file.stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-N", "0"], "--seqlen 0: accepted is 1 or more"),
        (["-M", "100"], "on_chip=100: accepted is 256 elements or more"),
        (["--dtype", "fp8"], "--dtype fp8: accepted are fp32, fp16, bf16"),
        (["tiled-v3"], "tiled-v3: unknown; known are standard, "),
        (["one-pass", "--backward"], "one-pass: has no backward pass"),
        (["--plot", "x.doc"], "--plot x.doc: accepted are files named .svg, .png, .pdf"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    status, text = run(*words)
    assert status == 2
    assert message in text
    assert len(text.splitlines()) == 1


def test_the_sentence_about_v2_needs_both() -> None:
    one = Traffic(loads={}, stores={}, load_bytes=0, store_bytes=0, matmul=1600, other={"mul": 100})
    two = Traffic(loads={}, stores={}, load_bytes=0, store_bytes=0, matmul=1600, other={"mul": 50})
    assert saved({"tiled-v1": one}) is None
    # 1600 + 16 x 100 against 1600 + 16 x 50: three quarters of the time.
    sentence = saved({"tiled-v1": one, "tiled-v2": two})
    assert sentence is not None
    assert "50 of V1's 100" in sentence
    assert "(50.0%)" in sentence
    assert "25.0% of its time" in sentence


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "SIZES", ((16, 8, 256),))


@pytest.mark.usefixtures("few")
def test_golden_counts_are_pinned(tmp_path: Path) -> None:
    assert golden.update(tmp_path)
    assert golden.verify(tmp_path) == []
    assert golden.update(tmp_path) == []
    file = tmp_path / golden.COUNTS
    stored = json.loads(file.read_text())
    setting = str(golden.settings()[0])
    stored[setting]["tiled-v1"]["matmul"] += 1
    del stored[setting]["standard"]
    file.write_text(json.dumps(stored))
    said = "\n".join(golden.verify(tmp_path))
    assert "SHA-256" in said
    assert f"{setting}: tiled-v1: matmul" in said
    assert f"{setting}: standard is new" in said
    file.write_text("{")
    assert "not readable" in golden.verify(tmp_path)[0]


def test_checked_in_counts_agree() -> None:
    assert golden.verify(ROOT / golden.DIRECTORY) == []


def test_every_source_says_what_it_is() -> None:
    setting = Setting(seqlen=16, head_dim=8, on_chip=256)
    for name, source in sources().items():
        assert source.name == name
        assert source.title
        assert source.count(setting).accesses > 0
