"""The drop-in for torch's scaled_dot_product_attention, against torch's own in fp64."""

import re

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as of_torch

from triton_attention import scaled_dot_product_attention

from . import dense
from .making import rand, randn

B, HQ, HKV, L, S, E, EV = 2, 4, 2, 21, 34, 16, 24


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def mask(*shape):
    return rand(*shape) < 0.7


CALLS = {
    "plain": lambda: (randn(B, HQ, L, E), randn(B, HQ, S, E), randn(B, HQ, S, EV), {}),
    "causal": lambda: (
        *(randn(B, HQ, n, E) for n in (L, S, S)),
        {"is_causal": True, "scale": 0.4},
    ),
    "more-queries": lambda: (*(randn(B, HQ, n, E) for n in (S, L, L)), {"is_causal": True}),
    "gqa": lambda: (
        randn(B, HQ, L, E),
        randn(B, HKV, S, E),
        randn(B, HKV, S, E),
        {"enable_gqa": True},
    ),
    "mask": lambda: (*(randn(B, HQ, n, E) for n in (L, S, S)), {"attn_mask": mask(L, S)}),
    "mask-of-keys": lambda: (
        *(randn(B, HQ, n, E) for n in (L, S, S)),
        {"attn_mask": mask(B, 1, 1, S)},
    ),
    "mask-hides-rows": lambda: (
        *(randn(B, HQ, n, E) for n in (L, S, S)),
        {"attn_mask": mask(L, 1).expand(L, S)},
    ),
    "bias": lambda: (*(randn(B, HQ, n, E) for n in (L, S, S)), {"attn_mask": randn(HQ, L, S)}),
    "no-heads": lambda: (randn(L, E), randn(S, E), randn(S, EV), {"attn_mask": mask(L, S)}),
    "no-batch": lambda: (*(randn(HQ, n, E) for n in (L, S, S)), {"attn_mask": randn(HQ, 1, S)}),
    "more-batches": lambda: (
        *(randn(2, 3, HQ, n, E) for n in (L, S, S)),
        {"attn_mask": mask(3, 1, L, S)},
    ),
    "batches-broadcast": lambda: (
        randn(2, 3, HQ, L, E),
        randn(3, HQ, S, E),
        randn(1, 3, HQ, S, E),
        {"attn_mask": mask(1, 1, 1, L, S)},
    ),
}


def results(function, tensors, options, grad):
    """out, and the gradients of q, k, v and of a mask that is a bias."""
    bias = options.get("attn_mask")
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    if bias is not None and bias.is_floating_point():
        options = options | {"attn_mask": bias.detach().requires_grad_()}
        leaves.append(options["attn_mask"])
    out = function(*leaves[:3], **options)
    found = torch.autograd.grad(out, leaves, grad)
    return dict(zip(("out", "q", "k", "v", "bias"), (out.detach(), *found), strict=False))


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("name", CALLS)
def test_it_is_that_of_torch(name, compiled, device):
    *tensors, options = CALLS[name]()
    grad = randn(*of_torch(*tensors, **options).shape)
    doubles = {n: dense.exact(value) for n, value in options.items()}
    expected = results(of_torch, [t.double() for t in tensors], doubles, grad.double())
    function = scaled_dot_product_attention
    if compiled:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    placed = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    found = results(function, [t.to(device) for t in tensors], placed, grad.to(device))
    measured = dense.errors(found, expected)
    assert max(measured.values()) <= dense.TOLERANCE[torch.float32], measured


def test_dropout(device):
    tensors = [randn(B, HQ, S, E).to(device) for _ in range(2)]
    ones = torch.ones(B, HQ, S, 1, device=device)
    torch.manual_seed(1)
    out = scaled_dot_product_attention(*tensors, ones, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(out, scaled_dot_product_attention(*tensors, ones, dropout_p=0.5))
    assert not torch.equal(out, scaled_dot_product_attention(*tensors, ones, dropout_p=0.5))
    assert out.mean().item() == pytest.approx(1.0, abs=0.1)


def test_parameters_are_those_of_torch():
    """Passed by position in the order of torch's documentation."""
    *tensors, _ = CALLS["gqa"]()
    by_position = scaled_dot_product_attention(*tensors, None, 0.0, True, 0.3, True)
    named = {"is_causal": True, "scale": 0.3, "enable_gqa": True}
    assert torch.equal(by_position, scaled_dot_product_attention(*tensors, **named))
    torch.testing.assert_close(by_position, of_torch(*tensors, **named))


def refused(*shapes, dtype=torch.float32, **options):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes], options


Q, KV = (B, HQ, L, E), (B, HQ, S, E)
OF_TORCH = [
    (
        refused(Q, (B, HKV, S, E), (B, HKV, S, E)),
        "key has 2 heads: accepted are 4, as query has, or fewer with enable_gqa=True",
    ),
    (refused((E,), KV, KV), "query has 1 dimensions: accepted are 2 or more"),
    (
        refused(Q, KV, KV, attn_mask=torch.zeros(L, S, dtype=torch.int32)),
        "attn_mask has dtype torch.int32: accepted are torch.bool and torch.float32",
    ),
    (
        refused(Q, KV, KV, attn_mask=torch.zeros(L - 1, S)),
        f"attn_mask has shape (20, 34): accepted is what broadcasts to {(B, HQ, L, S)}",
    ),
    (
        refused(Q, KV, KV, attn_mask=torch.zeros(1, 1, 1, L, S)),
        f"attn_mask has shape (1, 1, 1, 21, 34): accepted is what broadcasts to {(B, HQ, L, S)}",
    ),
    (refused(Q, (3, HQ, S, E), (3, HQ, S, E)), "Attempting to broadcast a dimension of length 3"),
]


@pytest.mark.parametrize(("call", "said"), OF_TORCH)
def test_what_torch_refuses_too(call, said, device):
    tensors, options = call
    with pytest.raises(RuntimeError):
        of_torch(*tensors, **options)
    with pytest.raises(RuntimeError, match=re.escape(said)):
        scaled_dot_product_attention(*tensors, **options)


def test_causal_with_a_mask():
    tensors, _ = refused(Q, KV, KV)
    with pytest.raises(RuntimeError, match="attn_mask is given with is_causal=True"):
        scaled_dot_product_attention(
            *tensors, attn_mask=torch.ones(L, S, dtype=torch.bool), is_causal=True
        )


def test_a_mask_in_more_bits_than_the_query():
    tensors, _ = refused(Q, KV, KV, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"attn_mask has dtype torch\.float32"):
        scaled_dot_product_attention(*tensors, attn_mask=torch.zeros(L, S))
