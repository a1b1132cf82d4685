"""The files of the benchmark: pytest-benchmark reads them, and a run goes on from them."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from attn_reference.problem import Problem
from attnproof.benchmark.measurement import Ended, Measurement
from attnproof.benchmark.plot import plot
from attnproof.benchmark.ratios import by_kind, ratios
from attnproof.benchmark.statistics import summary
from attnproof.benchmark.storage import StorageError, read, resume, write
from attnproof.benchmark.suites import Cell
from attnproof.benchmark.table import reasons, tables

RUN = {"targets": ["fast", "slow"], "seed": 0}


def cell(seqlen: int, direction: str = "forward", **more: object) -> Cell:
    problem = Problem(heads_q=2, seqlen_q=seqlen, dtype="bf16", **more)  # type: ignore[arg-type]
    return Cell(suite="test", direction=direction, problem=problem)


def measured(target: str, at: Cell, *seconds: float) -> Measurement:
    return Measurement(
        cell=at,
        target=target,
        ended=Ended.MEASURED,
        seconds=seconds,
        judged=1,
        sample="all of it",
        flops=4e9,
        bytes=10**7,
        ceilings={"matmul": 1e13, "memory": 1e11},
        startup={"import": 1.0, "first": 0.5, "total": 1.5},
    )


def a_run() -> list[Measurement]:
    found = []
    for seqlen in (128, 256):
        found.append(measured("fast", cell(seqlen), 1e-3, 1.1e-3, 1.05e-3))
        found.append(measured("slow", cell(seqlen), 2e-3, 2.1e-3, 4e-3 * seqlen / 128))
    found.append(measured("fast", cell(512), 1e-3))
    found.append(
        Measurement(cell=cell(512), target="slow", ended=Ended.UNSUPPORTED, reason="too long")
    )
    return found


@pytest.mark.parametrize("count", range(1, 10))
def test_statistics_are_those_of_pytest_benchmark(count: int) -> None:
    from pytest_benchmark.stats import Stats

    chance = random.Random(count)
    theirs = Stats()
    for _ in range(count):
        theirs.update(chance.lognormvariate(0, 1))
    ours = summary(theirs.data, 1)
    for name, value in theirs.as_dict().items():
        assert ours[name] == pytest.approx(value), name
    assert ours["data"] == theirs.data


def test_pytest_benchmark_compares_and_draws_two_runs(tmp_path: Path) -> None:
    for number in ("0001", "0002"):
        write(tmp_path / f"{number}_run.json", RUN, a_run())
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "0001_run.json"]
    command += ["0002_run.json", "--columns=median,rounds", "--histogram=drawn", "--name=normal"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout + ended.stderr
    assert "benchmark 'test forward-b1_h2x2_q128_k128_d64_bf16': 4 tests" in said
    assert "fast[forward-b1_h2x2_q256_k256_d64_bf16]" in said
    drawings = list(tmp_path.glob("drawn*.svg"))
    assert len(drawings) == 3
    assert all("slow" in path.read_text("utf-8") or "q512" in path.name for path in drawings)


def test_machine_and_commit_are_there(tmp_path: Path) -> None:
    write(tmp_path / "run.json", RUN, a_run())
    found = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert {"gpu", "driver", "cuda", "torch", "triton", "cpu"} <= set(found["machine_info"])
    assert found["machine_info"]["node"] == ""
    assert set(found["commit_info"]) >= {"id", "dirty"}
    (lost,) = found["not_measured"]
    assert (lost["target"], lost["reason"]) == ("slow", "too long")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write(path, RUN, a_run())
    run, measurements = read(path)
    assert run == RUN
    assert measurements == a_run()
    assert resume(path, RUN) == measurements
    assert resume(tmp_path / "none.json", RUN) == []


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write(path, RUN, a_run())
    with pytest.raises(StorageError, match="targets fast, slow, not fast; it cannot be resumed"):
        resume(path, RUN | {"targets": ["fast"]})
    path.write_text('{"benchmarks": []}', "utf-8")
    with pytest.raises(StorageError, match="is no file that attnproof bench has written"):
        resume(path, RUN)


def test_ratios_and_their_mean() -> None:
    (found,) = by_kind(a_run()).values()
    of = ratios(found, "fast", "slow")
    assert list(of.by_cell.values()) == pytest.approx([2.1 / 1.05, 2.1 / 1.05])
    assert of.mean == pytest.approx(2.0)
    assert of.smallest == cell(128).name
    assert ratios(found, "fast", "nobody").mean is None


def test_tables_show_rates_shares_ratios_and_what_is_missing() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    for table in tables(a_run(), console, "slow"):
        console.print(table)
    text = console.export_text()
    rows = [line.split() for line in text.splitlines()]
    # 4 GFLOP in 1.05 ms, of 10 TFLOP/s.
    assert ["b1", "d64", "S128", "full", "3.81", "38%", "1.9", "19%"] in rows
    assert ["b1", "d64", "S512", "full", "4", "40%", "unsupp."] in rows
    assert ["geometric", "mean", "2.000"] in rows
    assert "its share of what this device reaches, 10 TFLOP/s" in " ".join(text.split())
    assert ["fast", "1.00", "0.50", "1.50"] in rows
    assert reasons(a_run()) == ["slow: unsupported: too long (forward b1 d64 S512 full)"]


def test_tables_that_are_too_wide_are_split() -> None:
    many = [measured(f"target-number-{n}", cell(128), 1e-3) for n in range(9)]
    console = Console(width=80)
    found = list(tables(many, console, None))
    assert len(found) > 2
    assert all(console.measure(table).maximum <= 80 for table in found)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_figure_is_drawn(tmp_path: Path, suffix: str) -> None:
    decoding = cell(1, seqlen_k=512)
    path = tmp_path / f"drawn{suffix}"
    plot(path, [*a_run(), measured("fast", decoding, 1e-3)])
    assert path.stat().st_size > 1000
