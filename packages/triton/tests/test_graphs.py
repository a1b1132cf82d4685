"""CUDA graphs: a call is captured, and replayed on other values; nothing waits for the GPU."""

import pytest
import torch

from triton_attention import attention, scaled_dot_product_attention
from triton_attention.flash_attn import flash_attn_func, flash_attn_with_kvcache

from . import dense
from .making import HKV, HQ, B, D, arguments, everything, packed, paged, qkv, randn

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def captured(step):
    """The graph of a step, what it writes, and kernels compiled beforehand."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = step()
    return graph, written


def renewed(tensors):
    """Other values, at the same place."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))


def undropped():
    return {name: value for name, value in everything().items() if name != "dropout_p"}


FORMS = {
    "dense": lambda: qkv(),
    "everything": lambda: qkv() | undropped(),
    "decoding": lambda: qkv(sq=1, sk=4096),
    "key-lengths": lambda: qkv() | {"key_lengths": torch.tensor([53, 90], dtype=torch.int32)},
    "packed": lambda: packed((30, 40), (50, 40)),
    "paged": lambda: paged((37, 80), 16, 5),
}


def step_of(form, dtype=torch.float16):
    """Forward and backward, the leaves, and the gradient that comes in."""
    given = arguments("cuda", dtype, **FORMS[form](), return_keep_mask=False)
    leaves, others = dense.split(given)
    q, v = given["q"], given["v"]
    grad = torch.randn(*q.shape[:3], v.shape[3], dtype=dtype, device="cuda")

    def step():
        out, lse = attention(**leaves, **others)
        return out, lse, *torch.autograd.grad(out, list(leaves.values()), grad)

    return step, [*leaves.values(), grad]


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_backward(form):
    step, inputs = step_of(form)
    graph, written = captured(step)
    for _ in range(2):
        renewed(inputs)
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(written, step(), strict=True))


def test_lengths_that_change_between_replays():
    """Lengths are read on the GPU: a cache grows under one graph."""
    q, caches = randn(B, 1, HQ, D), (randn(B, 64, HKV, D), randn(B, 64, HKV, D))
    new = [randn(B, 1, HKV, D).cuda() for _ in range(2)]
    q, lengths = q.cuda(), torch.tensor([5, 30], dtype=torch.int32, device="cuda")
    moved = [cache.cuda() for cache in caches]

    def step():
        return flash_attn_with_kvcache(q, *moved, *new, cache_seqlens=lengths, causal=True)

    graph, written = captured(step)
    for at in ((7, 40), (0, 63)):
        lengths.copy_(torch.tensor(at, dtype=torch.int32))
        renewed(new)
        for cache, old in zip(moved, caches, strict=True):
            cache.copy_(old)
        graph.replay()
        found, after = written.clone(), [cache.clone() for cache in moved]
        for cache, old in zip(moved, caches, strict=True):
            cache.copy_(old)
        assert torch.equal(found, step())
        for cache, grown, rows in zip(moved, after, new, strict=True):
            assert torch.equal(cache, grown)
            assert torch.equal(grown[0, at[0]], rows[0, 0])


def test_every_replay_drops_others():
    q, k, v = (tensor.to("cuda", torch.float16) for tensor in qkv().values())
    graph, out = captured(lambda: attention(q, k, v, dropout_p=0.3))
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(out.clone())
    assert not torch.equal(*seen)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits(form):
    step, _ = step_of(form)
    step()
    never_waits(step)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_drop_ins_do_not_wait():
    q, k, v = (tensor.to("cuda", torch.float16) for tensor in qkv(hkv=HQ).values())
    lengths = torch.tensor([3, 9], dtype=torch.int32, device="cuda")
    calls = (
        lambda: scaled_dot_product_attention(q, k, v, dropout_p=0.1),
        lambda: flash_attn_func(*(tensor.transpose(1, 2) for tensor in (q, k, v)), causal=True),
        lambda: flash_attn_with_kvcache(
            *(tensor.transpose(1, 2) for tensor in (q, k, v, k[:, :, :2], v[:, :, :2])),
            cache_seqlens=lengths,
            cache_leftpad=lengths - 2,
        ),
    )
    for call in calls:
        call()
        never_waits(call)


def never_waits(call):
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_check_finds_a_wait():
    with pytest.raises(RuntimeError, match="synchronizing"):
        never_waits(lambda: torch.ones(1, device="cuda").item())


def test_compiled_with_graphs():
    """torch.compile captures the operators by itself."""
    q, k, v = (tensor.to("cuda", torch.float16) for tensor in qkv().values())
    call = torch.compile(attention, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        renewed((q, k, v))
        out = call(q, k, v, causal="bottom-right").clone()
        torch.testing.assert_close(out, attention(q, k, v, causal="bottom-right"))
