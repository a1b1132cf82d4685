"""The ring in one process: any ranks, any placement, every feature; and a planted fault."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from attn_reference import Problem, attention, gradients
from attn_reference.inputs import Gradients
from attn_reference.sequences import sequences
from attnproof.inputs.make import make_inputs, make_keep_mask
from attnproof.judge.judging import judge
from attnproof.plan import CallResult
from attnproof.verdict import Status, Verdict
from online_softmax import ring
from online_softmax.attnproof_backend import ring as backend
from online_softmax.mask_rule import MaskRule
from online_softmax.memory import Memory
from online_softmax.operands import Operands
from online_softmax.placement import PLACEMENTS, Placement, work, zigzag
from online_softmax.steps import Step

SMALL = Problem(batch=2, heads_q=4, heads_kv=2, seqlen_q=21, head_dim=4, dtype="fp64", seed=1)
GRADIENTS = ("q", "k", "v")
PROBLEMS = [
    SMALL,
    SMALL.replace(seqlen_q=3, seqlen_k=40, causal="bottom-right"),  # shorter than the ring
    SMALL.replace(seqlen_q=0),
    SMALL.replace(seqlen_k=0, sinks=True),
    SMALL.replace(batch=0),
    SMALL.replace(seqlen_k=9, causal="bottom-right"),  # rows that see no key
    SMALL.replace(seqlen_k=9, causal="bottom-right", sinks=True),
    SMALL.replace(causal="top-left", window=(5, 2), alibi=True, softcap=0.75),
    SMALL.replace(mask="random", mask_shape="1h1k", bias="normal", bias_shape="b1q1"),
    SMALL.replace(mask="random", bias="normal", bias_shape="11qk", head_dim_v=6),
    SMALL.replace(key_lengths=(20, 0), dropout=0.3, sinks=True, scale=-0.4),
    SMALL.replace(page_size=7, key_lengths=(21, 13), causal="bottom-right"),
    Problem(packed=((3, 0), (0, 4), (20, 17), (5, 30)), heads_q=2, head_dim=3, dtype="fp64"),
]


def ring_step(ranks: int, placement: Placement) -> Step:
    options = {"ranks": ranks, "block_q": 4, "block_k": 8, "placement": placement}
    return Step(
        name="ring",
        title="",
        forward=partial(ring.forward, **options),
        backward=partial(ring.backward, **options),
    )


def with_gradients(problem: Problem) -> Problem:
    names = [*(() if problem.page_size else GRADIENTS)]
    names += [name for name in ("bias", "sinks") if getattr(problem, name)]
    return problem.replace(gradients=tuple(names), lse_gradient=bool(names))


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
def test_the_ring_is_attention(problem: Problem, ranks: int, placement: Placement) -> None:
    problem = with_gradients(problem)
    inputs = make_inputs(problem)
    if problem.dropout:
        inputs.keep_mask = make_keep_mask(problem)
    truth = attention(inputs, problem)
    leaves = {n: getattr(inputs, n).clone().requires_grad_() for n in problem.gradients}
    found = ring_step(ranks, placement).attention(replace(inputs, **leaves), problem)
    torch.testing.assert_close(found.out, truth.out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.lse, truth.lse, rtol=1e-12, atol=1e-13)
    if not problem.gradients:
        return
    assert found.lse is not None
    assert inputs.grad_lse is not None
    incoming = [inputs.grad_out, inputs.grad_lse.to(found.lse.dtype)]
    taken = torch.autograd.grad([found.out, found.lse], list(leaves.values()), incoming)
    expected = gradients(inputs, problem, result=truth).tensors()
    for name, gradient in zip(leaves, taken, strict=True):
        rough = 1e-5 if name == "sinks" else 1e-12  # which are fp32
        wanted = expected[name].to(gradient.dtype)
        torch.testing.assert_close(gradient, wanted, rtol=rough, atol=rough / 10)


def test_a_rank_computes_the_tiles_that_placement_says(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(seqlen_q=100, seqlen_k=150, causal="bottom-right", window=(60, 0))
    computed: Counter[tuple[int, int]] = Counter()
    whole = MaskRule.tile

    def counted(self: MaskRule, products: torch.Tensor, rows: slice, keys: slice) -> object:
        computed[rows.start, keys.start] += 1
        return whole(self, products, rows, keys)

    monkeypatch.setattr(MaskRule, "tile", counted)
    for sequence in sequences(make_inputs(problem), problem):
        ring.forward(Operands(sequence, problem, Memory()), 3, 16, 32)
    assert set(computed.values()) == {1}
    assert computed.total() == work(problem, 3, zigzag, 16, 32).tiles.sum()


def every_rank_sees_all_keys_and_its_own_first() -> None:
    """The law of the ring; with ``merge``, which is commutative, it makes the answer."""
    for ranks in (2, 5, 1):
        for rank in range(ranks):
            owners = [ring.owner(rank, turn, ranks) for turn in ring.turns(ranks)]
            assert owners[0] == rank
            assert sorted(owners) == list(range(ranks))
            for turn in ring.turns(ranks)[1:]:  # what the rank before had the turn before
                assert owners[turn] == ring.owner((rank - 1) % ranks, turn - 1, ranks)


def test_the_law_of_the_ring() -> None:
    every_rank_sees_all_keys_and_its_own_first()


def test_the_law_catches_a_ring_that_drops_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "turns", lambda ranks: range(1, ranks))
    with pytest.raises((AssertionError, IndexError)):
        every_rank_sees_all_keys_and_its_own_first()


DROPS_THE_DIAGONAL = """
from online_softmax import ring
from online_softmax.attnproof_backend import ring as target

ring.turns = lambda ranks: range(1, ranks)  # the fault: no rank sees its own keys
"""


@pytest.mark.slow
def test_the_harness_catches_a_ring_that_drops_the_diagonal(tmp_path: Path) -> None:
    path = tmp_path / "planted_ring.py"
    path.write_text(DROPS_THE_DIAGONAL)
    command = [sys.executable, "-m", "attnproof", "check", f"{path}:target", "--dtype", "fp32"]
    command += ["--chapter", "lse", "--deviations", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "deviates" in done.stdout


@pytest.mark.parametrize("causal", ["none", "top-left", "bottom-right"])
def test_the_judge_catches_a_ring_that_drops_the_diagonal(
    monkeypatch: pytest.MonkeyPatch, causal: str
) -> None:
    problem = Problem(heads_q=2, seqlen_q=40, head_dim=8, causal=causal, gradients=GRADIENTS)
    assert judged(problem).status is Status.CONFORMS
    monkeypatch.setattr(ring, "turns", lambda ranks: range(1, ranks))
    verdict = judged(problem)
    assert verdict.status is Status.DEVIATES
    assert {finding.tensor for finding in verdict.findings} >= {"out", "lse", "dq", "dk", "dv"}


def judged(problem: Problem) -> Verdict:
    inputs = make_inputs(problem)
    leaves = {n: getattr(inputs, n).clone().requires_grad_() for n in problem.gradients}
    found = backend.attention(replace(inputs, **leaves), problem)
    taken = torch.autograd.grad(found.out, list(leaves.values()), inputs.grad_out)
    result = CallResult(
        attention=found, gradients=Gradients(**dict(zip(leaves, taken, strict=True)))
    )
    return judge(problem, inputs, result, backend.precision("cpu"), backend.capabilities)
