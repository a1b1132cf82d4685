"""Plans: launches made once, run with other tensors; and what is told apart."""

import gc
import weakref

import pytest
import torch

from triton_attention import attention, plans
from triton_attention.arguments import Arguments
from triton_attention.launch import Result
from triton_attention.tiles import GPUS
from triton_attention.v2_launches import Launches


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(plans, "_plans", {})


class Counted:
    """Runs forward by plans, and counts how often launches are made."""

    def __init__(self, splits=None):
        self.made, self.splits = 0, splits

    def __call__(self, q, k, v, **options):
        def make():
            self.made += 1
            return Launches(Arguments(q=q, k=k, v=v, **options)).forward(splits=self.splits)

        return plans.run((q, k, v), tuple(options.items()), make)


def qkv(device, shape=(2, 4, 33, 40), dtype=torch.float16):
    return [torch.randn(shape, dtype=dtype, device=device) for _ in range(3)]


def directly(q, k, v, splits=None, **options):
    return Launches(Arguments(q=q, k=k, v=v, **options)).forward(splits=splits).run()


def same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_plan_gives_the_same_bits(device, splits):
    call = Counted(splits)
    for _ in range(3):
        tensors = qkv(device)
        same(call(*tensors), directly(*tensors, splits=splits))
    assert call.made == 1


def test_results_are_new_each_time(device):
    call, tensors = Counted(), qkv(device)
    first, second = call(*tensors), call(*tensors)
    third = call(*tensors)
    pointers = {found["out"].data_ptr() for found in (first, second, third)}
    assert len(pointers) == 3


def transposed(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def offset(tensor):
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    "other",
    [
        lambda q, k, v: ((transposed(q), k, v), {}),
        lambda q, k, v: ((q, offset(k), v), {}),
        lambda q, k, v: ((q.bfloat16(), k.bfloat16(), v.bfloat16()), {}),
        lambda q, k, v: ((q[:, :, :20], k, v), {}),
        lambda q, k, v: ((q, k, v), {"scale": 0.3}),
        lambda q, k, v: ((q, k, v), {"causal": "bottom-right"}),
        lambda q, k, v: ((q, k, k), {}),
    ],
    ids=["strides", "alignment", "dtype", "shape", "scale", "causal", "one tensor twice"],
)
def test_another_form_is_made_anew(device, other):
    call = Counted()
    for _ in range(2):
        tensors = qkv(device)
        call(*tensors)
        others, options = other(*tensors)
        same(call(*others, **options), directly(*others, **options))
        same(call(*tensors), directly(*tensors))
    assert call.made == 2


def test_no_tensor_is_kept(device):
    call = Counted()
    tensors = qkv(device)
    found = call(*tensors)
    kept = [weakref.ref(tensor) for tensor in (*tensors, *found.values())]
    del tensors, found
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)
    assert call.made == 1


def test_backward_too(device):
    made = 0
    for _ in range(2):
        q, k, v, grad_out = [torch.randn(1, 2, 33, 16, device=device) for _ in range(4)]
        launches = Launches(Arguments(q=q, k=k, v=v, causal="top-left"))
        found = launches.forward().run()
        saved = (found["out"], found["lse"], grad_out)

        def make(launches=launches, saved=saved):
            nonlocal made
            made += 1
            return launches.backward(*saved, None, {"q", "k", "v"})

        given = plans.run((q, k, v, *saved), "backward", make)
        same(given, launches.backward(*saved, None, {"q", "k", "v"}).run())
    assert made == 1


def test_launches_with_copies_are_made_every_time(device):
    """Of a copy, a plan would see the values of the first call."""
    q, k, v = qkv(device)
    made = []

    def make():
        copied = k.clone()
        made.append(copied)
        return Launches(Arguments(q=q, k=copied, v=v)).forward()

    for _ in range(2):
        k = torch.randn_like(k)
        same(plans.run((q, k, v), None, make), directly(q, k, v))
    assert len(made) == 2


def test_what_fails_leaves_no_plan(device):
    def make():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        plans.run(qkv(device), None, make)
    assert not plans._plans


def test_an_empty_grid(device):
    call = Counted()
    for _ in range(2):
        q, k, v = qkv(device)
        found = call(q[:, :, :0], k, v)
        assert found["out"].shape == (2, 4, 0, 40)
    assert call.made == 1


def test_plans_do_not_pile_up(device, monkeypatch):
    monkeypatch.setattr(plans, "MOST", 2)
    call = Counted()
    for length in (1, 2, 3, 4):
        call(*qkv(device, (1, 1, length, 16)))
        assert len(plans._plans) <= 2


def test_nothing_to_launch():
    assert plans.run((), None, lambda: Result(launches=[], tensors={})) == {}


def test_a_call_without_options_that_are_tensors_goes_by_plans(device):
    def results(causal):
        q, k, v = (tensor.requires_grad_() for tensor in qkv(device))
        torch.manual_seed(1)
        grad_out = torch.randn_like(v)
        out, lse = attention(q, k, v, causal=causal, return_lse=True)
        return [out, lse, *torch.autograd.grad(out, (q, k, v), grad_out)]

    for causal in ("none", "top-left"):
        torch.manual_seed(0)
        first = results(causal)
        count = len(plans._plans)
        torch.manual_seed(0)
        again = results(causal)
        assert len(plans._plans) == count
        assert all(map(torch.equal, first, again))
    assert len(plans._plans) == 4  # forward and backward of each


def test_a_call_with_a_mask_does_not(device):
    mask = torch.rand(33, 33, device=device)[None, None] < 0.5
    attention(*qkv(device), mask=mask)
    assert not plans._plans


def test_a_call_that_is_wrong_fails_each_time(device):
    q, k, v = qkv(device)
    attention(q, k, v)
    for _ in range(2):
        with pytest.raises(ValueError, match="window"):
            attention(q, k, v, window=(-1, 0))


def test_a_descriptor_is_made_of_the_tensor_at_hand():
    arguments = dict(zip("qkv", (torch.randn(1, 2, 64, 64).half() for _ in "qkv"), strict=True))
    hopper = Launches(Arguments(**arguments), gpu=GPUS[90], hopper=True).forward(splits=1)
    described = hopper.launches[0].arguments["k"]
    make = plans._maker(described, [arguments["q"], arguments["k"]])
    others = [torch.randn(1, 2, 64, 64).half() for _ in range(2)]
    made = make(others)
    assert made.base is others[1]
    assert (made.shape, made.strides, made.block_shape, made.layout) == (
        described.shape,
        described.strides,
        described.block_shape,
        described.layout,
    )
    assert described.base is arguments["k"]
    assert plans._maker(described, [arguments["q"]]) is None
