"""The reference as a backend of the harness."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("attnproof.backend", reason="the harness is not installed")

from attn_reference import FEATURES, Problem, attention, gradients
from attn_reference.attnproof_backend import draw_keep_mask, reference
from attnproof.backend import Backend, Capabilities


def test_it_is_a_backend():
    assert isinstance(reference, Backend)
    assert reference.availability("cpu") is None
    expected = None if torch.cuda.is_available() else "torch finds no CUDA device here"
    assert reference.availability("cuda") == expected


def test_it_supports_everything(every_feature):
    capabilities = reference.capabilities
    assert capabilities.features == set(FEATURES)
    assert Capabilities.from_dict(capabilities.as_dict()) == capabilities
    for problem in every_feature:
        assert capabilities.unsupported_reasons(problem.replace(lse_gradient=True)) == []


def test_its_gradients_come_through_autograd(problem, random_inputs, device):
    """Bit for bit those of gradients(), from out and lse together."""
    names = ["q"] if problem.page_size else ["q", "k", "v"]
    names += [name for name in ("bias", "sinks") if getattr(problem, name)]
    problem = problem.replace(gradients=tuple(names), lse_gradient=True)
    inputs = random_inputs(problem, device)
    precision = reference.precision(device)
    expected = attention(inputs, problem, precision)
    expected_gradients = gradients(inputs, problem, precision).tensors()
    tensors = [getattr(inputs, name).requires_grad_() for name in names]
    found = reference.attention(inputs, problem)
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.lse, expected.lse)
    found_gradients = torch.autograd.grad(
        (found.out, found.lse), tensors, (inputs.grad_out, inputs.grad_lse)
    )
    for name, gradient in zip(names, found_gradients, strict=True):
        assert torch.equal(gradient, expected_gradients[name])


def test_dropout_is_drawn_from_the_seed_and_handed_out(random_inputs, device):
    problem = Problem(heads_q=4, seqlen_q=64, head_dim=2, dropout=0.25, seed=3)
    inputs = random_inputs(problem, device)
    given = reference.attention(inputs, problem)
    assert given.keep_mask is inputs.keep_mask
    inputs.keep_mask = None
    drawn = reference.attention(inputs, problem)
    assert inputs.keep_mask is None
    assert drawn.keep_mask.shape == (1, 4, 64, 64)
    assert drawn.keep_mask.device.type == device
    # 16,384 draws: five standard deviations are 0.017.
    assert drawn.keep_mask.float().mean().item() == pytest.approx(0.75, abs=0.017)
    assert torch.equal(reference.attention(inputs, problem).out, drawn.out)
    inputs.keep_mask = drawn.keep_mask
    assert torch.equal(reference.attention(inputs, problem).out, drawn.out)
    other = draw_keep_mask(problem.replace(seed=4), inputs.q.device)
    assert not torch.equal(other, drawn.keep_mask)


def floats(low: float, high: float, device: str) -> torch.Tensor:
    """2^20 fp32 numbers between two positive ones, as many in each binade."""
    first, last = torch.tensor([low, high]).view(torch.int32).tolist()
    bits = torch.arange(first, last, max(1, (last - first) >> 20), dtype=torch.int32)
    return bits.view(torch.float32).to(device)


@pytest.mark.parametrize(
    ("function", "role", "arguments"),
    [
        (torch.exp, "exp_error", (1e-30, 87.3)),
        (torch.tanh, "tanh_error", (1e-30, 20.0)),
    ],
)
def test_the_declared_errors_are_true(function, role, arguments, device):
    x = -floats(*arguments, device)
    exact = function(x.double())
    error = ((function(x).double() - exact) / exact).abs().max().item()
    rounding = 2.0**-24
    declared = getattr(reference.precision(device), role)
    assert rounding * 0.9 < error <= declared + rounding


def test_exponentials_are_not_flushed(device):
    x = -floats(87.4, 103.0, device)  # exp is subnormal
    error = (torch.exp(x).double() - torch.exp(x.double())).abs().max().item()
    assert error <= 2 * 2.0**-149
    assert not reference.precision(device).flushes_subnormals
