"""attnproof traffic and golden/traffic: what is printed, pinned, and found to differ."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from attnproof.cli.main import app
from attnproof.golden import traffic as golden
from attnproof.traffic.sources import Setting, Traffic, sources
from attnproof.traffic.table import by_tensor, overview, saved, short

ROOT = Path(__file__).parents[2]
SETTING = Setting(seqlen=16, head_dim=16, on_chip=1024)


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
    assert "tiled-v2 computes" in text


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


def traffic(**given: Any) -> Traffic:
    """1600 operations of matmul and 100 others, a kilobyte each way, but for what is given."""
    counts = {"loads": {}, "stores": {}, "load_bytes": 1024, "store_bytes": 1024, "matmul": 1600}
    return Traffic(**{**counts, "other": {"mul": 100}, **given})


def test_a_sentence_for_each_v2_beside_its_v1() -> None:
    one, two = traffic(), traffic(other={"mul": 50})
    assert saved({"tiled-v1": one, "triton-v2": two}) == []
    # 1600 + 16 x 100 against 1600 + 16 x 50: three quarters of the time.
    (sentence,) = saved({"tiled-v1": one, "tiled-v2": two})
    assert sentence == (
        "tiled-v2 computes 50 (50.0%) fewer operations that are no matmul than the 100 of "
        "tiled-v1, and takes 25.0% less time if those take 16 times as long as matmul's."
    )
    both = {"tiled-v1": one, "tiled-v2": two, "triton-v1": two, "triton-v2": one}
    (_, sentence) = saved(both)
    assert "triton-v2 computes 50 (100.0%) more operations" in sentence
    assert "than the 50 of triton-v1, and takes 33.3% more time" in sentence


def test_no_console_is_too_narrow() -> None:
    elements = {"Q": 123_000, "partial LSE": 45_600_000}  # "45.6M / 45.6M"
    found = {f"tiled-v{n}": traffic(loads=elements, stores=elements, ran=False) for n in range(8)}
    tables = {}
    for width in (80, 110, 300):
        console = Console(file=io.StringIO(), width=width)
        parts = by_tensor(found, console)
        with console.capture() as captured:
            console.print(overview(SETTING, found, console), *parts)
        text = captured.get()
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        assert ("█" in text) == (width > 80)
        heads = [line.split()[1:] for line in text.splitlines() if line.startswith("  tensor")]
        assert [name for head in heads for name in head] == list(found)
        tables[width] = len(parts)
    assert tables == {80: 2, 110: 2, 300: 1}
    assert len(by_tensor(found, Console(width=5))) == len(found)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "SIZES", ((16, 8, 256),))


@pytest.mark.usefixtures("few")
def test_golden_counts_are_pinned(tmp_path: Path) -> None:
    assert golden.update(tmp_path).changed == ["counts.json: written", "manifest.json: written"]
    assert golden.verify(tmp_path) == []
    assert golden.update(tmp_path).changed == []
    file = tmp_path / golden.COUNTS
    stored = json.loads(file.read_text())
    setting = str(golden.settings()[0])
    assert "triton-v1" not in stored[setting], "does not support it"
    stored[setting]["tiled-v1"]["matmul"] += 1
    del stored[setting]["standard"]
    file.write_text(json.dumps(stored))
    said = "\n".join(golden.verify(tmp_path))
    assert "SHA-256" in said
    assert f"{setting}: tiled-v1: matmul" in said
    assert f"{setting}: standard is new" in said
    update = golden.update(tmp_path)
    assert update.notes == said.splitlines()
    assert update.changed == ["counts.json: written"], "the manifest was right"
    file.write_text("{")
    assert "not readable" in golden.verify(tmp_path)[0]


def test_checked_in_counts_agree() -> None:
    absent = {"triton-v1", "triton-v2"} - sources().keys()  # the harness goes without the package
    gone = tuple(f": {name} is gone" for name in absent)
    differences = golden.verify(ROOT / golden.DIRECTORY)
    assert [said for said in differences if not said.endswith(gone)] == []


def test_every_source_says_what_it_is() -> None:
    for name, source in sources().items():
        assert source.name == name
        assert source.title
        assert source.unsupported(SETTING) is None
        assert source.count(SETTING).accesses > 0
