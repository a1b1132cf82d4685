"""The tables of what was found on GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "gpu_table.py"


def row(feature, cases, worst=None, **counts):
    none = dict.fromkeys(("conforms", "deviates", "crashed", "unsupported", "vacuous", "known"), 0)
    return none | counts | {"feature": feature, "cases": cases, "worst": worst}


def kept(folder, gpu, **backends):
    entries = {
        name: {
            "environment": {
                "date": "2026-01-02",
                "commit": "abc1234",
                "versions": {"attnproof": "0.1.0", "torch": "2.11.0", "numpy": "2.3"},
                "gpus": [{"name": gpu, "driver": "580.1", "cuda": "13.0"}],
            },
            "level": "full",
            "verdict": "deviates" if any(r["feature"] == "bad" for r in rows) else "conforms",
            "counts": {
                "cases": sum(r["cases"] for r in rows),
                "conforms": sum(r["conforms"] for r in rows),
            },
            "features": rows,
        }
        for name, rows in backends.items()
    }
    file = folder / f"{gpu}.json"
    file.write_text(json.dumps({"backends": entries}))
    return file


def cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0]: line[1:] for line in table}


def printed(*files):
    done = subprocess.run([sys.executable, TOOL, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("found", "cell"),
    [
        (row("f", 3, worst=0.724, conforms=3), "0.72"),
        (row("f", 3, conforms=3), "✓"),
        (row("f", 3, unsupported=3), "–"),
        (row("f", 3, vacuous=3), "–"),
        (row("f", 4, worst=9, conforms=1, deviates=1, crashed=1, unsupported=1, known=2),
         "2 of 3 known"),
        (row("f", 4, worst=9, conforms=1, deviates=2, crashed=1, known=2), "**1 of 4 fail**"),
    ],
)  # fmt: skip
def test_a_cell(tmp_path, found, cell):
    assert cells(printed(kept(tmp_path, "H1", one=[found])))["f"] == [cell]


def test_gpus_have_tables_of_their_own(tmp_path):
    first = kept(
        tmp_path, "H1", one=[row("f", 3, worst=0.5, conforms=3)], two=[row("g", 3, unsupported=3)]
    )
    second = kept(tmp_path, "H2", one=[row("bad", 1, worst=2.0, deviates=1)])
    text = printed(first, second)
    one, _, two = text.partition("**H2**")
    assert one.startswith(
        "**H1**, level full (driver 580.1, CUDA 13.0, torch 2.11.0, commit abc1234"
    )
    expected = {
        "feature": ["one", "two"],
        "f": ["0.50", "–"],
        "g": ["–", "–"],
        "conform": ["3", "0"],
        "known to fail": ["–", "–"],
        "verdict": ["conforms", "conforms"],
    }
    assert {name: line for name, line in cells(one).items() if name.strip("- :")} == expected
    assert cells(two)["verdict"] == ["deviates"]
    assert cells(two)["bad"] == ["**1 of 1 fail**"]


def test_without_a_file_it_says_what_to_name():
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FILE" in done.stderr


def test_a_run_that_was_stopped_says_how_many_cases_it_did_not_reach(tmp_path):
    rows = {"all": [row("f", 5, worst=0.5, conforms=5)], "some": [row("f", 2, conforms=2)]}
    assert cells(printed(kept(tmp_path, "H1", **rows)))["not reached"] == ["–", "3"]
    complete = kept(tmp_path, "H2", all=rows["all"], too=rows["all"])
    assert "not reached" not in printed(complete)
