"""The cases that ship: they cover what they say, and each of them proves something."""

import itertools
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import settings

from attn_reference.precision import FLASH
from attn_reference.problem import FEATURES, Problem
from attnproof.cases import all_cases, cases, chapters, checks, declaration, shown_features
from attnproof.conformance.cover import cover, problems
from attnproof.conformance.exploring import explore
from attnproof.conformance.recipe import in_each_dtype, turning
from attnproof.inputs.make import make_inputs
from attnproof.judge.vacuity import vacuous_features
from attnproof.layout import parse_layout
from attnproof.verdict import NotConforming, Status, Verdict

QUICK_CASES = 750  # more take longer than a minute
DTYPES = ("fp32", "fp16", "bf16")
# Checks that level quick leaves out.
NOT_QUICK = {
    "big/many_heads": "70,000 heads take seconds",
    "determinism/many_repeats": "a hundred calls take seconds",
}
# Checks that do not meet each of their sets of features in each dtype at level quick.
ANY_DTYPE = {"masks/pairs": "18 pairs: each in one dtype, and each dtype with a third of them"}
# What these chapters show does not depend on the features of a problem: each dtype is met
# without features, or with as few of them as the check allows.
FEWEST_FEATURES = {"determinism", "properties", "state"}


def pairs_of(rows, dimensions):
    met = set()
    for row in rows:
        for one, other in itertools.combinations(dimensions, 2):
            met.add((one, row[one], other, row[other]))
    return met


SIZES = {"a": range(4), "b": "xyz", "c": (True, False), "d": range(5)}


def test_a_cover_has_every_pair_in_far_fewer_rows_than_a_product():
    rows = cover(SIZES, lambda row: True)
    everything = [dict(zip(SIZES, r, strict=True)) for r in itertools.product(*SIZES.values())]
    assert pairs_of(rows, SIZES) == pairs_of(everything, SIZES)
    assert len(rows) <= 25 < len(everything) == 120


def valid(row):
    return not (row["a"] == 0 and row["b"] == "x") and not (row["c"] and row["d"] > 2)


def test_a_cover_with_a_filter_has_every_pair_that_can_meet():
    rows = cover(SIZES, valid)
    everything = [dict(zip(SIZES, r, strict=True)) for r in itertools.product(*SIZES.values())]
    assert all(valid(row) for row in rows)
    assert pairs_of(rows, SIZES) == pairs_of(filter(valid, everything), SIZES)


def test_covers_are_the_same_every_time():
    assert cover(SIZES, valid) == cover(SIZES, valid)


def test_one_dimension_is_covered_by_its_values():
    assert cover({"a": (1, 2)}, lambda row: True) == [{"a": 1}, {"a": 2}]


def test_nothing_valid_gives_nothing():
    assert cover(SIZES, lambda row: False) == []


def test_an_empty_dimension_is_refused():
    with pytest.raises(ValueError, match="dimension 'b' has no values"):
        cover({"a": (1,), "b": ()}, lambda row: True)


def test_covers_of_problems_leave_out_what_is_none():
    found = problems(
        {"heads": ({"heads_q": 4, "heads_kv": 2}, {"heads_q": 3, "heads_kv": 2}), "head_dim": (8,)},
        seqlen_q=5,
    )
    assert found == (Problem(heads_q=4, heads_kv=2, head_dim=8, seqlen_q=5),)
    some = problems({"seqlen_q": (1, 2, 3)}, accept=lambda p: p.seqlen_q != 2, head_dim=8)
    assert [p.seqlen_q for p in some] == [1, 3]


def test_case_ids_are_unique_and_stable_under_their_id():
    ids = [case.id for case in all_cases("full")]
    assert len(set(ids)) == len(ids)
    for case in all_cases("full"):
        assert Problem.from_id(case.problem.id) == case.problem


def test_every_chapter_has_quick_cases_and_every_check_a_description():
    quick = Counter(case.chapter for case in all_cases("quick"))
    assert set(quick) == set(chapters())
    for chapter in chapters():
        for name, check in checks(chapter).items():
            assert check.__doc__, f"{chapter}/{name}"
            assert declaration(check).quick or declaration(check).full


def test_the_documentation_counts_them():
    text = " ".join((Path(__file__).parents[2] / "docs/chapters.md").read_text().split())
    quick, full = (f"{len(all_cases(level)):,}" for level in ("quick", "full"))
    assert f"Level quick is {quick} cases" in text
    assert f"level full is {full}." in text


def test_quick_is_quick():
    assert len(all_cases("quick")) <= QUICK_CASES


@pytest.mark.parametrize("level", ["quick", "full"])
def test_every_feature_and_dtype_is_met(level):
    found = [case.problem for case in all_cases(level)]
    assert {feature for p in found for feature in p.features} == set(FEATURES)
    assert {p.dtype for p in found} == {"fp32", "fp16", "bf16"}


@pytest.mark.parametrize("feature", sorted(set(FEATURES) - {"lse gradient", "paged"}))
def test_a_target_with_a_single_feature_meets_it(feature):
    """Cases that need nothing else, besides the gradients that everything has."""
    alone = [
        case.problem
        for case in all_cases("quick")
        if feature in case.problem.features and set(case.problem.features) <= {feature, "gradients"}
    ]
    assert len(alone) >= 2, feature


