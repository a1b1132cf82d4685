"""The oracle against torch's math SDPA in fp64, whose gradients come from autograd."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attn_reference import Problem, attention, gradients

LARGER = Problem(
    batch=2, heads_q=6, heads_kv=6, seqlen_q=33, seqlen_k=47, head_dim=24, dtype="fp64"
)
PROBLEMS = [
    LARGER,
    LARGER.replace(scale=0.3),
    LARGER.replace(head_dim_v=17),
    LARGER.replace(heads_kv=2),
    LARGER.replace(heads_kv=1, causal="top-left"),
    LARGER.replace(causal="top-left"),
    LARGER.replace(causal="bottom-right"),
    LARGER.replace(causal="bottom-right", seqlen_q=47, seqlen_k=33),  # rows that see nothing
    LARGER.replace(mask="random"),
    LARGER.replace(mask="random", mask_shape="11qk"),
    LARGER.replace(bias="random"),
    LARGER.replace(bias="random", bias_shape="1h1k"),
    LARGER.replace(seqlen_q=1, heads_kv=3),
]


def additive_mask(inputs, problem: Problem) -> torch.Tensor | None:
    """What SDPA takes as attn_mask; top-left causality is its is_causal."""
    if problem.causal == "bottom-right":
        rows, keys = problem.seqlen_q, problem.keys
        return torch.ones(rows, keys, dtype=torch.bool, device=inputs.q.device).tril(keys - rows)
    return inputs.mask if inputs.bias is None else inputs.bias


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_equals_math_sdpa_and_its_gradients(problem, random_inputs, device):
    names = ("q", "k", "v") + (("bias",) if problem.bias else ())
    problem = problem.replace(gradients=names)
    inputs = random_inputs(problem, device)
    tensors = [getattr(inputs, name).requires_grad_() for name in names]
    with sdpa_kernel(SDPBackend.MATH):
        expected = scaled_dot_product_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            attn_mask=additive_mask(inputs, problem),
            is_causal=problem.causal == "top-left",
            scale=problem.scale,
            enable_gqa=problem.group > 1,
        )
    expected_gradients = torch.autograd.grad(expected, tensors, inputs.grad_out)
    for tensor in tensors:
        tensor.requires_grad_(False)
    found = attention(inputs, problem)
    torch.testing.assert_close(found.out, expected.detach(), rtol=1e-11, atol=1e-13)
    for name, gradient in zip(names, expected_gradients, strict=True):
        mine = getattr(gradients(inputs, problem), name)
        torch.testing.assert_close(mine, gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("heads_kv", [6, 2])
def test_lse_equals_torch_logsumexp(heads_kv, random_inputs, device):
    problem = LARGER.replace(heads_kv=heads_kv, bias="random")
    inputs = random_inputs(problem, device)
    keys = inputs.k.repeat_interleave(problem.group, dim=1)
    scores = problem.softmax_scale * inputs.q @ keys.mT + inputs.bias
    torch.testing.assert_close(
        attention(inputs, problem).lse, scores.logsumexp(-1), rtol=1e-13, atol=1e-13
    )
