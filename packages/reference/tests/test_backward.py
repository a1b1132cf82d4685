"""Gradients: gradcheck in fp64, finite differences of the LSE, and chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError

from attn_reference import (
    Inputs,
    Problem,
    attention,
    differentiable_attention,
    gradients,
)
from attn_reference import sequences as sequences_module
from attn_reference.problem import GRADIENT_NAMES


def all_gradients(problem: Problem) -> Problem:
    """The problem in fp64 with every gradient that it can have."""
    names = [n for n in GRADIENT_NAMES if n not in ("bias", "sinks")]
    if problem.page_size is not None:
        names = ["q"]
    names += ["bias"] * (problem.bias is not None) + ["sinks"] * problem.sinks
    return problem.replace(dtype="fp64", gradients=tuple(names), lse_gradient=True)


def fewer_heads(problem: Problem) -> Problem:
    """The same features with one batch entry and one or two heads, where they allow it."""
    smaller = problem.replace(heads_q=problem.group, heads_kv=1)
    one = problem.packed is None and problem.key_lengths is None
    return smaller.replace(batch=1) if one else smaller


def test_gradcheck(problem, random_inputs):
    """Out and LSE, in all inputs at once, against finite differences of the forward pass."""
    problem = fewer_heads(all_gradients(problem))
    inputs = random_inputs(problem)
    tensors = [getattr(inputs, name).requires_grad_() for name in problem.gradients]

    def both(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = dict(zip(problem.gradients, tensors, strict=True))
        found = differentiable_attention(replace(inputs, **named), problem)
        # An LSE of -inf has no differences; its gradient is checked elsewhere.
        return found.out, found.lse.masked_fill(found.lse == -torch.inf, 0.0)

    # NaN behind the key lengths, -inf in the bias: differences are taken where numbers are.
    for tensor in tensors:
        with torch.no_grad():
            finite = tensor.isfinite()
            tensor.copy_(torch.where(finite, tensor, -50.0 if tensor is inputs.bias else 0.0))
    assert torch.autograd.gradcheck(both, tensors, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_gradcheck_would_notice(random_inputs):
    """The check above can fail: a backward pass for another softcap does not pass it."""
    problem = all_gradients(Problem(seqlen_q=3, head_dim=2, softcap=1.0))
    inputs = random_inputs(problem)
    inputs.q.requires_grad_()

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            return attention(replace(inputs, q=q), problem).out

        @staticmethod
        def backward(ctx, grad_out):
            wrong = problem.replace(softcap=1.1, lse_gradient=False)
            return gradients(replace(inputs, grad_out=grad_out), wrong).q

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(Wrong.apply, [inputs.q], eps=1e-6, atol=1e-7, rtol=1e-5)


def test_lse_gradient_equals_finite_differences(problem, random_inputs):
    """gradients() itself, without autograd: grad_out is 0 and only the LSE speaks."""
    problem = all_gradients(problem)
    inputs = random_inputs(problem)
    inputs.grad_out.zero_()
    empty = attention(inputs, problem).lse == -torch.inf
    inputs.grad_lse[empty] = 0.0
    found = gradients(inputs, problem).tensors()

    def value(name: str, changed: torch.Tensor) -> float:
        lse = attention(replace(inputs, **{name: changed}), problem).lse
        return (lse.masked_fill(empty, 0.0) * inputs.grad_lse).sum().item()

    step = 1e-5
    for name in set(problem.gradients) - {"v"}:
        tensor = getattr(inputs, name)
        for place in range(0, tensor.numel(), 7):
            if not tensor.flatten()[place].isfinite():
                assert found[name].flatten()[place] == 0
                continue
            up, down = tensor.clone(), tensor.clone()
            up.view(-1)[place] += step
            down.view(-1)[place] -= step
            slope = (value(name, up) - value(name, down)) / (2 * step)
            assert found[name].flatten()[place].item() == pytest.approx(slope, abs=1e-8, rel=1e-6)
    assert "v" not in found or (found["v"] == 0).all()


def test_shapes_dtypes_and_what_was_asked_for(problem, random_inputs, device):
    problem = all_gradients(problem).replace(dtype="fp32")
    inputs = random_inputs(problem, device)
    found = gradients(inputs, problem).tensors()
    assert set(found) == set(problem.gradients)
    for name, gradient in found.items():
        assert gradient.shape == getattr(inputs, name).shape
        assert gradient.dtype == torch.float64
        assert gradient.device.type == device
    one = gradients(inputs, problem.replace(gradients=("q",)))
    assert one.k is one.v is one.bias is one.sinks is None
    assert torch.equal(one.q, found["q"])


def test_devices_agree(problem, random_inputs, device):
    problem = all_gradients(problem)
    here, there = random_inputs(problem), random_inputs(problem, device)
    expected, found = gradients(here, problem).tensors(), gradients(there, problem).tensors()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].cpu(), gradient, rtol=1e-12, atol=1e-13)


def test_keys_that_no_query_sees_get_zeros(random_inputs):
    problem = Problem(
        batch=2,
        seqlen_q=4,
        seqlen_k=6,
        head_dim=2,
        key_lengths=(5, 0),
        causal="top-left",
        gradients=("q", "k", "v"),
    )
    found = gradients(random_inputs(problem), problem)
    for gradient in (found.k, found.v):
        assert (gradient[0, :, 4:] == 0).all()
        assert (gradient[1] == 0).all()
        assert (gradient[0, :, :4] != 0).all()
    assert (found.q[1] == 0).all()


def test_hidden_bias_gets_zero(random_inputs):
    problem = Problem(seqlen_q=3, head_dim=2, bias="hiding", gradients=("bias",))
    inputs = random_inputs(problem)
    inputs.bias[0, 0, 2, 0] = -torch.inf
    found = gradients(inputs, problem).bias
    assert (found[0, 0, 1] == 0).all()  # a row that sees nothing
    assert found[0, 0, 2, 0] == 0
    assert (found[0, 0, 0] != 0).all()


@pytest.mark.parametrize("elements", [1, 20])
def test_chunks_do_not_change_the_gradients(elements, problem, random_inputs, monkeypatch):
    problem = all_gradients(problem)
    inputs = random_inputs(problem)
    whole = gradients(inputs, problem).tensors()
    monkeypatch.setattr(sequences_module, "CHUNK_ELEMENTS", elements)
    for name, gradient in gradients(inputs, problem).tensors().items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-13, atol=1e-13)


def test_a_result_given_is_used(random_inputs):
    problem = Problem(seqlen_q=3, head_dim=2, gradients=("q",))
    inputs = random_inputs(problem)
    result = attention(inputs, problem)
    same = gradients(inputs, problem, result=result)
    assert torch.equal(same.q, gradients(inputs, problem).q)
    result.lse += 1.0
    assert not torch.allclose(gradients(inputs, problem, result=result).q, same.q)


def test_gradients_that_come_in_must_be_there(random_inputs):
    problem = Problem(seqlen_q=3, head_dim=2, gradients=("q",), lse_gradient=True)
    inputs = random_inputs(problem)
    with pytest.raises(ValueError, match="grad_out is missing"):
        gradients(replace(inputs, grad_out=None), problem)
    with pytest.raises(ValueError, match=r"grad_lse is missing.*lse_gradient=True"):
        gradients(replace(inputs, grad_lse=None), problem)


def test_no_second_derivative(random_inputs):
    problem = Problem(seqlen_q=3, head_dim=2, dtype="fp64")
    inputs = random_inputs(problem)
    inputs.q.requires_grad_()
    out = differentiable_attention(inputs, problem).out
    (first,) = torch.autograd.grad(out.square().sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_inputs_changed_between_the_passes_are_noticed(random_inputs):
    problem = Problem(seqlen_q=3, head_dim=2)
    inputs = random_inputs(problem)
    inputs.v.requires_grad_()
    out = differentiable_attention(inputs, problem).out
    inputs.q.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_pages_take_no_gradient(random_inputs):
    problem = Problem(seqlen_q=3, head_dim=2, page_size=2)
    inputs = random_inputs(problem)
    inputs.k.requires_grad_()
    with pytest.raises(ValueError, match="without k and v when page_size"):
        differentiable_attention(inputs, problem)


def test_only_the_lse_is_used(random_inputs):
    problem = Problem(seqlen_q=3, head_dim=2, dtype="fp64", gradients=("q",), lse_gradient=True)
    inputs: Inputs = random_inputs(problem)
    inputs.grad_out.zero_()
    inputs.grad_lse.fill_(1.0)
    expected = gradients(inputs, problem).q
    inputs.q.requires_grad_()
    (found,) = torch.autograd.grad(differentiable_attention(inputs, problem).lse.sum(), inputs.q)
    torch.testing.assert_close(found, expected)
