"""What interpreted kernels may access, and how it is counted."""

import ctypes
import mmap
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from triton_attention import interpreter
from triton_attention.interpreter import OutOfBounds
from triton_attention.interpreter.accesses import Region


class Matrix(NamedTuple):
    ptr: Any
    stride: Any


class Rule(NamedTuple):
    bias: Matrix
    slopes: Any
    scale: Any


@triton.jit
def copy(x, out, first, last, shift, BLOCK: tl.constexpr):
    """out[i] = x[i + shift] for i from first up to last."""
    i = tl.arange(0, BLOCK)
    inside = (i >= first) & (i < last)
    tl.store(out + i, tl.load(x + i + shift, mask=inside, other=0), mask=inside)


def run_copy(x, out, first=0, last=8, shift=0):
    arguments = {"x": x, "out": out, "first": first, "last": last, "shift": shift, "BLOCK": 8}
    interpreter.run(copy, (2, 1), arguments)


def test_the_whole_of_a_tensor_may_be_accessed():
    x, out = torch.arange(8.0), torch.zeros(8)
    run_copy(x, out)
    assert torch.equal(out, x)


def test_what_is_masked_is_not_accessed():
    x, out = torch.arange(5.0), torch.zeros(5)
    run_copy(x, out, last=5)
    assert torch.equal(out, x)
    out = torch.zeros(8)
    run_copy(x, out, first=3, last=8, shift=-3)
    assert out.tolist() == [0, 0, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("sizes", "bounds", "complaint"),
    [
        ((8, 8), {"shift": 3}, r"load x in program \(0, 0, 0\): 3 elements beyond its last"),
        ((8, 8), {"shift": -2}, r"load x .*: 2 elements before its first"),
        ((4, 8), {"shift": -1}, r"load x .*: 1 element before its first and 3 elements beyond"),
        ((8, 6), {}, r"store out .*: 2 elements beyond its last \(of 6 from first to last\)"),
        ((8, 6), {"last": 7}, r"store out .*: 1 element beyond its last"),
        ((0, 8), {"last": 1}, r"load x .*: it has no elements"),
        ((8, 0), {"last": 1}, r"store out .*: it has no elements"),
    ],
)
def test_accesses_out_of_bounds(sizes, bounds, complaint):
    x, out = (torch.ones(10)[1 : 1 + size] for size in sizes)  # the memory beyond is there
    with pytest.raises(OutOfBounds, match=complaint):
        run_copy(x, out, **bounds)
    assert not out.eq(0).any(), "nothing was stored"


@triton.jit
def padded(x, out):
    i = tl.arange(0, 4)
    tl.store(out + i, tl.load(x + i, mask=i < 2, other=1.5))
    tl.store(out + 4, tl.load(x + 9, mask=tl.program_id(0) > 0, other=0.0))
    tl.store(out + 5, tl.load(x + 9, mask=tl.program_id(0) > 0, other=1.5))


def test_what_is_masked_has_another_value():
    out = torch.full((6,), -1.0)
    interpreter.run(padded, (1,), {"x": torch.tensor([3.0, 4.0]), "out": out})
    assert out.tolist() == [3, 4, 1.5, 1.5, 0, 1.5]


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0)])
def test_an_empty_tensor_has_nothing_to_access(shape):
    with pytest.raises(OutOfBounds, match=r"load x .*it has no elements"):
        interpreter.run(element, (1,), {"x": torch.zeros(shape), "at": 0})


def test_nothing_is_accessed_of_an_empty_tensor_where_all_is_masked():
    run_copy(torch.zeros(0), torch.zeros(0), last=0)


def test_a_pointer_keeps_to_the_tensor_that_it_came_from():
    both = torch.arange(16.0)
    with pytest.raises(OutOfBounds, match=r"load x .*: 8 elements beyond"):
        run_copy(both[:8], both[8:], shift=8)


@triton.jit
def element(x, at):
    tl.load(x + at)


