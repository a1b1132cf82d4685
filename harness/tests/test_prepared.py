"""What a benchmark times of a backend is its attention, on tensors that change between calls."""

from __future__ import annotations

import pytest
import torch

from attn_reference.problem import Problem
from attnproof.backend import prepared
from attnproof.inputs.make import make_inputs
from attnproof.targets import TargetSpec, load

PROBLEM = Problem(heads_q=2, seqlen_q=48, head_dim=32, causal="top-left")
NAMES = ("sdpa", "sdpa-flash", "sdpa-math", "eager", "tiled-v2", "triton-v1", "triton-v2")


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_the_same_also_when_the_values_change(name: str) -> None:
    backend = load(TargetSpec(name), "cpu")
    if reason := backend.availability("cpu"):
        pytest.skip(reason)
    inputs = make_inputs(PROBLEM)
    call = prepared(backend, inputs, PROBLEM)
    assert torch.equal(call().out, backend.attention(inputs, PROBLEM).out)
    inputs.q.mul_(-0.5)
    assert torch.equal(call().out, backend.attention(inputs, PROBLEM).out)


def test_the_lse_of_a_second_kernel_is_not_timed() -> None:
    inputs = make_inputs(PROBLEM)
    backend = load(TargetSpec("sdpa-flash"), "cpu")
    assert backend.attention(inputs, PROBLEM).lse is not None
    assert prepared(backend, inputs, PROBLEM)().lse is None
