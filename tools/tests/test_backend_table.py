"""The table of all backends: what each cell says, and when ``nox -s check`` fails."""

import importlib.util
import json
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "backend_table", Path(__file__).parents[1] / "backend_table.py"
)
backend_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(backend_table)


def case(verdict="conforms", worst=None, known=None, feature="causal", chapter="masks"):
    return {
        "feature": feature,
        "chapter": chapter,
        "verdict": verdict,
        "worst": worst,
        "known_deviation": known,
    }


def write(folder, name, exit_status, *cases):
    summary = {"exit_status": exit_status, "verdict": f"exit {exit_status}", "line": "no GPU"}
    (folder / f"{name}.json").write_text(json.dumps({"summary": summary, "cases": list(cases)}))


def printed(folder, capsys, by):
    """The cells of the table, without the rule below the header."""
    backend_table.main(folder, by=by, judge=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return cells[:1] + cells[2:]


DEVIATES, KNOWN = case("deviates", "inf"), case("deviates", 7.0, known="torch bug")


@pytest.mark.parametrize(
    ("cases", "says"),
    [
        ([case(worst=0.823), case(worst=0.1), case()], "0.82"),
        ([case()], "✓"),
        ([case(worst=0.5), KNOWN], "1 of 2 known"),
        ([case(), DEVIATES, case("crashed"), case("timed out"), KNOWN], "**3 of 5 fail**"),
        ([case("unsupported"), DEVIATES], "**1 of 1 fail**"),
        ([case("vacuous")], "not shown"),
        ([case("unsupported"), case("unavailable")], "–"),
        ([], "–"),
    ],
)
def test_cell(cases, says):
    assert backend_table.cell(cases) == says


def test_rows_are_features_or_chapters_of_all_backends(tmp_path, capsys):
    write(tmp_path, "b", 0, case(worst=0.5, feature="window"))
    write(tmp_path, "a", 0, case(worst=0.25), case(worst=0.125), case("unsupported"))
    assert printed(tmp_path, capsys, "feature") == [
        ["feature", "a", "b"],
        ["causal", "0.25", "–"],
        ["window", "–", "0.50"],
        ["cases judged", "2", "1"],
        ["verdict", "exit 0", "exit 0"],
    ]
    assert printed(tmp_path, capsys, "chapter")[:2] == [
        ["chapter", "a", "b"],
        ["masks", "0.25", "0.50"],
    ]


def test_a_backend_that_deviates_fails_the_run(tmp_path):
    write(tmp_path, "good", 0, case())
    write(tmp_path, "bad", 1, DEVIATES)
    backend_table.main(tmp_path, by="feature", judge=False)
    with pytest.raises(SystemExit, match="do not conform: bad"):
        backend_table.main(tmp_path, by="feature", judge=True)


def test_an_unavailable_backend_gives_its_reason_and_does_not_fail_the_run(tmp_path, capsys):
    write(tmp_path, "good", 0, case())
    write(tmp_path, "gpu", 3, case("unsupported"))
    backend_table.main(tmp_path, by="feature", judge=True)
    assert "gpu: no GPU" in capsys.readouterr().out


def test_a_run_that_judged_nothing_fails(tmp_path):
    write(tmp_path, "gpu", 3, case("unsupported"))
    with pytest.raises(SystemExit, match="no backend could be judged"):
        backend_table.main(tmp_path, by="feature", judge=True)


def test_no_results_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="no results; run"):
        backend_table.main(tmp_path, by="feature", judge=True)


def test_some_backends_only_in_the_order_given(tmp_path, capsys):
    for name in ("a", "b", "c"):
        write(tmp_path, name, 0, case(worst=0.5))
    backend_table.main(tmp_path, by="feature", judge=False, only="c,a")
    header = capsys.readouterr().out.splitlines()[0]
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["feature", "c", "a"]
    with pytest.raises(SystemExit, match="--only d: there are results of a, b, c"):
        backend_table.main(tmp_path, by="feature", judge=False, only="d")


def result(verdict):
    summary = {"exit_status": 0, "verdict": verdict, "line": "…", "counts": {"cases": 1}}
    run = {"run": {"level": "full"}, "environment": {"date": "2026-01-01"}, "features": []}
    return run | {"summary": summary, "cases": [case()]}


def test_what_is_kept_of_a_run_stays_until_that_backend_is_judged_again(tmp_path):
    kept, results = tmp_path / "kept.json", tmp_path / "results"
    results.mkdir()
    (results / "doctor.json").write_text("{}")  # is no result
    for names in ("ab", "b"):
        for name in names:
            (results / f"{name}.json").write_text(json.dumps(result(f"{name} of {names}")))
        backend_table.main(results, by="feature", judge=True, write=kept)
        (results / "a.json").unlink(missing_ok=True)
    backends = json.loads(kept.read_text())["backends"]
    assert {name: entry["verdict"] for name, entry in backends.items()} == {
        "a": "a of ab",
        "b": "b of b",
    }
    assert backends["a"]["level"] == "full"
    assert "cases" not in backends["a"]
