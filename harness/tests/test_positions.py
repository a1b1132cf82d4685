"""Visibility as a tensor, against the mask of the reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from attn_reference.masks import positional_mask
from attn_reference.problem import Problem
from attnproof.backends.positions import distance_from_diagonal, visible, without_padding
from attnproof.inputs.make import make_inputs

SIZES = ((1, 7), (7, 7), (5, 9), (9, 5))
WINDOWS = (None, (2, 1), (None, 0), (0, None))
RULES = [
    Problem(seqlen_q=q, seqlen_k=k, head_dim=8, causal=causal, window=window)
    for (q, k), causal, window in itertools.product(
        SIZES, ("none", "top-left", "bottom-right"), WINDOWS
    )
]


@pytest.mark.parametrize("problem", RULES, ids=lambda problem: problem.id)
def test_rules_are_those_of_the_reference(problem: Problem) -> None:
    inputs = make_inputs(problem)
    seen = visible(inputs, problem, distance_from_diagonal(inputs, problem))
    rule = positional_mask(problem, problem.seqlen_q, problem.keys)
    assert torch.equal(seen[0, 0], rule.dense(problem.seqlen_q, problem.keys))


@pytest.mark.parametrize("causal", ["none", "top-left", "bottom-right"])
def test_lengths_move_the_diagonal_of_each_batch_entry(causal: str) -> None:
    lengths = (0, 3, 6)
    problem = Problem(
        batch=3, seqlen_q=4, seqlen_k=6, head_dim=8, causal=causal, key_lengths=lengths
    )
    inputs = make_inputs(problem)
    seen = visible(inputs, problem, distance_from_diagonal(inputs, problem))
    for b, length in enumerate(lengths):
        alone = problem.replace(batch=1, key_lengths=None, seqlen_k=length)
        expected = positional_mask(alone, 4, length).dense(4, length)
        assert torch.equal(seen[b, 0, :, :length], expected)
        assert not seen[b, 0, :, length:].any()


def test_a_mask_hides_beside_the_rules() -> None:
    problem = Problem(heads_q=2, seqlen_q=4, seqlen_k=4, head_dim=8, causal="top-left")
    problem = problem.replace(mask="random", mask_shape="1hqk")
    inputs = make_inputs(problem)
    assert inputs.mask is not None
    seen = visible(inputs, problem, distance_from_diagonal(inputs, problem))
    assert torch.equal(seen, inputs.mask & torch.ones(4, 4, dtype=torch.bool).tril())


def test_padding_is_zero_and_the_rest_as_it_was() -> None:
    problem = Problem(batch=2, seqlen_q=2, seqlen_k=5, head_dim=8, key_lengths=(2, 5))
    inputs = make_inputs(problem)
    assert inputs.k[0, :, 2:].isnan().all()
    k = without_padding(inputs.k, inputs)
    assert not k[0, :, 2:].any()
    assert torch.equal(k[0, :, :2], inputs.k[0, :, :2])
    assert torch.equal(k[1], inputs.k[1])
