"""Several backends at once: what is passed on, printed, and when the run fails."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "check_all", Path(__file__).parents[1] / "check_all.py"
)
check_all = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_all)

PROGRAM = """#!/bin/sh
echo "$@"
echo said >&2
case "$2" in broken) exit 2 ;; wrong) exit 1 ;; absent) exit 3 ;; esac
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "attnproof"
    path.write_text(PROGRAM)
    path.chmod(0o755)
    return str(path)


def test_every_backend_is_judged_with_the_options(tmp_path, capsys, program):
    names = ("good", "wrong", "absent")
    status = check_all.main(tmp_path, dict.fromkeys(names, program), 3, ["--dtype", "bf16"])
    said = capsys.readouterr().out
    assert status == 0
    for name in names:
        shared = max(1, check_all.cores() // 3)
        words = f"check {name} --json {tmp_path / name}.json --workers {shared} --dtype bf16"
        assert words in said
    assert "3 of 3 backends" in said


def test_a_run_without_a_verdict_fails_and_is_named(tmp_path, capsys, program):
    assert check_all.main(tmp_path, dict.fromkeys(("good", "broken"), program), 2, []) == 1
    said = capsys.readouterr()
    assert "said" in said.out
    assert "no verdict: broken (exit status 2)" in said.err


def test_one_that_must_run_and_cannot_be_judged_fails_the_run(tmp_path, capsys, program):
    names = dict.fromkeys(("good", "absent", "wrong"), program)
    assert check_all.main(tmp_path, names, 3, [], must_run=["good", "wrong"]) == 0
    assert check_all.main(tmp_path, names, 3, [], must_run=["good", "absent"]) == 1
    assert "must run, and could not be judged: absent" in capsys.readouterr().err


def test_the_golden_vectors_are_judged_by_one_process_each(tmp_path, capsys, program):
    folder = tmp_path / "golden"
    assert check_all.main(folder, {"good": program}, 2, ["--device", "cuda"], golden=True) == 0
    assert f"golden check good --json {folder / 'good.json'} --device cuda" in (
        capsys.readouterr().out
    )
    assert folder.is_dir()


def test_all_that_are_registered_unless_named():
    given = check_all.parse(["results", "--", "--level", "full"])
    assert given["folder"] == Path("results")
    assert given["together"] == check_all.cores()
    assert given["options"] == ["--level", "full"]
    assert {"sdpa", "triton-v2"} <= given["programs"].keys()
    given = check_all.parse(["results", "one=a", "--together", "4", "--must-run", "one"])
    assert given["programs"] == {"one": "a"}
    assert (given["together"], list(given["options"])) == (4, [])
    assert given["must_run"] == ["one"]


@pytest.mark.parametrize(
    "words",
    [
        ["results", "sdpa"],
        ["results", "--together", "0"],
        ["results", "one=a", "--must-run", "two"],
        [],
    ],
)
def test_wrong_words_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        check_all.parse(words)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err
