"""Shrinking keeps what fails and drops all else."""

from __future__ import annotations

import pytest

from attn_reference.problem import Problem
from attnproof.shrink import shrink, smaller

LARGE = Problem(
    batch=3,
    heads_q=12,
    heads_kv=4,
    seqlen_q=300,
    seqlen_k=500,
    head_dim=96,
    head_dim_v=64,
    dtype="bf16",
    scale=0.3,
    causal="bottom-right",
    window=(40, 3),
    softcap=5.0,
    alibi=True,
    mask="random",
    bias="normal",
    sinks=True,
    gradients=("q", "k", "v", "bias", "sinks"),
    lse_gradient=True,
    layouts=(("k", "bshd"), ("q", "bhds")),
    distribution="large",
    seed=7,
)


def test_everything_that_does_not_matter_is_dropped() -> None:
    found, tried = shrink(LARGE, lambda p: p.window is not None and p.keys >= 65, seconds=60)
    assert found == Problem(
        seqlen_q=1, seqlen_k=65, head_dim=8, dtype="bf16", window=found.window, seed=0
    )
    assert found.window in {(40, None), (None, 3)}
    assert 20 < tried < 200


def test_a_group_survives_when_it_matters() -> None:
    found, _ = shrink(LARGE, lambda p: p.group > 1 and "k" in p.gradients, seconds=60)
    assert (found.heads_q, found.heads_kv, found.gradients) == (2, 1, ("k",))
    assert found.features == ("gqa", "gradients")


def test_packed_sequences_are_taken_away_one_by_one() -> None:
    packed = Problem(packed=((5, 5), (0, 7), (33, 2), (9, 0)), head_dim=8)
    found, _ = shrink(packed, lambda p: any(a > 0 and b == 0 for a, b in p.packed or ()), 60)
    assert found.packed == ((1, 0),)


def test_key_lengths_shrink_with_the_batch() -> None:
    asked = Problem(batch=3, seqlen_q=4, seqlen_k=100, key_lengths=(100, 0, 37), head_dim=8)
    found, _ = shrink(asked, lambda p: p.key_lengths is not None and 0 in p.key_lengths, 60)
    assert (found.batch, found.key_lengths, found.seqlen_q, found.keys) == (1, (0,), 1, 1)


def test_nothing_is_tried_twice_and_nothing_without_time() -> None:
    asked: list[Problem] = []
    found, tried = shrink(LARGE, lambda p: asked.append(p) is not None, seconds=60)
    assert found == LARGE
    assert tried == len(asked) == len(set(asked))
    assert shrink(LARGE, lambda p: True, seconds=-1) == (LARGE, 0)


@pytest.mark.parametrize("problem", [LARGE, Problem(), Problem(page_size=16, key_lengths=(30,))])
def test_every_step_is_another_problem_of_the_same_dtype(problem: Problem) -> None:
    for step in smaller(problem):
        assert step.dtype == problem.dtype
        assert Problem.from_id(step.id) == step
