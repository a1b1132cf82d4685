import types

import pytest

from attn_reference.problem import Problem
from attnproof import cases
from attnproof.cases import Case, Declaration, all_cases, find_case, shown_features

ONE, TWO, THREE = (Problem(seqlen_q=n, head_dim=8) for n in (1, 2, 3))


def declared(**given) -> Declaration:
    @cases.cases(feature="x", **given)
    def test_something(problem, subject):
        """Nothing."""

    found = cases.declaration(test_something)
    assert found is not None
    return found


def test_full_adds_to_quick():
    found = declared(quick=[ONE, TWO], full=[TWO, THREE, THREE])
    assert found.quick == (ONE, TWO)
    assert found.full == (THREE,)


def test_a_problem_declared_twice_is_refused():
    with pytest.raises(ValueError, match=f"declared twice: {ONE.id}"):
        declared(quick=[ONE, ONE])


def test_levels():
    found = declared(quick=[ONE], full=[TWO])
    quick = cases.cases_of("chapter", "check", found, "quick")
    full = cases.cases_of("chapter", "check", found, "full")
    assert [case.id for case in quick] == [f"chapter/check/{ONE.id}"]
    assert [case.id for case in full] == [f"chapter/check/{p.id}" for p in (ONE, TWO)]
    assert [case.level for case in full] == ["quick", "full"]


def test_the_feature_may_follow_from_the_problem():
    found = declared(quick=[ONE])
    assert found.feature_of(ONE) == "x"

    @cases.cases(quick=[ONE], feature=lambda problem: f"length {problem.seqlen_q}")
    def test_other(problem, subject):
        """Nothing."""

    other = cases.declaration(test_other)
    assert other is not None
    assert other.feature_of(ONE) == "length 1"


def test_functions_without_a_declaration_declare_nothing():
    assert cases.declaration(len) is None


def test_chapters_are_found_without_importing_them():
    known = cases.chapters()
    assert {"numerics", "masks", "errors", "properties"} <= set(known)
    assert list(known) == sorted(known)


def test_an_unknown_chapter_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown, did you mean masks\?; known are big, "):
        cases.checks("mask")


def test_ids_find_their_case():
    for case in all_cases("full")[::97]:
        assert find_case(case.id) == case


def test_a_problem_that_is_not_declared_is_found_too():
    case = find_case(f"numerics/dense/{THREE.id}")
    assert case == Case(
        chapter="numerics", check="dense", problem=THREE, feature="dense fp32", level="full"
    )


@pytest.mark.parametrize(
    ("case_id", "message"),
    [
        ("nothing", "chapter 'nothing': unknown"),
        ("numerics", "chapter numerics has no check ''"),
        (f"numerics/sparse/{ONE.id}", "has no check 'sparse'; it has dense, head_dims"),
        ("numerics/dense/b1_x", "part 'x' is not understood"),
    ],
)
def test_ids_that_are_not_understood(case_id, message):
    with pytest.raises(ValueError, match=message):
        find_case(case_id)


def test_only_checks_count(monkeypatch):
    module = types.ModuleType("attnproof.conformance.test_made_up")

    @cases.cases(quick=[ONE], feature="x")
    def test_one(problem, subject):
        """Nothing."""

    module.test_one = test_one
    module.test_helper = lambda: None
    module.helper = test_one
    monkeypatch.setattr(cases, "chapters", lambda: ("made_up",))
    monkeypatch.setattr(cases.importlib, "import_module", lambda name: module)
    assert cases.checks("made_up") == {"one": test_one}


@pytest.mark.parametrize(
    ("problem_id", "expected"),
    [
        ("b1_h1x1_q4_k4_d8_fp32", ()),
        ("b1_h4x2_q4_k4_d8_fp32_causal=top-left_grad=q", ("causal top-left", "gqa", "gradients")),
        ("b1_h1x1_q4_k0_d8_fp32_causal=top-left_grad=q", ()),
        ("b1_h1x1_q4_k1_d8_fp32_scale=2_grad=q", ("scale",)),
        ("b1_h1x1_q1_k4_d8_fp32_causal=bottom-right_alibi", ("alibi",)),
        ("b1_h1x1_q1_k4_d8_fp32_causal=top-left_grad=q,k,v", ("causal top-left",)),
        ("b1_h1x1_q9_k9_d8_fp32_causal=bottom-right_window=3,0", ("window",)),
        ("b1_h1x1_q9_k9_d8_fp32_grad=q_dist=large", ()),
    ],
)
def test_what_a_case_must_show(problem_id, expected):
    assert shown_features(Problem.from_id(problem_id)) == expected