def test_a_target_without_features_meets_many_cases():
    plain = [c for c in all_cases("quick") if not c.problem.features]
    assert len(plain) >= 80
    assert len([c for c in plain if c.problem.dtype == "bf16"]) >= 20


def sets_of_features(level):
    """The dtypes in which each check meets each set of features."""
    found = defaultdict(lambda: defaultdict(set))
    for case in all_cases(level):
        features = frozenset(case.problem.features)
        found[f"{case.chapter}/{case.check}"][features].add(case.problem.dtype)
    return found


def test_every_check_is_met_in_each_dtype():
    for level, left_out in (("quick", NOT_QUICK), ("full", {})):
        found = sets_of_features(level)
        every = {f"{chapter}/{name}" for chapter in chapters() for name in checks(chapter)}
        assert every - set(found) == set(left_out), level
        for check, sets in found.items():
            assert set().union(*sets.values()) == set(DTYPES), f"{check} at level {level}"


@pytest.mark.parametrize("chapter", chapters())
def test_every_set_of_features_is_met_in_each_dtype(chapter):
    """A target with one dtype loses nothing of what its features allow."""
    lacking = []
    for check, sets in sets_of_features("quick").items():
        if not check.startswith(f"{chapter}/") or check in ANY_DTYPE:
            continue
        for features, dtypes in sets.items():
            if chapter in FEWEST_FEATURES and any(other < features for other in sets):
                continue
            lacking += [f"{check} with {sorted(features)}: {d}" for d in set(DTYPES) - dtypes]
    assert lacking == []


def test_each_dtype_meets_the_head_dimensions_that_tiles_of_32_do_not_divide():
    found = {
        (case.problem.dtype, case.problem.head_dim)
        for case in all_cases("quick")
        if case.check == "head_dims"
    }
    assert {(dtype, d) for dtype in DTYPES for d in (8, 40, 72, 80)} <= found


def test_what_is_missing_is_repeated_in_another_dtype():
    causal = {"causal": "top-left"}
    given = turning(({"seqlen_q": 5}, {"seqlen_q": 6}, {"seqlen_q": 7, **causal}), head_dim=8)
    found = in_each_dtype(given)
    assert found[:3] == given
    assert [(p.dtype, p.seqlen_q) for p in found[3:]] == [("bf16", 6), ("fp32", 7), ("fp16", 7)]
    assert in_each_dtype(found) == found
    assert in_each_dtype(given, fewest=True) == found[:4]


def test_dtypes_turn_where_none_is_given():
    values = ({"seqlen_q": 5}, {"seqlen_q": 6, "dtype": "fp32"})
    assert [p.dtype for p in turning(values)] == ["fp32", "fp32"]
    assert [p.dtype for p in turning(({}, {}, {}, {}))] == ["fp32", "fp16", "bf16", "fp32"]
    assert [p.dtype for p in turning(values, dtype="bf16")] == ["bf16", "fp32"]


def test_layouts_are_understood():
    for case in all_cases("full"):
        for _, layout in case.problem.layouts:
            parse_layout(layout)


PROBLEM = Problem(seqlen_q=5, seqlen_k=7, head_dim=8)


@cases(quick=[PROBLEM], feature="x")
def declared_quick(problem, subject):
    """A check to explore around."""


def failing_above(limit, seen):
    def holds(variation):
        seen.append(variation)
        if variation.keys > limit:
            raise NotConforming(Verdict(status=Status.DEVIATES, reason="too long"))

    return holds


def test_exploring_names_the_smallest_problem_that_fails():
    seen = []
    with pytest.raises(NotConforming) as caught:
        explore(declared_quick, PROBLEM, failing_above(5, seen), (1, 3))
    assert seen[0] == PROBLEM.replace(seqlen_q=1, seqlen_k=3)
    smallest = PROBLEM.replace(seqlen_q=1, seqlen_k=6)
    assert caught.value.verdict.reason == f"too long, for {smallest.id}"


def test_regressions_come_first():
    seen = []
    with pytest.raises(NotConforming):
        explore(declared_quick, PROBLEM, failing_above(1, seen), (3, 2), (9, 9))
    assert seen == [PROBLEM.replace(seqlen_q=3, seqlen_k=2)]


def test_exploring_tries_the_same_every_time_and_more_at_level_full():
    tried = []
    for problem in (PROBLEM, PROBLEM, PROBLEM.replace(scale=0.5)):
        tried.append([])
        explore(declared_quick, problem, failing_above(999, tried[-1]))
    assert tried[0] == tried[1]
    assert len(tried[0]) == 3
    assert len(tried[2]) == 8
    assert all(one.scale == 0.5 for one in tried[2])


def test_exploring_leaves_the_profile_of_others_alone():
    before = settings().max_examples
    explore(declared_quick, PROBLEM, lambda variation: None)
    assert settings().max_examples == before


def vacuous(found):
    for problem in dict.fromkeys(case.problem for case in found):
        idle = vacuous_features(problem, make_inputs(problem), shown_features(problem), FLASH)
        if idle:
            yield f"{problem.id}: {', '.join(idle)}"


@pytest.mark.parametrize("chapter", chapters())
def test_no_quick_case_is_vacuous(chapter):
    assert list(vacuous(c for c in all_cases("quick") if c.chapter == chapter)) == []


@pytest.mark.slow
@pytest.mark.parametrize("chapter", chapters())
def test_no_case_is_vacuous(chapter):
    assert list(vacuous(c for c in all_cases("full") if c.chapter == chapter)) == []
