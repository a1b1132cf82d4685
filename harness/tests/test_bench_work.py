"""The work of a problem, against counting; what is sampled of it, against the whole."""

from __future__ import annotations

import random

import pytest
import torch

from attn_reference import attention, gradients
from attn_reference.masks import positional_mask
from attn_reference.problem import Problem
from attnproof.benchmark import sample as sampling
from attnproof.benchmark.draw import drawn, empty_inputs, fill
from attnproof.benchmark.sample import Sample, cut, draw_sample, part_of
from attnproof.benchmark.suites import SUITES, Cell
from attnproof.benchmark.work import visible_pairs, work

MASKS = [
    {},
    {"causal": "top-left"},
    {"causal": "bottom-right"},
    {"window": (3, 2)},
    {"window": (None, 0)},
    {"window": (2, None), "causal": "bottom-right"},
    {"window": (1, 1), "causal": "top-left"},
]
LENGTHS = [(7, 7), (3, 9), (9, 3), (1, 12), (5, 0)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_visible_pairs_are_those_that_the_mask_shows(mask: dict, lengths: tuple[int, int]) -> None:
    len_q, len_k = lengths
    problem = Problem(batch=2, seqlen_q=len_q, seqlen_k=len_k, **mask)
    dense = positional_mask(problem, len_q, len_k).dense(len_q, len_k)
    assert visible_pairs(problem) == 2 * int(dense.sum())
    read = int(dense.any(0).sum())
    kv_bytes = work(Cell(suite="x", direction="forward", problem=problem)).bytes
    assert kv_bytes == 2 * (len_q * (64 + 64) + read * (64 + 64)) * 4


def test_pairs_of_lengths_and_packed_sequences() -> None:
    assert visible_pairs(Problem(batch=2, seqlen_q=4, seqlen_k=8, key_lengths=(8, 3))) == 44
    assert visible_pairs(Problem(packed=((2, 2), (3, 5)), causal="bottom-right")) == 3 + 12


def test_a_mask_that_is_a_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="mask='blocks'"):
        visible_pairs(Problem(mask="blocks"))


def test_work_is_that_of_the_papers() -> None:
    full, causal = (
        Problem(batch=2, heads_q=4, seqlen_q=1024, head_dim=64, dtype="bf16", causal=c)
        for c in ("none", "top-left")
    )
    forward = work(Cell(suite="x", direction="forward", problem=full))
    assert forward.flops == 4 * 2 * 4 * 1024**2 * 64
    assert forward.bytes == 4 * 2 * 4 * 1024 * 64 * 2  # Q, K, V, out
    half = work(Cell(suite="x", direction="forward", problem=causal)).flops / forward.flops
    assert half == pytest.approx(0.5, rel=2e-3)
    backward = work(Cell(suite="x", direction="backward", problem=full))
    assert backward.flops == 2.5 * forward.flops
    both = work(Cell(suite="x", direction="both", problem=full))
    assert both.flops == 3.5 * forward.flops


def test_the_grid_of_the_papers() -> None:
    cells = list(SUITES["papers"]("bf16"))
    assert len(cells) == len({cell.name for cell in cells}) == 72
    for cell in cells:
        assert cell.problem.batch * cell.problem.seqlen_q == 16384
        assert cell.problem.heads_q * cell.problem.head_dim == 2048
    assert Cell.from_dict(cells[-1].as_dict()) == cells[-1]


@pytest.mark.parametrize("suite", SUITES)
def test_every_cell_has_inputs_and_work(suite: str) -> None:
    for cell in SUITES[suite]("bf16"):
        assert work(cell).flops > 0
        with torch.device("meta"):
            assert empty_inputs(cell.problem, "meta").q.shape[1] == cell.problem.heads_q


def test_inputs_are_new_for_every_seed_and_the_same_for_the_same() -> None:
    problem = Problem(heads_q=2, seqlen_q=16, head_dim=16, gradients=("q", "k", "v"))
    inputs = empty_inputs(problem, "cpu")
    fill(inputs, 1)
    first = inputs.k.detach().clone()
    fill(inputs, 2)
    assert not torch.equal(inputs.k, first)
    assert torch.equal(drawn(problem, 1, "cpu").k, first)
    assert inputs.q.requires_grad


@pytest.mark.parametrize("mask", [{}, {"causal": "top-left"}, {"window": (3, 1)}], ids=str)
def test_sampled_rows_are_a_problem_with_the_same_answer(mask: dict) -> None:
    problem = Problem(batch=3, heads_q=4, heads_kv=2, seqlen_q=12, head_dim=16, **mask)
    inputs = drawn(problem, 3, "cpu")
    sample = Sample(batch=(0, 2), rows=(0, 5, 11))
    part, its = part_of(problem, inputs, sample)
    whole = attention(inputs, problem).out
    torch.testing.assert_close(attention(its, part).out, cut(whole, sample, 2, rows=True))


def test_sampled_heads_have_the_same_gradients() -> None:
    problem = Problem(
        batch=2, heads_q=4, heads_kv=2, seqlen_q=8, causal="top-left", gradients=("q", "k", "v")
    )
    inputs = drawn(problem, 3, "cpu")
    sample = Sample(batch=(1,), kv_heads=(1,))
    part, its = part_of(problem, inputs, sample)
    whole, of_part = gradients(inputs, problem), gradients(its, part)
    assert torch.allclose(of_part.q, cut(whole.q, sample, 2, rows=True))
    assert torch.allclose(of_part.k, cut(whole.k, sample, 1, rows=False))
    assert torch.allclose(of_part.v, cut(whole.v, sample, 1, rows=False))


def test_how_much_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sampling.PAIRS, "cpu", 4096)
    chance = random.Random(0)
    tiny = Problem(seqlen_q=16)
    assert draw_sample(tiny, "cpu", chance) == Sample()
    rows = draw_sample(Problem(heads_q=2, seqlen_q=128), "cpu", chance)
    assert rows.rows is not None
    assert len(rows.rows) == 4096 // (2 * 128)
    assert "16 of 128 query rows" in rows.describe(Problem(heads_q=2, seqlen_q=128))
    large = Problem(batch=2, heads_q=4, seqlen_q=128, gradients=("q",))
    heads = draw_sample(large, "cpu", chance)
    assert heads.rows is None
    assert (len(heads.batch), len(heads.kv_heads)) == (1, 1)
