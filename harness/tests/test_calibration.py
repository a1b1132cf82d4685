"""The calibration command: its problems, that it resumes, and that it tells right from wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from attn_reference.problem import Problem
from attnproof.backend import Capabilities
from attnproof.calibration.command import main
from attnproof.calibration.kernels import CUDA_KERNELS, kernel
from attnproof.calibration.measure import Measurement
from attnproof.calibration.problems import COMPILED, CPU, CUDA, random_problem
from attnproof.calibration.summary import summary
from attnproof.inputs.make import make_inputs
from attnproof.precision import cpu_flash_precision
from attnproof.signatures.common import FEATURES
from attnproof.targets import LoadError

ALL = Capabilities(features=FEATURES, gradients=("q", "k", "v", "bias", "sinks"))
FAULTY = Path(__file__).parent / "planted" / "faulty.py"
NUMERICAL = Path(__file__).parent / "numerical_faults.py"


def lines(file: Path) -> list[dict[str, object]]:
    """The measurements of a file, without what they ran on."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in found if "environment" not in line]


def test_problems_are_the_same_every_time_and_differ() -> None:
    problems = [random_problem(i, "bf16", ALL, CPU) for i in range(40)]
    assert problems == [random_problem(i, "bf16", ALL, CPU) for i in range(40)]
    assert len({p.id for p in problems}) == 40
    assert {f for p in problems for f in p.features} >= FEATURES - {"packed", "paged"}


def test_problems_keep_to_capabilities_and_space() -> None:
    little = Capabilities(features=frozenset({"gqa"}), gradients=("q", "k", "v"))
    for index in range(60):
        problem = random_problem(index, "fp16", little, CUDA)
        assert not little.unsupported_reasons(problem)
        assert problem.batch * problem.heads_q * problem.seqlen_q * problem.keys <= CUDA.scores
        assert problem.head_dim in CUDA.head_dims
    capabilities = CUDA_KERNELS["flex"].backend.capabilities
    for index in range(20):
        problem = random_problem(index, "bf16", capabilities, COMPILED)
        assert problem.softcap > 0
        assert {problem.seqlen_q, problem.keys} <= set(COMPILED.seqlens)


def test_impossible_capabilities_are_said() -> None:
    with pytest.raises(ValueError, match="dtype fp16 is not one of fp32"):
        random_problem(0, "fp16", Capabilities(dtypes=("fp32",)), CPU)


def test_a_correct_kernel_conforms_and_a_second_run_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "measured.jsonl"
    run = ["--kernel", "sdpa-math", "--json", str(file)]
    assert main([*run, "--problems", "2"]) == 0
    first = lines(file)
    assert [m["status"] for m in first] == ["conforms"] * 6
    with file.open("a") as open_file:
        open_file.write('{"kernel": "cut off')
    with file.open("a") as open_file:
        open_file.write("\n")
    assert main([*run, "--problems", "3"]) == 0
    assert len(file.read_text().splitlines()) == 6 + 1 + 3 + 2  # each run says on what it ran
    assert main(["--summary", str(file)]) == 0
    said = capsys.readouterr().out
    assert "| sdpa-math |" in said
    assert "| 3 | 0 |" in said


@pytest.mark.parametrize(
    ("fault", "status"), [("correct", 0), ("scale_two_percent_off", 1), ("zeros_always", 1)]
)
def test_faults_are_measured_under_many_seeds(
    fault: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = "b1_h2x2_q64_k70_d32_bf16"
    assert (
        main(["--kernel", f"{FAULTY}:{fault}", "--problem", problem, "--problems", "3"]) == status
    )
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    counted = next(row for row in rows if len(row) > 5 and row[3] == "3")
    assert counted[4] == ("3" if status else "0")


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("correct", 0),
        ("one_row_loses_half_its_keys", 1),
        ("lse_of_one_row_off_by_ln_2_in_backward", 1),
        ("delta_shifted_by_one_row", 1),
        ("softcap_gradient_omitted", 1),
    ],
)
def test_faults_that_are_in_the_numbers_only(fault: str, status: int) -> None:
    problem = "b1_h2x2_q64_k64_d32_bf16_softcap=5_grad=q,k,v"
    run = ["--kernel", f"{NUMERICAL}:{fault}", "--problem", problem, "--problems", "2"]
    assert main(run) == status


NO_ANSWER = """
import os, time
from torch.nn.functional import scaled_dot_product_attention

def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if q[0, 0, 0, 0] > 1.0:
        os._exit(3)
    if q[0, 0, 0, 0] < -1.0:
        time.sleep(100)
    return scaled_dot_product_attention(q, k, v)
"""


