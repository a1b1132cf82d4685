"""Replaying a case: its verdict, the call that deviates, the smallest case that fails like it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from attnproof.cases import Case, find_case
from attnproof.diagnosis.explainer import Explainer
from attnproof.options import Options, make_subject
from attnproof.replay import replay, smallest
from attnproof.subject import Subject
from attnproof.verdict import Status

SMALL = Path(__file__).parent / "planted" / "small.py"


def subject_of(function: str) -> Subject:
    return make_subject(Options(target=f"{SMALL}:{function}", device="cpu", in_process=True))


@pytest.fixture
def modulo() -> Iterator[Subject]:
    subject = subject_of("modulo")
    yield subject
    subject.runner.close()


@pytest.fixture
def case() -> Case:
    return find_case("heads/groups/b2_h4x2_q9_k20_d32_fp32_seed=3")


def test_a_case_that_conforms(case: Case) -> None:
    replayed = replay(case, subject_of("right"))
    assert replayed.verdict.status is Status.CONFORMS
    assert replayed.verdict.worst["out"] < 1
    assert replayed.computation is None


def test_a_case_that_deviates_comes_with_the_call_and_its_diagnosis(
    case: Case, modulo: Subject
) -> None:
    replayed = replay(case, modulo)
    assert replayed.verdict.status is Status.DEVIATES
    assert "h % heads_kv" in replayed.verdict.looks_like[0]
    assert "heads across" in replayed.verdict.heat_map
    assert replayed.computation is not None
    assert replayed.computation.problem == case.problem
    assert replayed.computation.result.attention is not None


def test_when_time_is_up_only_mistakes_that_were_met_are_tried(case: Case, modulo: Subject) -> None:
    modulo.explain = Explainer(modulo, seconds=0)
    verdict = replay(case, modulo).verdict
    assert verdict.looks_like == []
    assert "heads across" in verdict.heat_map
    modulo.explain = explainer = Explainer(modulo, seconds=60)
    replay(case, modulo)
    explainer._left = 0
    assert "h % heads_kv" in replay(case, modulo).verdict.looks_like[0]


def test_an_unsupported_case_keeps_its_reason(case: Case) -> None:
    replayed = replay(case, subject_of("nothing"))
    assert (replayed.verdict.status, replayed.verdict.reason) == (Status.UNSUPPORTED, "not today")


def test_the_smallest_fails_in_the_same_way_and_the_subject_is_left_as_it_was(
    case: Case, modulo: Subject
) -> None:
    explain = modulo.explain
    found, tried = smallest(case, modulo, Status.DEVIATES, seconds=60)
    assert found.id == "heads/groups/b1_h4x2_q1_k1_d8_fp32"
    assert tried > 5
    assert replay(found, modulo).verdict.status is Status.DEVIATES
    assert modulo.explain is explain


def test_nothing_smaller_ends_in_another_way(case: Case, modulo: Subject) -> None:
    assert smallest(case, modulo, Status.CRASHED, seconds=60)[0] == case