@pytest.mark.parametrize(
    ("view", "last"),
    [
        (torch.zeros(4, 8)[:, :3], 26),
        (torch.zeros(4, 8).t()[1:3], 25),
        (torch.zeros(1, 5).expand(4, 5), 4),
        (torch.zeros(64)[5::7], 56),
        (torch.tensor(1.0), 0),
    ],
    ids=["columns", "transposed", "expanded", "strided", "scalar"],
)
def test_a_view_ends_with_its_last_element(view, last):
    interpreter.run(element, (1,), {"x": view, "at": last})
    for beyond in (-1, last + 1):
        with pytest.raises(OutOfBounds):
            interpreter.run(element, (1,), {"x": view, "at": beyond})


VIEWS = {
    "columns": lambda x: x[:96].view(12, 8)[:, :3],
    "one-column": lambda x: x[:16].view(8, 2)[:, 0],
    "strided": lambda x: x[5::7],
    "transposed": lambda x: x.view(4, 64).t()[1:9:2],
    "expanded": lambda x: x[:8].view(8, 1)[::3].expand(3, 5),
    "part-of-a-part": lambda x: x.view(4, 4, 4, 4)[1:3, :, ::2, 1:],
    "heads": lambda x: x.view(4, 4, 16)[:, 1:3].transpose(0, 1),
    "windows": lambda x: x.as_strided((5, 3), (1, 1)),
    "wide-windows": lambda x: x.as_strided((5, 6), (4, 1)),
    "windows-with-gaps": lambda x: x.as_strided((5, 3, 4), (6, 2, 20)),
    "interleaved": lambda x: x.as_strided((4, 5), (3, 2)),
    "interleaved-twice": lambda x: x.as_strided((4, 5, 3), (6, 5, 9)),
    "overlapping": lambda x: x.as_strided((3, 6, 2), (10, 4, 7)),
    "dense": lambda x: x.view(4, 8, 8),
    "scalar": lambda x: x[3],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("view", VIEWS)
def test_only_elements_of_a_view_are_accessed(view):
    x = VIEWS[view](torch.zeros(256))
    first = x.storage_offset()
    offsets = torch.arange(256).as_strided(x.shape, x.stride(), first).unique() - first
    region = Region("x", x)
    for at in range(-3, 260 - first):
        if at in offsets:
            region.check("load", np.array([at]), (0, 0, 0))
        else:
            with pytest.raises(OutOfBounds):
                region.check("load", np.array([at]), (0, 0, 0))


def test_accesses_between_the_elements_of_a_view():
    x = torch.arange(16.0).reshape(8, 2)[:, 0]
    with pytest.raises(OutOfBounds, match=r"load x .*: 1 element between its own"):
        interpreter.run(element, (1,), {"x": x, "at": 1})
    with pytest.raises(OutOfBounds, match=r"load x .*: 4 elements between its own"):
        run_copy(x, torch.zeros(8))
    out = torch.zeros(16).reshape(8, 2)[:, 0]
    with pytest.raises(OutOfBounds, match=r"store out .*: 4 elements between its own"):
        run_copy(torch.ones(8), out)
    assert not out.any()


@triton.jit
def carried(x, y, out, WAY: tl.constexpr):
    i = tl.arange(0, 4)
    pointers = x + i
    if WAY == "block":
        pointers = tl.reshape(tl.trans(pointers[:, None] + i[None, :] * 4), [16])
    elif WAY == "loop":
        for _ in range(3):
            pointers += 4
    elif WAY == "same":
        pointers = tl.where(i < 2, pointers, x + 12 + i)
    elif WAY == "bits":
        pointers = pointers.to(tl.pointer_type(tl.int32))
    elif WAY == "other":
        pointers = tl.where(i < 2, pointers, y + i)
    elif WAY == "integer":
        pointers = pointers.to(tl.int64).to(tl.pointer_type(tl.float32))
    elif WAY == "width":
        pointers = pointers.to(tl.pointer_type(tl.int8))
    tl.store(out + tl.arange(0, pointers.shape[0]), tl.load(pointers))


@pytest.mark.parametrize("way", ["block", "loop", "same", "bits"])
def test_pointers_take_their_tensor_along(way):
    x, y = torch.arange(16.0), torch.arange(16.0)
    out = torch.zeros(16, dtype=torch.int32 if way == "bits" else torch.float32)
    interpreter.run(carried, (1,), {"x": x, "y": y, "out": out, "WAY": way})
    expected = {
        "block": x.reshape(4, 4).reshape(16),
        "loop": x[12:],
        "same": x[[0, 1, 14, 15]],
        "bits": x[:4].view(torch.int32),
    }[way]
    assert torch.equal(out[: len(expected)], expected)
    if way != "bits":
        with pytest.raises(OutOfBounds, match="load x"):
            interpreter.run(carried, (1,), {"x": x[:2], "y": y, "out": out, "WAY": way})


@pytest.mark.parametrize("way", ["other", "integer", "width"])
def test_pointers_of_no_one_tensor_are_refused(way):
    x = torch.arange(16.0)
    with pytest.raises(OutOfBounds, match="comes from no tensor argument"):
        interpreter.run(carried, (1,), {"x": x, "y": x.clone(), "out": x.clone(), "WAY": way})


@triton.jit
def atomics(x, at, inside):
    i = tl.arange(0, 4)
    tl.atomic_add(x + at + i // 2, 1.5, mask=i < inside)


def test_atomic_operations():
    x = torch.zeros(4)
    with interpreter.counting() as accesses:
        interpreter.run(atomics, (2,), {"x": x, "at": 2, "inside": 3})
    assert x.tolist() == [0, 0, 6, 3]
    assert accesses.loads == accesses.stores == {"x": 6}
    with pytest.raises(OutOfBounds, match=r"atomic x .*: 1 element beyond"):
        interpreter.run(atomics, (1,), {"x": x, "at": 3, "inside": 3})
    with pytest.raises(NotImplementedError, match="bf16"):
        interpreter.run(atomics, (1,), {"x": x.bfloat16(), "at": 0, "inside": 3})


def anonymous_memory(size):
    """Address space that takes no memory until it is touched, and its address."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    reserve_nothing = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = libc.mmap(None, ctypes.c_size_t(size), protection, flags, -1, ctypes.c_long(0))
    assert address != ctypes.c_void_p(-1).value
    return libc, address


def tensor_at(address, elements):
    return torch.frombuffer((ctypes.c_float * elements).from_address(address), dtype=torch.float32)


def test_pages_beside_a_tensor_are_not_touched():
    page = mmap.PAGESIZE
    libc, address = anonymous_memory(3 * page)
    for guard in (address, address + 2 * page):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    whole = tensor_at(address + page, page // 4)
    whole[:] = torch.arange(page // 4)
    for x in (whole[:5], whole[-5:]):
        out = torch.zeros(5)
        run_copy(x, out, last=5)
        assert torch.equal(out, x)
        run_copy(out + 1, x, last=5)
        assert torch.equal(x, out + 1)


def test_address_space_that_is_mostly_untouched():
    elements = 2**36  # 256 GiB
    _, address = anonymous_memory(4 * elements)
    whole = tensor_at(address, elements)
    sparse = whole[:: elements // 4]
    sparse[:] = torch.arange(4.0)
    out = torch.zeros(4)
    interpreter.run(spread, (1,), {"x": Matrix(sparse, sparse.stride(0)), "out": out})
    assert torch.equal(out, sparse)
    with pytest.raises(OutOfBounds, match="3 elements between its own"):
        interpreter.run(spread, (1,), {"x": Matrix(sparse, sparse.stride(0) - 1), "out": out})


@triton.jit
def spread(x, out):
    i = tl.arange(0, 4)
    tl.store(out + i, tl.load(x.ptr + i.to(tl.int64) * x.stride))


def test_counts_of_accesses():
    x, out = torch.arange(8.0).bfloat16(), torch.zeros(8)
    with interpreter.counting() as accesses:
        run_copy(x, out, first=2, last=7)
    assert accesses.loads == {"x": 10}  # of two programs
    assert accesses.stores == {"out": 10}
    assert (accesses.load_bytes, accesses.store_bytes) == (20, 40)
    assert accesses.lines == ["load x", "store out"]
    assert accesses.other == {}
    run_copy(x, out)
    assert accesses.loads == {"x": 10}


def test_contexts_of_counting_nest():
    x = torch.arange(8.0)
    with interpreter.counting() as outer:
        run_copy(x, torch.zeros(8))
        with interpreter.counting() as inner:
            run_copy(x, torch.zeros(8))
        with pytest.raises(OutOfBounds), interpreter.counting():
            run_copy(x, torch.zeros(4))
    assert inner.loads == {"x": 16}
    assert outer.loads == {"x": 40}


@triton.jit
def named(q, rule, several):
    tl.load(q.ptr + q.stride)
    tl.load(rule.bias.ptr + rule.bias.stride)
    tl.store(rule.slopes, 1.0)
    tl.load(several[0])
    tl.load(q.ptr)


def test_names_of_tensors():
    x = torch.zeros(4, dtype=torch.bool)
    rule = Rule(bias=Matrix(x, 3), slopes=torch.zeros(1), scale=1.0)
    arguments = {"q": Matrix(torch.zeros(4), 2), "rule": rule, "several": (x, None)}
    with interpreter.counting() as accesses:
        interpreter.run(named, (1,), arguments)
    assert accesses.loads == {"q": 2, "bias": 1, "several": 1}
    assert accesses.lines == ["load q", "load bias", "store slopes", "load several"]
    assert accesses.load_bytes == 2 * 4 + 2


@triton.jit
def arithmetic(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i * 2 - i)
    b = (a + 1.0) * a - a / 2.0  # add, mul, sub, div
    c = tl.maximum(tl.fma(a, b, a), tl.minimum(a, b))
    d = tl.exp(a) + tl.exp2(a)
    e = tl.log(a) + tl.log2(a) + tl.sqrt(a)
    f = -a + tl.where(a < b, c.to(tl.float16).to(tl.float32), d + e)
    square = f[:, None] + a[None, :]
    rows = tl.sum(square, 1) * tl.max(square, 0)
    total = tl.sum(rows, 0) * tl.min(rows, 0)
    tl.store(x + tl.sum(i) * 0, total)


def test_counts_of_arithmetic_on_floats():
    n = 16
    with interpreter.counting() as accesses:
        interpreter.run(arithmetic, (1,), {"x": torch.ones(n), "BLOCK": n})
    assert accesses.other == {
        "add": 6 * n + n * n,
        "mul": 2 * n + 1,
        "sub": 2 * n,
        "div": n,
        "fma": n,
        "maximum": n,
        "minimum": n,
        "exp": n,
        "exp2": n,
        "log": n,
        "log2": n,
        "sqrt": n,
        "sum": n * n + n,
        "amax": n * n,
        "amin": n,
    }
    assert accesses.matmul == 0


@triton.jit
def products(out):
    a = tl.full([16, 64], 1.0, tl.bfloat16)
    b = tl.full([64, 32], 1.0, tl.bfloat16)
    c = tl.dot(a, b) + tl.dot(a, b)
    tl.store(out, tl.sum(c))


def test_counts_of_products():
    out = torch.zeros(1)
    with interpreter.counting() as accesses:
        interpreter.run(products, (3,), {"out": out})
    assert out == 2 * 16 * 32 * 64
    assert accesses.matmul == 3 * 2 * (2 * 16 * 32 * 64)
    assert accesses.other == {"add": 3 * 16 * 32, "sum": 3 * 16 * 32}