def test_a_kernel_that_dies_or_hangs_costs_one_problem(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(NO_ANSWER)
    file = tmp_path / "measured.jsonl"
    run = ["--kernel", f"{tmp_path / 'kernel.py'}:attend", "--workers", "2", "--timeout", "20"]
    run += ["--problem", "b1_h1x1_q3_k5_d32_bf16", "--problems", "3", "--json", str(file)]
    assert main(run) == 1
    found = {m["index"]: (m["status"], str(m["reason"])) for m in lines(file)}
    problem = Problem.from_id("b1_h1x1_q3_k5_d32_bf16")
    first = {n: make_inputs(problem.replace(seed=n)).q[0, 0, 0, 0].item() for n in range(3)}
    died = {n for n, value in first.items() if value > 1}
    hung = {n for n, value in first.items() if value < -1}
    assert died
    assert hung
    assert {n for n, f in found.items() if f[0] == "crashed"} == died
    assert {n for n, f in found.items() if f[0] == "timed out"} == hung
    assert {f[0] for n, f in found.items() if n not in died | hung} == {"conforms"}
    assert "exit code 3" in found[min(died)][1]
    assert main(run) == 1  # they are not tried again
    assert len(lines(file)) == 3


def test_the_figures_are_written_with_what_they_were_measured_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, written = tmp_path / "measured.jsonl", tmp_path / "figures.json"
    run = ["--kernel", "sdpa-math", "--dtype", "bf16", "--problems", "2", "--json", str(file)]
    assert main(run) == 0
    capsys.readouterr()
    assert main(["--summary", str(file), "--write", str(written)]) == 0
    said = capsys.readouterr().out
    figures = json.loads(written.read_text())
    (ran_on,) = figures["environments"]
    assert ran_on["versions"]["torch"] == torch.__version__
    assert {"date", "commit", "cpu", "gpus"} <= ran_on.keys()
    (result,) = figures["results"]
    assert result["problems"] == {"conforms": 2}
    worst = max(m["worst"]["out"] for m in lines(file))  # type: ignore[index]
    assert result["worst_error_over_budget"]["out"] == pytest.approx(worst, abs=1e-3)
    room = [m["room"]["dv"] for m in lines(file)]  # type: ignore[index]
    for term, ratio in result["room"]["dv"].items():
        most = max(terms[term] for terms in room if term in terms)
        assert ratio == pytest.approx(most, abs=1e-3)
    assert result["room"]["dv"].keys() == {term for terms in room for term in terms}
    # The file gives the tables that the measurements give.
    assert main(["--figures", str(written)]) == 0
    assert capsys.readouterr().out == said
    tables = said.strip().split("\n\n")
    for name, table in zip(("worst", "room"), tables, strict=True):
        assert main(["--figures", str(written), "--table", name]) == 0
        assert capsys.readouterr().out.strip() == table


def test_figures_of_several_instruction_sets_and_without_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"kernel": "k", "dtype": "bf16", "problems": {"conforms": 2, "deviates": 1, "raised": 1}}
    one |= {"worst_error_over_budget": {"out": 0.25}, "worst_statistic_over_limit": {"z_row": 0.5}}
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps({"results": [one | {"on": "before"}]}))
    rooms: list[dict[str, object]] = [
        {"on": on, "room": {"lse": {"scores": 0.125}, "out": {"store": ratio}}}
        for on, ratio in (("avx2", 0.5), ("avx512", 0.75))
    ]
    rooms[0]["largest_statistic"] = {"z_row": 1.5}
    new.write_text(json.dumps({"results": [one | room for room in rooms]}))
    assert main(["--figures", str(new), "--table", "room"]) == 1
    table = capsys.readouterr().out.splitlines()
    assert table[2:] == ["| k | out | store | 0.75 |", "| k | lse | scores | 0.12 |"]
    assert main(["--figures", str(new), "--table", "worst"]) == 1
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith("| k | avx2 | bf16 | 3 | 1 | 0.25 | – |")
    assert table[2].endswith("| 1.50 (0.50) | – | – |")
    assert table[3].endswith("| – (0.50) | – | – |")
    assert main(["--figures", str(old), "--table", "room"]) == 1
    assert capsys.readouterr().out == "no room by term in the figures\n"


DOCUMENTED = re.compile(
    r"<!-- output of: python -m attnproof.calibration (.+?) -->\n\n(.+?)\n\n?<!-- end", re.DOTALL
)


def test_the_documentation_shows_the_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    shown = DOCUMENTED.findall(Path("docs/calibration.md").read_text("utf-8"))
    assert len(shown) == 4
    for arguments, text in shown:
        main(arguments.split())
        table = text.removeprefix("```text\n").removesuffix("\n```")
        assert capsys.readouterr().out.strip() == table


def test_workers_give_the_same_measurements(tmp_path: Path) -> None:
    run = ["--kernel", "sdpa-math", "--dtype", "bf16", "--problems", "4", "--json"]
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    assert main([*run, str(files[0])]) == 0
    assert main([*run, str(files[1]), "--workers", "2"]) == 0
    one, two = ({m["index"]: m for m in lines(file)} for file in files)
    assert one == two


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--kernel", "no-such-kernel"],
        ["--kernel", "sdpa-math", "--problem", "b1_what"],
        ["--figures", "no-such-file"],
        ["--figures", __file__],
    ],
)
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_kernels_of_a_device() -> None:
    assert kernel("sdpa-math", "cpu").space is CPU
    assert kernel("sdpa-flash", "cuda") is CUDA_KERNELS["sdpa-flash"]
    assert kernel("flex", "cuda").space is COMPILED
    assert kernel("sdpa", "cuda").backend.capabilities.devices == ("cuda",)
    with pytest.raises(LoadError):
        kernel("no-such-kernel", "cpu")


def test_the_summary_names_what_is_wrong() -> None:
    def made(status: str, reason: str = "") -> Measurement:
        return Measurement(
            kernel="k", device="cpu", instructions="avx2", dtype="bf16", index=0,
            problem="b1_h1x1_q4_k4_d8_bf16", status=status, reason=reason,
            worst={"out": 0.5}, room={"out": {"store": 0.25}},
            statistics={"z_row": 0.5}, values={"z_row": 1.0},
        )  # fmt: skip

    text = summary([made("conforms"), made("deviates", "out is wrong"), made("skipped")])
    assert "| k | avx2 | bf16 | 2 | 1 | 0.50 | – |" in text
    assert "1.00 (0.50)" in text
    assert "| k | out | store | 0.25 |" in text
    assert "k avx2 bf16: 1 deviates\n  b1_h1x1_q4_k4_d8_bf16: out is wrong" in text
    assert summary([]) == "nothing was measured"


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX512"])
def test_the_flash_kernel_of_the_cpu(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert (cpu_flash_precision().exp_error == 0) is (capability == "DEFAULT")
