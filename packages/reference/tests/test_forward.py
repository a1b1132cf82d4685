"""Edges of the forward pass: nothing to attend, infinities, strides, chunks."""

from __future__ import annotations

import pytest
import torch

from attn_reference import Problem, attention
from attn_reference import sequences as sequences_module
from attn_reference.inputs import output_shape


@pytest.mark.parametrize(
    "empty",
    [
        Problem(batch=0, seqlen_q=3, head_dim=2),
        Problem(seqlen_q=0, seqlen_k=3, head_dim=2),
        Problem(seqlen_q=3, seqlen_k=0, head_dim=2),
        Problem(seqlen_q=0, head_dim=2),
        Problem(packed=(), head_dim=2),
        Problem(packed=((0, 0), (0, 3)), head_dim=2),
        Problem(seqlen_q=2, seqlen_k=3, key_lengths=(0,), head_dim=2, page_size=2),
    ],
    ids=lambda p: p.id,
)
def test_nothing_to_attend(empty, random_inputs, device):
    found = attention(random_inputs(empty, device), empty)
    assert found.out.shape == output_shape(empty)
    assert (found.out == 0).all()
    assert (found.lse == -torch.inf).all()


def test_row_without_keys_has_the_sink_as_lse(random_inputs):
    problem = Problem(seqlen_q=2, seqlen_k=0, heads_q=3, head_dim=2, sinks=True)
    inputs = random_inputs(problem)
    found = attention(inputs, problem)
    assert (found.out == 0).all()
    assert torch.equal(found.lse, inputs.sinks.double()[None, :, None].expand(1, 3, 2))


def test_sink_of_minus_infinity_is_no_sink(random_inputs):
    problem = Problem(seqlen_q=4, heads_q=2, head_dim=2, sinks=True, causal="top-left")
    inputs = random_inputs(problem)
    inputs.sinks.fill_(-torch.inf)
    found = attention(inputs, problem)
    inputs.sinks = None
    plain = attention(inputs, problem.replace(sinks=False))
    assert torch.equal(found.out, plain.out)
    assert torch.equal(found.lse, plain.lse)


def test_infinite_bias_propagates_as_in_exact_arithmetic(random_inputs):
    problem = Problem(seqlen_q=2, seqlen_k=3, head_dim=2, bias="random")
    inputs = random_inputs(problem)
    inputs.bias[0, 0, 0, 1] = torch.inf
    found = attention(inputs, problem)
    assert found.lse[0, 0, 0] == torch.inf
    assert found.out[0, 0, 0].isnan().all()
    assert found.out[0, 0, 1].isfinite().all()


def test_any_strides(random_inputs):
    problem = Problem(batch=2, heads_q=2, seqlen_q=4, head_dim=3, mask="random")
    inputs = random_inputs(problem)
    expected = attention(inputs, problem)
    for name, tensor in inputs.tensors().items():
        turned = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        assert not turned.is_contiguous()
        setattr(inputs, name, turned)
    found = attention(inputs, problem)
    assert torch.equal(found.out, expected.out)


@pytest.mark.parametrize("elements", [1, 20])
def test_chunks_do_not_change_the_answer(elements, problem, random_inputs, monkeypatch):
    inputs = random_inputs(problem)
    whole = attention(inputs, problem)
    monkeypatch.setattr(sequences_module, "CHUNK_ELEMENTS", elements)
    found = attention(inputs, problem)
    torch.testing.assert_close(found.out, whole.out, rtol=0, atol=1e-15)
    torch.testing.assert_close(found.lse, whole.lse, rtol=0, atol=1e-15)


def test_inputs_stay_as_they_are(problem, random_inputs):
    inputs = random_inputs(problem)
    before = {name: tensor.clone() for name, tensor in inputs.tensors().items()}
    attention(inputs, problem)
    for name, tensor in inputs.tensors().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
