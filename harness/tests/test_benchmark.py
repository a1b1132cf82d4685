"""attnproof bench: work, statistics, storage; and measurements that must fail, failing."""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attn_reference.problem import Problem
from attnproof.benchmark.ceilings import Ceilings
from attnproof.benchmark.rounds import Measured, impossible
from attnproof.benchmark.run import Run
from attnproof.benchmark.storage import stats, stored
from attnproof.benchmark.suites import BACKWARD, BOTH, FORWARD, SUITES, Cell
from attnproof.benchmark.table import against, geometric_mean, rate, reasons
from attnproof.benchmark.work import flops, moved_bytes, visible_pairs
from attnproof.cli.main import app

FILE = Path(__file__).with_name("planted_bench.py")


def problem(**fields):
    usual = {"batch": 2, "seqlen_q": 7, "seqlen_k": 11, "heads_q": 6, "heads_kv": 2, "head_dim": 16}
    return Problem(**usual | {"dtype": "bf16"} | fields)


def brute(p):
    shift = 0 if p.causal == "top-left" else p.keys - p.seqlen_q
    left, right = p.window or (None, None)
    return sum(
        (left is None or j >= i + shift - left)
        and (right is None or j <= i + shift + right)
        and (p.causal == "none" or j <= i + shift)
        for i in range(p.seqlen_q)
        for j in range(p.keys)
    )


@pytest.mark.parametrize("causal", ["none", "top-left", "bottom-right"])
@pytest.mark.parametrize("window", [None, (2, 3), (0, 0), (None, 1), (4, None)])
@pytest.mark.parametrize(("queries", "keys"), [(7, 11), (11, 7), (1, 5), (8, 8)])
def test_visible_pairs_are_those_of_the_definition(causal, window, queries, keys):
    p = problem(seqlen_q=queries, seqlen_k=keys, causal=causal, window=window)
    assert visible_pairs(p) == brute(p)


def test_pairs_that_are_hidden_by_more_than_positions_are_refused():
    with pytest.raises(ValueError, match="positions"):
        visible_pairs(problem(mask="random"))


def test_work():
    cell = Cell(problem(head_dim_v=32), FORWARD)
    assert flops(cell) == 2 * (16 + 32) * 2 * 6 * 77
    assert flops(replace(cell, direction=BACKWARD)) == 2.5 * flops(cell)
    assert flops(replace(cell, direction=BOTH)) == 3.5 * flops(cell)
    q, k, v, out = 2 * 6 * 7 * 16, 2 * 2 * 11 * 16, 2 * 2 * 11 * 32, 2 * 6 * 7 * 32
    assert moved_bytes(cell) == 2 * (q + k + v + out) + 4 * 2 * 6 * 7
    assert moved_bytes(replace(cell, direction=BACKWARD)) == 4 * (q + k + v + out) + 4 * 2 * 6 * 7


def test_the_grid_is_that_of_the_papers():
    cells = SUITES["papers"]("bf16")
    assert len({cell.id for cell in cells}) == len(cells) == 3 * 2 * 6 * 2
    for cell in cells:
        p = cell.problem
        assert p.batch * p.seqlen_q == 16384
        assert p.heads_q * p.head_dim == 2048
    # 4 B H S^2 D, half of it causal, as the papers count, but for the diagonal.
    full = next(c for c in cells if c.problem.seqlen_q == 2048 and c.problem.head_dim == 64)
    assert flops(full) == 4 * 8 * 32 * 2048**2 * 64


def test_decoding_reads_the_cache():
    (first, *_) = SUITES["decoding"]("bf16")
    cache = 2 * 2 * 8 * 65536 * 128
    assert moved_bytes(first) == pytest.approx(cache, rel=1e-3)


