"""The text of a failing case, and the HTML page of a run."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import torch

from attn_reference.problem import Problem
from attnproof.diagnosis.heat_map import SHADES, heat_map
from attnproof.environment import environment
from attnproof.options import Options
from attnproof.record import CaseRecord
from attnproof.report.page import coloured, write_report
from attnproof.report.summary import summarise
from attnproof.report.verdict_text import gist, replay_command, verdict_text
from attnproof.verdict import Finding, Status, Verdict

OPTIONS = Options(target="my kernel.py:attend", signature="sdpa", device="cpu", seed=3)
CASE = "masks/window/b1_h2x2_q9_k9_d8_fp32_window=2,0"


def failing() -> Verdict:
    error = torch.full((1, 2, 9, 8), 0.1)
    error[0, 1, 4:] = 50.0
    return Verdict(
        status=Status.DEVIATES,
        reason="40 of 144 elements of out are beyond the error budget",
        findings=[
            Finding(tensor="out", rule="bound", message="<40> of 144 elements", worst=50.0),
            Finding(tensor="out", rule="row statistic", message="a row", worst=3.0),
            Finding(tensor="lse", rule="missing", message="lse is missing"),
        ],
        worst={"out": 50.0},
        statistics={"z_row": 12.0, "z_row_limit": 1.7},
        looks_like=["out equals attention with the window ignored", "out equals zeros"],
        heat_map=heat_map(Problem(), error),
        conforms_under="eager",
    )


def recorded(verdict: Verdict, known: str | None = None) -> CaseRecord:
    return CaseRecord(
        id=CASE,
        chapter="masks",
        feature="window",
        problem=CASE.split("/")[-1],
        verdict=verdict.as_dict(),
        seconds=0.1,
        known=known,
    )


def test_a_failing_case_in_full() -> None:
    text = verdict_text(CASE, failing(), OPTIONS)
    assert text == verdict_text(CASE, failing().as_dict(), OPTIONS)
    lines = text.splitlines()
    assert lines[:5] == [
        CASE,
        "deviates: out equals attention with the window ignored",
        "  or: out equals zeros",
        "  bound: <40> of 144 elements",
        "  missing: lse is missing",
    ]
    assert "  z_row 12 (limit 1.7)" in lines
    assert "     4  ···███" in lines
    assert lines[-2] == "It would conform under precision eager: --precision eager"
    assert lines[-1] == f"replay: {replay_command(CASE, OPTIONS)}"
    assert max(map(len, lines[:-1])) <= 100


def test_sentences_are_broken_at_the_width_of_the_terminal() -> None:
    lines = verdict_text(CASE, failing(), OPTIONS, 40).splitlines()
    kept = (
        CASE,
        "replay: ",
        "  ·",
        "error over budget",
        "over budget",
    )  # ids, commands and the heat map
    assert all(len(line) <= 40 for line in lines if not line.startswith(kept))
    assert verdict_text(CASE, failing(), OPTIONS).splitlines() != lines


def test_what_conforms_says_how_well() -> None:
    verdict = Verdict(status=Status.CONFORMS, worst={"out": 0.25, "lse": 0.5})
    assert verdict_text(CASE, verdict, OPTIONS).splitlines()[1:3] == [
        "conforms",
        "  largest error over its budget: out 0.25, lse 0.5",
    ]


def test_a_crash_in_full_shows_its_traceback() -> None:
    crashed = Verdict(status=Status.CRASHED, reason="raised ValueError: no\nTraceback:\n  line 3")
    lines = verdict_text(CASE, crashed, Options(target="t")).splitlines()
    assert lines[1:4] == ["crashed", "  raised ValueError: no", "  Traceback:"]
    assert lines[-1] == f"replay: attnproof replay {CASE} --target t"


def test_the_replay_command_has_what_the_verdict_depends_on() -> None:
    command = replay_command(CASE, OPTIONS)
    assert command.endswith("--target 'my kernel.py:attend' --signature sdpa --device cpu --seed 3")
    within = Options(target="t", in_process=True, timeout=5.0, precision="eager")
    assert replay_command(CASE, within).endswith(
        "--target t --precision eager --timeout 5 --in-process"
    )


def test_the_gist_is_what_failing_cases_have_in_common() -> None:
    verdict = failing().as_dict()
    assert gist(verdict) == "attention with the window ignored"
    verdict["looks_like"] = [
        "dq equals attention with the window one key short (4, not 5), in the rows that deviate "
        "(3 of 9)"
    ]
    assert gist(verdict) == "attention with the window one key short"
    verdict["looks_like"] = []
    assert gist(verdict) == "deviates: out (bound), out (row statistic), lse (missing)"
    crashed = Verdict(status=Status.CRASHED, reason="raised ValueError\nTraceback")
    assert gist(crashed.as_dict()) == "raised ValueError"


def test_the_page_is_self_contained_and_says_everything(tmp_path: Path) -> None:
    records = [
        recorded(failing()),
        recorded(Verdict(status=Status.CONFORMS, worst={"out": 0.5, "lse": 0.1})),
        recorded(Verdict(status=Status.DEVIATES), known="a known <bug>"),
    ]
    summary = summarise(records, ["entry 2 matches no case"])
    smallest = {CASE: "masks/window/b1_h1x1_q1_k2_d8_fp32_window=0,0"}
    path = write_report(tmp_path / "made", OPTIONS, summary, records, environment(), smallest)
    assert path == tmp_path / "made" / "index.html"
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:|//|[a-z./]+\.(css|js|png|svg))""", page)
    assert "&lt;40&gt; of 144 elements" in page
    assert "a known &lt;bug&gt;" in page
    assert "entry 2 matches no case" in page
    assert "deviates: window (1 of 3)" in page
    assert page.count("<svg") == 2
    assert "#010203" not in page  # stands for the colour of the text, which follows the theme
    assert replay_command(smallest[CASE], OPTIONS) in html.unescape(page)
    assert "z_row 12 (limit 1.7)" in page
    assert f"background:{SHADES[4].colour}" in page
    assert CASE in page
    assert "torch" in page


def test_the_page_shows_a_case_of_each_failing_feature_first(tmp_path: Path) -> None:
    def fails(feature: str, name: str) -> CaseRecord:
        return replace(recorded(failing()), feature=feature, id=f"masks/{name}")

    right = replace(recorded(Verdict(status=Status.CONFORMS)), feature="sinks", id="masks/right")
    records = [fails("sinks", "one"), right, fails("window", "two"), fails("window", "three")]
    path = write_report(tmp_path, OPTIONS, summarise(records), records, environment())
    shown = re.findall(r"<summary><code>masks/(\w+)", path.read_text(encoding="utf-8"))
    assert shown == ["two", "one", "three"]


def test_every_shade_of_a_heat_map_becomes_a_cell() -> None:
    error = torch.zeros(2, 2, 3, 4)
    error[1, 1, 2] = 100.0
    cells = coloured(heat_map(Problem(), error))
    assert cells.count("<span") == 2 * 2 * 3 * 3  # batch, heads, rows, glyphs of a cell
    assert cells.count(f"background:{SHADES[4].colour}") == 3
    assert "not finite" not in cells
