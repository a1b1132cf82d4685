"""The pytest plugin: options, outcomes, records; xdist; what it leaves alone without a target."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnproof import options as options_module
from attnproof.conformance import test_exact, test_numerics
from attnproof.options import OptionError, Options, add_options, environment, read_options
from attnproof.record import CaseRecord
from attnproof.recorder import Recorder, chosen_cases
from attnproof.spread import choose_gpu, share_cores
from attnproof.verdict import Status, Verdict

pytest_plugins = ["pytester"]

CASE = "exact/one_key/b1_h1x1_q65_k1_d64_fp16"
TARGET = """
import os

import torch


def attention(query, key, value):
    {first}
    scores = (query.float() @ key.float().mT) * query.shape[-1] ** -0.5
    return (scores.softmax(-1) @ value.float()).to(query.dtype)
"""


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_options(parser.add_argument)
    return read_options(parser.parse_args(arguments))


def test_options_are_read(tmp_path):
    given = parsed(
        "--attn-target=x.py:f",
        "--attn-level=full",
        "--attn-dtype=bf16",
        "--attn-dtype=fp32",
        "--attn-chapter=masks",
        "--attn-seed=3",
        "--attn-timeout=2.5",
        "--attn-precision=eager",
        "--attn-in-process",
        f"--attn-json={tmp_path / 'run.json'}",
        "--attn-resume",
        f"--attn-case={CASE}",
        "--attn-skip-budget=0",
    )
    assert given is not None
    assert given.skip_budget == 0
    assert given.level == "full"
    assert given.dtypes == ("bf16", "fp32")
    assert given.chapters == ("masks",)
    assert given.seed == 3
    assert given.timeout == 2.5
    assert given.in_process
    assert given.journal is not None
    assert given.journal == tmp_path / "run.jsonl"
    assert given.case == CASE
    assert given.shown()["--attn-dtype"] == "bf16,fp32"
    assert given.shown()["--attn-in-process"] == ""
    assert "--attn-device" not in given.shown()


def test_no_target_means_nothing_to_do():
    assert parsed() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attn-level=full"], "--attn-level: needs --attn-target"),
        (["--attn-skip-budget=0"], "--attn-skip-budget: needs --attn-target"),
        (["--attn-target=x", "--attn-skip-budget=-1"], "--attn-skip-budget -1: accepted is 0 or"),
        (["--attn-json=x", "--attn-seed=2"], "--attn-json, --attn-seed: needs --attn-target"),
        (
            ["--attn-target=x", "--attn-level=fast"],
            "--attn-level fast: unknown; accepted are quick",
        ),
        (["--attn-target=x", "--attn-device=tpu"], "--attn-device tpu: unknown; accepted are auto"),
        (["--attn-target=x", "--attn-dtype=fp8"], "--attn-dtype fp8: unknown; accepted are fp64"),
        (["--attn-target=x", "--attn-chapter=mask"], "--attn-chapter mask: unknown; accepted are"),
        (["--attn-target=x", "--attn-precision=best"], "--attn-precision best: unknown"),
        (["--attn-target=x", "--attn-timeout=0"], "--attn-timeout 0: accepted is a time above 0"),
        (["--attn-target=x", "--attn-timeout=nan"], "--attn-timeout nan: accepted is"),
        (["--attn-target=x", "--attn-resume"], "--attn-resume: needs --attn-json"),
        (["--attn-target=x", "--attn-case=a/b/c"], "--attn-case: chapter 'a': unknown"),
    ],
)
def test_options_that_make_no_sense(arguments, message):
    with pytest.raises(OptionError, match=message):
        parsed(*arguments)


def test_the_environment_shows_misspelt_variables(monkeypatch):
    monkeypatch.setenv("ATTNPROOF_TARGETT", "x")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOME_OF_NOTHING", "x")
    found = environment()
    assert found["ATTNPROOF_TARGETT"] == "x"
    assert found["OMP_NUM_THREADS"] == "1"
    assert "HOME_OF_NOTHING" not in found


def test_the_plugin_is_cheap_to_import():
    code = "import sys, attnproof.plugin; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "hypothesis", "rich"} & set(loaded)


@pytest.mark.parametrize(
    ("visible", "worker", "chosen"),
    [
        ("0,1,2", "gw0", "0"),
        ("0,1,2", "gw4", "1"),
        ("GPU-aa, GPU-bb", "gw1", "GPU-bb"),
        ("3", "gw7", "3"),
        ("", "gw0", ""),
    ],
)
def test_workers_share_the_gpus_that_the_caller_sees(monkeypatch, visible, worker, chosen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    choose_gpu(worker)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


def test_workers_share_all_gpus_when_the_caller_names_none(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "so that it is put back")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("attnproof.spread.GPUS", tmp_path / "none")
    choose_gpu("gw1")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    for name in ("0000:01", "0000:02"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    monkeypatch.setattr("attnproof.spread.GPUS", tmp_path / "gpus")
    choose_gpu("gw3")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"


def _path(module):
    return Path(module.__file__)


@pytest.mark.parametrize(("workers", "threads"), [(1, "6"), (4, "1"), (9, "1")])
def test_workers_share_the_cores(monkeypatch, workers, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "so that it is put back")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("attnproof.spread.cores", lambda: 6)
    share_cores(workers)
    assert os.environ["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    share_cores(workers)
    assert os.environ["OMP_NUM_THREADS"] == "5"


def chosen(function, module, **given):
    found = chosen_cases(Options(target="x", **given), function, _path(module))
    return None if found is None else [case.id for case in found]


def test_cases_are_chosen_by_level_dtype_chapter_and_id():
    quick = chosen(test_exact.test_one_key, test_exact)
    assert len(quick) == 3
    assert all(name.startswith("exact/one_key/") for name in quick)
    assert len(chosen(test_exact.test_one_key, test_exact, level="full")) > 3
    assert len(chosen(test_exact.test_one_key, test_exact, dtypes=("bf16",))) == 1
    assert chosen(test_exact.test_one_key, test_exact, chapters=("masks",)) == []
    assert chosen(test_exact.test_one_key, test_exact, case=CASE) == [CASE]
    assert chosen(test_numerics.test_dense, test_numerics, case=CASE) == []
    assert chosen(len, test_exact) is None


def test_an_undeclared_problem_can_be_chosen():
    other = "exact/one_key/b1_h1x1_q7_k1_d8_fp32"
    assert chosen(test_exact.test_one_key, test_exact, case=other) == [other]


def written(path, first="pass"):
    path.write_text(TARGET.format(first=first))
    return f"--attn-target={path}:attention"


def run(pytester, *arguments, isolated=False):
    """Judge with the chapter exact, which is short; pytest and target in this process, or not."""
    started = pytester.runpytest_subprocess if isolated else pytester.runpytest_inprocess
    return started(
        *([] if isolated else ["--attn-in-process"]),
        "-p",
        "no:cacheprovider",
        "--pyargs",
        "attnproof.conformance",
        "--attn-chapter=exact",
        "--attn-device=cpu",
        "-rA",
        *arguments,
    )


def records(path):
    lines = path.read_text().splitlines()
    return [CaseRecord.from_dict(json.loads(line)) for line in lines[1:]]


def test_the_chapters_without_a_target_are_a_usage_error(pytester):
    result = pytester.runpytest_subprocess("--pyargs", "attnproof.conformance")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: attnproof.conformance judges a target: name it with *"])


def test_other_tests_are_left_alone_without_a_target(pytester):
    pytester.makepyfile("def test_one(): pass")
    pytester.mkpydir("conformance").joinpath("test_two.py").write_text("def test_two(): pass")
    result = pytester.runpytest_subprocess("-W", "error")
    result.assert_outcomes(passed=2)
    assert (
        "attnproof" not in result.stdout.str().replace(str(pytester.path), "").split("collected")[1]
    )


def test_the_folder_of_chapters_is_not_collected_without_a_target(pytester):
    pytester.makepyfile("def test_one(): pass")
    package = _path(test_exact).parent.parent
    result = pytester.runpytest_subprocess(str(package), str(pytester.path))
    result.assert_outcomes(passed=1)


def test_a_target_that_cannot_be_loaded_is_a_usage_error(pytester):
    result = run(pytester, "--attn-target=nowhere")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *nowhere: unknown backend; registered are *"])
    assert "Traceback" not in result.stderr.str()


def test_a_target_that_conforms(pytester, tmp_path):
    file = tmp_path / "out" / "run.json"
    file.parent.mkdir()
    result = run(
        pytester, written(tmp_path / "good.py"), f"--attn-json={file}", "-W", "error", isolated=True
    )
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        [
            "loading *good.py:attention, up to 300 s",
            "attnproof: --attn-target=*good.py:attention*",
            "attnproof environment: *",
            "attnproof target: *on cpu, precision *",
            "*attnproof: *good.py:attention*",
            "*feature*cases*conforms*",
            "conforms: *",
            "SKIPPED*unsupported: *is not supported",
        ]
    )
    kept = records(file.with_suffix(".jsonl"))
    whole = json.loads(file.read_text())
    assert len(whole["cases"]) == len(kept)
    assert {"conforms", "unsupported"} == {case["verdict"] for case in whole["cases"]}
    assert whole["summary"]["exit_status"] == 0
    assert [file.name, file.with_suffix(".jsonl").name] == sorted(
        path.name for path in file.parent.iterdir()
    )


WRONG = "value = value * 1.5 if query.dtype == torch.bfloat16 else value"


def test_a_target_that_deviates(pytester, tmp_path):
    file = tmp_path / "run.json"
    result = run(pytester, written(tmp_path / "bad.py", WRONG), f"--attn-json={file}")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "exact/one_key/*_bf16",
            "deviates*",
            "replay: attnproof replay exact/one_key/*_bf16 --target *bad.py:attention*",
            "deviates: *one key*",
            "FAILED *test_exact.py::test_one_key[[]*_bf16] - deviates: *",
        ]
    )
    deviating = {one.id for one in records(file.with_suffix(".jsonl")) if one.status == "deviates"}
    assert deviating
    assert all("_bf16" in name for name in deviating)


def test_known_deviations_are_expected(pytester, tmp_path):
    known = tmp_path / "known.toml"
    path = tmp_path / "bad.py"
    known.write_text(
        f'targets = ["{path}:attention"]\n'
        '[[deviation]]\ncases = "exact/*_bf16*"\nreason = "values too large"\nproof = "see there"\n'
        '[[deviation]]\ncases = "exact/nothing/*"\nreason = "gone"\nproof = "see there"\n'
    )
    file = tmp_path / "run.json"
    result = run(
        pytester,
        written(path, WRONG),
        f"--attn-deviations={known}",
        f"--attn-json={file}",
        "--attn-in-process",
    )
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(
        ["*matches no case of this run*gone*", "XFAIL*values too large (see there)"]
    )
    assert {one.known for one in records(file.with_suffix(".jsonl"))} == {None, "values too large"}


def test_a_run_is_resumed(pytester, tmp_path):
    target = written(tmp_path / "good.py")
    file = tmp_path / "run.json"
    run(pytester, target, f"--attn-json={file}")
    journal = file.with_suffix(".jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) > 10
    journal.write_text("".join(lines[:5]))
    result = run(pytester, target, f"--attn-json={file}", "--attn-resume")
    assert result.ret == pytest.ExitCode.OK
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] + outcomes["skipped"] == len(lines) - 5
    result.stdout.fnmatch_lines(["4 cases taken over from *run.jsonl"])
    assert len(records(journal)) == len(lines) - 1
    assert len(json.loads(file.read_text())["cases"]) == len(lines) - 1

    again = run(pytester, target, f"--attn-json={file}", "--attn-resume")
    assert again.ret == pytest.ExitCode.OK  # nothing was left to do, and all of it conforms


def test_failures_taken_over_still_fail(pytester, tmp_path):
    target = written(tmp_path / "bad.py", WRONG)
    file = tmp_path / "run.json"
    options = (target, f"--attn-json={file}")
    assert run(pytester, *options).ret == pytest.ExitCode.TESTS_FAILED
    assert run(pytester, *options, "--attn-resume").ret == pytest.ExitCode.TESTS_FAILED
    other = run(pytester, *options, "--attn-resume", "--attn-seed=1")
    assert other.ret == pytest.ExitCode.USAGE_ERROR
    other.stderr.fnmatch_lines(["ERROR: --attn-resume: *is of a run with seed 0, not 1*"])


def test_results_that_cannot_be_written_are_refused_before_the_run(pytester, tmp_path):
    file = tmp_path / "missing" / "run.json"
    result = run(pytester, written(tmp_path / "good.py"), f"--attn-json={file}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"there is no folder {file.parent}" in str(result.stderr)


def test_a_worker_that_dies_costs_its_case(pytester, tmp_path):
    """In the process of the worker itself, so that the target takes it along."""
    first = "query.dtype == torch.float16 and query.shape[2] == 65 and os._exit(3)"
    file = tmp_path / "run.json"
    result = run(
        pytester,
        written(tmp_path / "exits.py", first),
        "--attn-in-process",
        "-n2",
        f"--attn-json={file}",
        isolated=True,
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    kept = {one.id: one for one in records(file.with_suffix(".jsonl"))}
    assert kept[CASE].status == "crashed"
    assert "worker that judged it died" in kept[CASE].verdict["reason"]
    assert [one for one in kept.values() if one.status == "conforms"]
    assert len(json.loads(file.read_text())["cases"]) == len(kept)


def test_an_unavailable_target_is_skipped_with_its_reason(pytester, tmp_path):
    path = tmp_path / "elsewhere.py"
    written(path)
    path.write_text(
        path.read_text()
        + "\n\nfrom attnproof.signatures.sdpa import adapt\n\n"
        + "backend = adapt(attention, 'elsewhere')\n"
        + "object.__setattr__(backend, 'availability', lambda device: 'needs a desk')\n"
    )
    result = run(pytester, f"--attn-target={path}:backend")
    result.stdout.fnmatch_lines(["*unavailable: needs a desk"])
    assert result.ret == pytest.ExitCode.OK
    assert "passed" not in result.parseoutcomes()


OWN_CHAPTER = """
from attn_reference.problem import Problem
from attnproof.cases import cases