@pytest.mark.parametrize("amount", [1.09, 1.11])
def test_a_rate_beyond_the_ceiling_is_impossible(amount):
    cell = SUITES["core"]("bf16")[0]
    ceilings = Ceilings(flops=1e15, bytes=1e30)
    said = impossible(cell, flops(cell) / (amount * 1e15), ceilings, 1.1)
    assert (said is None) == (amount < 1.1)
    (decode, *_) = SUITES["decoding"]("bf16")
    ceilings = Ceilings(flops=1e30, bytes=3e12)
    said = impossible(decode, moved_bytes(decode) / (amount * 3e12), ceilings, 1.1)
    assert (said is None) == (amount < 1.1)


def test_statistics():
    data = [5.0, 1.0, 2.0, 3.0, 100.0]
    found = stats(data)
    assert found["median"] == 3.0
    assert found["mean"] == statistics.fmean(data)
    assert found["stddev"] == statistics.stdev(data)
    assert (found["min"], found["max"], found["rounds"]) == (1.0, 100.0, 5)
    assert (found["q1"], found["q3"]) == (1.5, 52.5)
    assert stats([2.0])["stddev"] == 0.0


def bench(tmp_path, *names, **more):
    """Run the command on planted targets: exit status, output, and what was stored."""
    options = {"suite": "small", "dtype": "fp32", "rounds": "2", "device": "cpu"} | more
    words = [f"--{name}={value}" for name, value in options.items()]
    targets = [name if name in ("sdpa", "eager") else f"{FILE}:{name}" for name in names]
    path = tmp_path / "bench.json"
    result = CliRunner().invoke(
        app, ["bench", *targets, "--signature=sdpa", *words, f"--json={path}"]
    )
    if not path.exists():
        return result.exit_code, result.output, None
    return result.exit_code, result.output, json.loads(path.read_text())


FAULTS = {
    "wrong": "deviates",
    "stale": "deviates",
    "zeros": "deviates",
    "wrong_gradient": "deviates",
    "raises": "ValueError: no",
    "dies": "the process died: exit status 7",
}


@pytest.mark.slow
def test_what_is_wrong_is_a_failed_measurement_and_what_is_right_is_measured(tmp_path):
    status, text, found = bench(tmp_path, "honest", *FAULTS, "refuses", "sdpa", baseline="sdpa")
    assert status == 1, text
    others = {}
    for one in found["attnproof"]["others"]:
        others.setdefault(one["peer"].rpartition(":")[2], []).append(one)
    for name, words in FAULTS.items():
        failed = [one["failed"] for one in others[name] if one["failed"]]
        assert failed, name
        assert any(words in said for said in failed), (name, failed)
    # A wrong gradient shows where there is one.
    assert all(one["cell"].endswith("backward") for one in others["wrong_gradient"])
    assert {one["skipped"] for one in others["refuses"]} == {"only on Tuesdays"}
    measured = {entry["params"]["peer"].rpartition(":")[2] for entry in found["benchmarks"]}
    assert measured >= {"honest", "sdpa"}
    assert not measured & {"wrong", "stale", "zeros", "raises", "dies", "refuses"}
    assert "times as fast as sdpa" in text


