"""What a run amounts to: rows, verdict line, exit status."""

from __future__ import annotations

import io
import json
import math
from typing import Any

from rich.console import Console

from attnproof.record import CaseRecord
from attnproof.report.summary import REASONS, Exit, Summary, document, summarise
from attnproof.report.table import feature_table
from attnproof.verdict import Status, Verdict


def record(
    feature: str, status: str = "conforms", *, known: str | None = None, **verdict: Any
) -> CaseRecord:
    values = Verdict(status=Status(status), **verdict).as_dict()
    record.count = getattr(record, "count", 0) + 1  # type: ignore[attr-defined]
    number = record.count  # type: ignore[attr-defined]
    return CaseRecord(
        id=f"masks/check/{number}",
        chapter="masks",
        feature=feature,
        problem="b1",
        verdict=values,
        seconds=0.5,
        known=known,
    )


def drawn(summary: Summary) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(feature_table(summary))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]


def test_a_run_that_conforms() -> None:
    summary = summarise(
        [
            record("window", worst={"out": 0.25, "lse": 0.5}),
            record("gqa", worst={"out": 0.125}),
            record("gqa", "unsupported", reason="gqa is not supported"),
            record("alibi", "unsupported", reason="alibi is not supported"),
        ]
    )
    assert summary.exit is Exit.CONFORMS
    assert summary.line == "conforms: 2 cases, 2 unsupported"
    lines = drawn(summary)
    assert lines[0].split() == [
        "feature", "cases", "conforms", "unsupported", "worst/budget", "seconds"
    ]  # fmt: skip
    assert lines[2].split() == ["gqa", "2", "1", "1", "0.12", "1.0"]
    assert lines[3].split() == ["window", "1", "1", "0.50", "0.5"]
    assert lines[4].split() == ["alibi", "1", "1", "0.5"]  # not supported at all: last
    assert lines[5].split() == ["4", "2", "2", "0.50", "2.0"]


def test_a_run_that_does_not_names_the_worst_features_first_and_what_they_look_like() -> None:
    wrong = {"looks_like": ["out and lse equal attention with the window ignored (x, not y)"]}
    summary = summarise(
        [
            record("gqa"),
            record("gqa", "deviates", **wrong),
            record("alibi", "crashed", reason="raised ValueError"),
            record("window", "deviates", **wrong),
            record("window", "timed out", reason="no answer"),
        ]
    )
    assert summary.exit is Exit.DOES_NOT
    assert summary.line == (
        "deviates: window (2 of 2), alibi (1 of 1), gqa (1 of 2)"
        " – looks like: attention with the window ignored"
    )
    assert summary.total.crashed == 2


def test_a_feature_with_nothing_but_vacuous_cases_is_not_shown() -> None:
    vacuous = record("window", "vacuous", reason="window: no effect")
    summary = summarise([record("gqa"), vacuous, record("window", "unsupported", reason="x")])
    assert summary.exit is Exit.DOES_NOT
    assert summary.line == "not shown: window: every case is vacuous"
    assert any(line.startswith(" window (not shown)") for line in drawn(summary))
    assert summarise([record("window"), vacuous]).exit is Exit.CONFORMS


def test_known_deviations_do_not_fail_a_run_and_are_counted() -> None:
    summary = summarise([record("gqa"), record("gqa", "deviates", known="a bug of torch")])
    assert summary.exit is Exit.CONFORMS
    assert summary.line == "conforms: 1 case, 1 known deviation"
    assert (summary.total.deviates, summary.total.known, summary.total.failed) == (0, 1, 0)


def test_a_run_in_which_nothing_is_judged_says_why() -> None:
    unsupported = [record("gqa", "unsupported", reason="no CUDA"), record("gqa", "unavailable")]
    summary = summarise(unsupported)
    assert summary.exit is Exit.NOT_JUDGED
    assert summary.line == "could not be judged: 2 unsupported: no CUDA"
    assert summarise([]).exit is Exit.NOT_JUDGED
    assert summarise([]).line == "could not be judged: no cases"


def test_how_many_cases_were_not_run_and_why() -> None:
    records = [
        record("gqa"),
        *(record("gqa", "unsupported", reason="no gqa") for _ in range(3)),
        record("window", "unavailable", reason="needs 40 GB"),
        record("window", "vacuous", reason="no effect"),
    ]
    summary = summarise(records)
    lines = ["not run: 4 of 6 cases", "     3  no gqa", "     1  needs 40 GB"]
    assert summary.not_run_lines == lines
    assert summary.as_dict()["not_run"] == [
        {"reason": "no gqa", "cases": 3},
        {"reason": "needs 40 GB", "cases": 1},
    ]
    assert summarise([record("gqa")]).not_run_lines == []
    many = [record("gqa", "unsupported", reason=f"reason {n}") for n in range(REASONS + 2)]
    assert summarise(many).not_run_lines[-1] == "     2  for 2 further reasons"


def test_a_skip_budget_fails_a_run_of_which_too_little_was_run() -> None:
    records = [
        record("gqa"),
        record("gqa", "unsupported", reason="x"),
        record("gqa", "unavailable"),
    ]
    assert summarise(records, skip_budget=2).exit is Exit.CONFORMS
    over = summarise(records, skip_budget=1)
    assert over.exit is Exit.DOES_NOT
    assert over.line == "not run: 2 cases not run, and the skip budget is 1"
    assert over.as_dict()["verdict"] == "not run"
    wrong = summarise([*records, record("gqa", "deviates")], skip_budget=1)
    assert wrong.line.startswith("deviates")
    assert wrong.as_dict()["verdict"] == "does not conform"


def test_a_target_that_cannot_run_here_is_over_every_skip_budget() -> None:
    away = summarise([], unavailable="no CUDA")
    assert (away.exit, away.line) == (Exit.NOT_JUDGED, "could not be judged: no CUDA")
    over = summarise([], unavailable="no CUDA", skip_budget=100)
    assert over.exit is Exit.DOES_NOT
    assert over.line == "not run: nothing was run, and the skip budget is 100: no CUDA"
    found = document([], {}, {"skip_budget": 100}, unavailable="no CUDA")
    assert found["summary"]["exit_status"] == 1
    assert found["summary"]["unavailable"] == "no CUDA"


def test_the_document_is_json_and_holds_everything() -> None:
    records = [
        record("gqa", "deviates", worst={"out": math.inf, "lse": math.nan}, reason="far off"),
        record("gqa", worst={"out": 0.5}),
    ]
    found = document(records, {"python": "3"}, {"target": "t"}, ["entry 1 matches nothing"])
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text) == found
    assert found["environment"] == {"python": "3"}
    assert found["run"] == {"target": "t"}
    assert found["summary"]["verdict"] == "does not conform"
    assert found["summary"]["exit_status"] == 1
    assert found["summary"]["deviations_out_of_date"] == ["entry 1 matches nothing"]
    assert [(row["feature"], row["deviates"]) for row in found["features"]] == [("gqa", 1)]
    case = next(c for c in found["cases"] if c["verdict"] == "deviates")
    assert (case["worst"], case["reason"], case["seconds"]) == ("inf", "far off", 0.5)
    assert case["worst_by_tensor"] == {"out": "inf", "lse": "inf"}
