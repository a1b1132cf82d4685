"""What backward needs is kept by autograd alone: it can be freed, and kept in another place."""

import gc
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from triton_attention import attention, attention_v1

from .making import SQ, D, arguments, everything, packed, paged, qkv, randn


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def lengths():
    return torch.tensor([53, 90], dtype=torch.int32)


FORMS = {
    "dense": lambda: qkv() | everything() | {"key_lengths": lengths()},
    "packed": lambda: packed((30, 40), (50, 40)),
    "paged": lambda: paged((37, 80), 16, SQ),
    "v1": lambda: qkv() | {"causal": "bottom-right"},
}


def called(form, device):
    """A function, its arguments on a device, and those of them that are tensors."""
    given = arguments(device, **FORMS[form]())
    if form == "v1":
        del given["return_keep_mask"]
    names = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    return attention_v1 if form == "v1" else attention, given, names


@pytest.mark.parametrize("form", FORMS)
def test_what_was_saved_is_freed(form, device):
    """After backward, although the results are still there."""
    function, given, names = called(form, device)
    given["q"].requires_grad_()
    names.remove("q")
    kept = {name: weakref.ref(given[name]) for name in names}
    out, *_ = results = function(**given)
    del given
    gc.collect()
    assert all(kept[name]() is not None for name in names)
    out.sum().backward()
    gc.collect()
    assert [name for name in names if kept[name]() is not None] == []
    del results


@pytest.mark.parametrize("form", FORMS)
def test_what_was_saved_is_kept_in_another_place(form, device):
    """All of it, with other strides, without the tensors that were passed."""
    function, given, names = called(form, device)
    given["q"].requires_grad_()
    grad = randn(*given["q"].shape[:3], D).to(device)
    torch.manual_seed(1)
    out, *_ = function(**given)
    (expected,) = torch.autograd.grad(out, given["q"], grad)

    def moved(tensor):
        return torch.stack([tensor, tensor], -1)[..., 0]

    names.remove("q")
    kept = {name: weakref.ref(given[name]) for name in names}
    torch.manual_seed(1)
    with saved_tensors_hooks(moved, lambda tensor: tensor):
        out, *_ = results = function(**given)
    q = given.pop("q")
    del given
    gc.collect()
    assert [name for name in names if kept[name]() is not None] == []
    (found,) = torch.autograd.grad(out, q, grad)
    # Not to the bit: other strides have a kernel of their own.
    torch.testing.assert_close(found, expected)
    del results


def test_nothing_is_saved_where_no_gradient_is_wanted(device):
    given = arguments(device, **qkv())
    kept = weakref.ref(given["k"])
    results = attention(**given)
    del given
    gc.collect()
    assert kept() is None
    del results
