"""V1 against the formula in fp64: what the first paper has, with the LSE and its gradient."""

import inspect

import pytest
import torch

from triton_attention import attention_v1

from . import dense

HQ, HKV = 4, 2


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def made(device, dtype=torch.float32, sq=70, sk=90, d=40, dv=None, hq=HQ, hkv=HKV, **options):
    shapes = {"q": (2, hq, sq, d), "k": (2, hkv, sk, d), "v": (2, hkv, sk, dv or d)}
    tensors = {n: torch.randn(shape).to(device, dtype) for n, shape in shapes.items()}
    return tensors | options | {"return_lse": True}


@pytest.mark.parametrize("causal", ["none", "top-left", "bottom-right"])
@pytest.mark.parametrize(("sq", "sk"), [(70, 90), (90, 70), (33, 32), (1, 1), (1, 64)])
def test_lengths_and_causality(sq, sk, causal, device):
    given = made(device, sq=sq, sk=sk, causal=causal)
    found = dense.check(attention_v1, given)
    if causal != "none" and sq == 90:  # causality mattered
        without = dense.attention(*(dense.exact(given[name]) for name in "qkv"))[1]
        assert dense.errors(found, {"lse": without})["lse"] > 0.1


@pytest.mark.parametrize("dtype", dense.TOLERANCE, ids=str)
@pytest.mark.parametrize(("d", "dv"), [(16, 16), (72, 72), (256, 256), (40, 24), (24, 64)])
def test_head_dims(d, dv, dtype, device):
    dense.check(attention_v1, made(device, dtype, d=d, dv=dv, causal="bottom-right"))


@pytest.mark.parametrize(("hq", "hkv"), [(1, 1), (6, 2), (5, 1), (3, 3)])
def test_groups_of_heads(hq, hkv, device):
    dense.check(attention_v1, made(device, hq=hq, hkv=hkv))


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.4])
def test_scale(scale, device):
    dense.check(attention_v1, made(device, scale=scale))


@pytest.mark.parametrize(("sq", "sk"), [(0, 9), (9, 0), (0, 0)])
def test_empty_sequences(sq, sk, device):
    found = dense.check(attention_v1, made(device, sq=sq, sk=sk))
    assert not found["out"].any()
    assert found["lse"].isneginf().all()


def test_memory_layouts(device):
    given = made(device, dv=24)
    laid = {name: given[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qk"}
    laid["v"] = given["v"].repeat_interleave(2, -1)[..., ::2]
    grads = torch.ones(1, device=device).expand(2, HQ, 70, 24), torch.randn(2, 70, HQ).to(device).mT
    dense.check(attention_v1, given | laid, grads)


def test_gradients_through_out_and_lse_alone(device):
    given = made(device)
    dense.check(attention_v1, given, (torch.randn(2, HQ, 70, 40).to(device),))
    leaves, others = dense.split(given)
    grad = torch.randn(2, HQ, 70).to(device)
    lse = attention_v1(**leaves, **others)[1]
    found = torch.autograd.grad(lse, [leaves["q"], leaves["k"]], grad)
    exact = [dense.exact(leaves[name]).detach().requires_grad_() for name in "qkv"]
    expected = torch.autograd.grad(dense.attention(*exact)[1], exact[:2], dense.exact(grad))
    measured = dense.errors(*(dict(zip("qk", each, strict=True)) for each in (found, expected)))
    assert max(measured.values()) <= dense.TOLERANCE[torch.float32], measured


def test_the_same_bits_twice(device):
    given = made(device, torch.bfloat16, causal="bottom-right")
    grads = torch.randn(2, HQ, 70, 40).to(device, torch.bfloat16), torch.randn(2, HQ, 70).to(device)
    first, second = (dense.results(attention_v1, given, grads) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_one_gradient_and_a_change_in_place(name, device):
    given = made(device)
    leaf = given[name].detach().requires_grad_()
    out, _ = attention_v1(**(given | {name: leaf}))
    (found,) = torch.autograd.grad(out.sum(), leaf, retain_graph=True)
    grads = (torch.ones(2, HQ, 70, 40).to(device),)
    # Not to the bit: a gradient that comes in with other strides has a kernel of its own.
    torch.testing.assert_close(found, dense.results(attention_v1, given, grads)[name])
    with torch.no_grad():
        leaf.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_it_has_no_parameters_for_what_it_cannot_do(device):
    names = list(inspect.signature(attention_v1).parameters)
    assert names == ["q", "k", "v", "scale", "causal", "return_lse"]
    with pytest.raises(TypeError, match="window"):
        attention_v1(**made(device), window=(3, 3))
    out = attention_v1(**(made(device) | {"return_lse": False}))
    assert isinstance(out, torch.Tensor)