@pytest.mark.slow
def test_pytest_benchmark_reads_it_and_a_run_is_resumed(tmp_path):
    status, text, found = bench(tmp_path, "honest", "eager")
    assert status == 0, text
    assert len(found["benchmarks"]) == 2 * len(SUITES["small"]("fp32"))
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", tmp_path / "bench.json",
         f"--csv={tmp_path / 'table'}"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr
    assert "honest" in compared.stdout
    table = (tmp_path / "table.csv").read_text()
    median = statistics.median(found["benchmarks"][0]["stats"]["data"])
    assert f"{median}"[:6] in table
    # Stopped in the middle: what is finished is kept, the rest measured.
    lines = (tmp_path / "bench.jsonl").read_text().splitlines(keepends=True)
    ends = [n for n, line in enumerate(lines) if "finished" in line]
    (tmp_path / "bench.jsonl").write_text("".join(lines[: ends[3] + 2]) + '{"measu')
    words = ["--suite=small", "--dtype=fp32", "--rounds=2", "--device=cpu", "--signature=sdpa"]
    again = CliRunner().invoke(
        app, ["bench", f"{FILE}:honest", "eager", *words, f"--json={tmp_path / 'bench.json'}",
              "--resume"],
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    resumed = json.loads((tmp_path / "bench.json").read_text())

    def seconds(run):
        return {b["name"]: b["stats"]["data"] for b in run["benchmarks"]}

    before, after = seconds(found), seconds(resumed)
    assert before.keys() == after.keys()
    same = [name for name in before if before[name] == after[name]]
    assert len(same) == 8  # two peers in four cells


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nobody"], "nobody: unknown backend; registered are "),
        (["sdpa", "--suite=large"], "--suite large: accepted are papers, core, "),
        (["sdpa", "--dtype=fp8"], "--dtype fp8: accepted are bf16, fp16, fp32"),
        (["sdpa", "--plot=a.txt"], "--plot a.txt: accepted are files named .svg, .png, .pdf"),
        (["sdpa", "--json=/nowhere/a.json"], "--json /nowhere/a.json: there is no folder"),
        (["sdpa", "--resume"], "--resume: needs --json FILE"),
    ],
)
def test_wrong_words_are_answered(words, said):
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == 2
    assert said in result.output


def test_a_run_of_other_settings_is_not_resumed(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"run": {"suite": "papers"}}) + "\n")
    words = ["bench", "sdpa", "--suite=small", f"--json={tmp_path / 'a.json'}", "--resume"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "of another run: suite" in result.output


def made(tmp_path):
    """A run that needs no measuring: a peer twice as fast as another in every cell, and half in
    one."""
    run = Run(
        suite="small", dtype="fp32", device="cpu", peers=[("a", None), ("b", None)], rounds=1,
        seed=0, file=tmp_path / "lines",
    )  # fmt: skip
    for number, cell in enumerate(SUITES["small"]("fp32")):
        fast = 1.0 if number else 4.0
        run.measured[cell.id, "a"] = Measured(cell=cell.id, peer="a", seconds=[fast, fast, 9.0])
        run.measured[cell.id, "b"] = Measured(cell=cell.id, peer="b", seconds=[2.0])
    return run


def test_ratios(tmp_path):
    run = made(tmp_path)
    forward, backward = against(run, "b")
    mean = math.exp((3 * math.log(2) + math.log(0.5)) / 4)
    assert f"a is {mean:.2f} times as fast as b, forward, geometric mean of 4" in forward
    assert "least 0.50 (d 64, 4 x 4 x 128/128, full, forward)" in forward
    assert "a is 2.00 times" in backward
    assert geometric_mean([1, 4]) == pytest.approx(2)


def test_a_failed_measurement_counts_nowhere(tmp_path):
    run = made(tmp_path)
    cell = SUITES["small"]("fp32")[0]
    run.measured[cell.id, "a"].failed = "deviates: out"
    assert "geometric mean of 3" in next(against(run, "b"))
    assert "a, 1 of 8 cells: failed: deviates: out" in list(reasons(run))
    names = [entry["name"] for entry in stored(run)["benchmarks"]]
    assert f"a[{cell.id}]" not in names
    assert len(names) == 15


def test_rates(tmp_path):
    run = made(tmp_path)
    cell = SUITES["small"]("fp32")[1]
    assert rate(cell, run.measured[cell.id, "b"]) == pytest.approx(flops(cell) / 2.0 / 1e12)
    (wall, _) = SUITES["overhead"]("bf16")
    assert rate(wall, Measured(cell=wall.id, peer="a", seconds=[2e-5])) == pytest.approx(20)
    (decode, *_) = SUITES["decoding"]("bf16")
    found = rate(decode, Measured(cell=decode.id, peer="a", seconds=[1e-4]))
    assert found == pytest.approx(moved_bytes(decode) / 1e-4 / 1e9)
