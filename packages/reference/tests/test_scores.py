"""The scores of a chunk, as the budget and the diagnosis read them."""

from __future__ import annotations

import torch

from attn_reference import FLASH, Problem
from attn_reference.rounding import Rounding
from attn_reference.scores import chunk_scores, probabilities
from attn_reference.sequences import sequences


def test_the_parts_make_the_scores(problem, random_inputs):
    for sequence in sequences(random_inputs(problem), problem):
        for kv_head in range(problem.kv_heads):
            chunk = chunk_scores(sequence, problem, kv_head, slice(0, sequence.len_q))
            shape = (problem.group, sequence.len_q, sequence.len_k)
            assert chunk.raw.shape == chunk.visible.shape == chunk.scores.shape == shape
            assert chunk.raw.dtype == chunk.scores.dtype == torch.float64
            scores = chunk.raw
            assert (chunk.tanh is not None) == (problem.softcap > 0)
            if chunk.tanh is not None:
                scores = problem.softcap * chunk.tanh
            assert (chunk.additive is not None) == (problem.alibi or problem.bias is not None)
            if chunk.additive is not None:
                scores = scores + chunk.additive
            hidden = scores.masked_fill(~chunk.visible, -torch.inf)
            assert torch.equal(chunk.scores, hidden)
            p, lse = probabilities(chunk.scores)
            sums = chunk.visible.any(-1).double()
            torch.testing.assert_close(p.sum(-1), sums)
            assert torch.equal(lse == -torch.inf, sums == 0)


def test_a_bias_of_minus_infinity_hides(random_inputs):
    problem = Problem(seqlen_q=2, seqlen_k=3, head_dim=2, bias="hiding", alibi=True)
    (sequence,) = sequences(random_inputs(problem), problem)
    visible = chunk_scores(sequence, problem, 0, slice(0, 2)).visible
    assert visible.tolist() == [[[True] * 3, [False] * 3]]


def test_sinks_take_their_share():
    scores = torch.zeros(2, 1, 3, dtype=torch.float64)
    p, lse = probabilities(scores, torch.tensor([0.0, -torch.inf], dtype=torch.float64))
    torch.testing.assert_close(p[0], torch.full((1, 3), 0.25, dtype=torch.float64))
    torch.testing.assert_close(p[1], torch.full((1, 3), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(lse[:, 0], torch.tensor([4.0, 3.0]).double().log())


def test_rounding_reaches_the_scores(random_inputs):
    problem = Problem(seqlen_q=2, head_dim=4, dtype="bf16")
    (sequence,) = sequences(random_inputs(problem), problem)
    low = chunk_scores(sequence, problem, 0, slice(0, 2), Rounding(problem, FLASH))
    assert low.scores.dtype == torch.float32