@cases(quick=[Problem(seqlen_q=n, head_dim=16) for n in (3, 7)], feature="mine")
def test_something(problem, subject):
    if problem.seqlen_q == 7:
        raise subject.deviates("mine", "seven is too many")
    subject.check(problem)
"""


def test_a_chapter_of_ones_own(pytester, tmp_path):
    path = pytester.makepyfile(test_mine=OWN_CHAPTER)
    file = tmp_path / "run.json"
    result = pytester.runpytest_inprocess(
        str(path), written(tmp_path / "good.py"), "--attn-in-process", f"--attn-json={file}"
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*mine: seven is too many"])
    kept = {one.id: one.feature for one in records(file.with_suffix(".jsonl"))}
    assert kept == {f"mine/something/b1_h1x1_q{n}_k{n}_d16_fp32": "mine" for n in (3, 7)}


def recorder(**given) -> Recorder:
    return Recorder(Options(target="x", device="cpu", **given), None)


def test_a_harness_error_is_recorded_as_such():
    def check():
        raise ZeroDivisionError("oh")

    verdict = recorder()._verdict(pytest.CallInfo.from_call(check, "call"))
    assert verdict == Verdict(
        status=Status.CRASHED, reason="the check itself failed: ZeroDivisionError: oh"
    )


def test_the_run_of_a_journal_holds_what_must_stay_the_same():
    run = Options(target="x").run()
    assert set(run) < {f.name for f in options_module.fields(Options)}
    assert "level" not in run  # a run may go on at a higher level
