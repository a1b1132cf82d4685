"""How kernels are interpreted: arguments, grids, the language, and what is left behind."""

import subprocess
import sys
import threading
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as tritons

from triton_attention import interpreter

TWO = tl.constexpr(2)


def in_new_process(code, **environment):
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not result.returncode, result.stderr
    return result.stdout.split()


def test_triton_is_imported_only_when_a_kernel_is_run():
    code = """
import sys
from triton_attention import interpreter
print(interpreter.enabled(), "triton" in sys.modules)
interpreter.enable()
print(interpreter.enabled(), "triton" in sys.modules)
import triton, triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
print(interpreter.enabled(), isinstance(tl.sum, InterpretedFunction))
triton.knobs.runtime.interpret = False
interpreter.enable()
print(isinstance(triton.jit(lambda x: x), InterpretedFunction))
"""
    assert in_new_process(code) == ["False", "False", "True", "False", "True", "True", "True"]


def test_it_is_too_late_once_triton_compiles():
    code = """
import triton
from triton_attention import interpreter
for function in (interpreter.enable, lambda: interpreter.run(None, (1,), {})):
    try:
        function()
    except RuntimeError as error:
        print("set TRITON_INTERPRET=1 before Triton is imported" in str(error))
print(interpreter.enabled())
import os
os.environ["TRITON_INTERPRET"] = "1"
print(interpreter.enabled())
"""
    assert in_new_process(code) == ["True", "True", "False", "False"]


def test_the_environment_enables():
    code = "from triton_attention import interpreter; print(interpreter.enabled())"
    assert in_new_process(code, TRITON_INTERPRET="1") == ["True"]
    assert in_new_process(code, TRITON_INTERPRET="0") == ["False"]


class Inner(NamedTuple):
    ptr: Any
    factor: Any


class Outer(NamedTuple):
    inner: Inner
    missing: Any
    constant: Any
    rule: Any


@triton.jit
def twice(x):
    return x * TWO


@triton.jit
def arguments(
    out, outer, narrow, wide, widest, flag, number, nothing, WIDTH: tl.constexpr,
    SHAPE: tl.constexpr, FUNCTION: tl.constexpr, DEFAULT: tl.constexpr = 5, default=7,
):  # fmt: skip
    if nothing is None and outer.missing is None and outer.inner.ptr is not None:
        tl.store(out, tl.load(outer.inner.ptr) * outer.inner.factor)
    tl.store(out + 1, outer.rule(FUNCTION(narrow)))
    if wide.dtype == tl.int64 and widest.dtype == tl.uint64 and narrow.dtype == tl.int32:
        tl.store(out + 2, (wide * 2 + 1).to(tl.float64))
    if flag and flag.dtype == tl.int1:
        tl.store(out + 3, tl.sum(tl.full([WIDTH], 1.0, tl.float32)))
    if (number * tl.load(outer.inner.ptr).to(tl.bfloat16)).dtype == tl.float32:
        tl.store(out + 4, number)
    i = tl.arange(0, SHAPE.inner) * outer.constant
    tl.store(out + 5, tl.sum(i) + DEFAULT + default.to(tl.int64))


def test_arguments_are_those_of_compiled_kernels():
    out = torch.zeros(6, dtype=torch.float64)
    values = {
        "out": out,
        "outer": Outer(Inner(torch.tensor([3.0]), 4), None, tl.constexpr(10), twice),
        "narrow": -(2**31), "wide": 2**31, "widest": 2**63, "flag": True, "number": 0.1,
        "nothing": None, "WIDTH": 8, "SHAPE": Outer(4, None, None, None), "FUNCTION": twice,
    }  # fmt: skip
    interpreter.run(arguments, (1,), values)
    exact = torch.tensor(0.1, dtype=torch.float32).double().item()
    assert out.tolist() == [12, 0, 2**32 + 1, 8, exact, 60 + 5 + 7]  # int32 wraps


@triton.jit
def visit(out, seen):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    number = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(out + number, tl.load(seen) + 1)
    tl.store(seen, tl.load(seen) + 1)


@pytest.mark.parametrize("grid", [(5,), (2, 3), (2, 3, 4), (0,), (2, 0)])
def test_each_program_of_the_grid_runs_once(grid):
    size = int(torch.tensor(grid).prod())
    out, seen = torch.zeros(max(size, 1)), torch.zeros(1)
    interpreter.run(visit, grid, {"out": out, "seen": seen})
    assert seen == size
    assert torch.equal(out[:size], torch.arange(1.0, size + 1))


@triton.jit
def language(x, out, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    if program >= n:
        return
    tl.assume(program >= 0)
    total = tl.zeros([BLOCK], tl.float32)
    start = tl.multiple_of(program * 0, 8)
    for _ in tl.range(start, n, 1, num_stages=2):
        total += 1
    for k in tl.static_range(2):
        total += k
    for k in range(start, n):
        total += k
    tl.static_assert(BLOCK == 8)
    i = tl.max_contiguous(tl.arange(0, BLOCK), BLOCK)
    total += twice(tl.load(x + i)).exp() * 0
    tl.debug_barrier()
    tl.store(out + program * BLOCK + i, total)


def test_the_language():
    x, out = torch.zeros(8), torch.full((4, 8), -1.0)
    interpreter.run(language, (4,), {"x": x, "out": out, "n": 3, "BLOCK": 8})
    assert out.tolist() == [[3.0 + 1 + 3] * 8] * 3 + [[-1.0] * 8]


@triton.jit
def descriptors(x, out, rows, columns, stride, first):
    source = tl.make_tensor_descriptor(x, [rows, columns], [stride, 1], [4, 8])
    target = tl.make_tensor_descriptor(out, [rows, columns], [stride, 1], [4, 8])
    target.store([first, 0], source.load([first, 0]) + 1)


def test_tensor_descriptors():
    x, out = torch.arange(48.0).reshape(6, 8), torch.zeros(6, 8)
    values = {"x": x, "out": out, "rows": 6, "columns": 5, "stride": 8, "first": 4}
    with interpreter.counting() as accesses:
        interpreter.run(descriptors, (1,), values)
    assert torch.equal(out[4:, :5], x[4:, :5] + 1)
    assert not out[:4].any()
    assert not out[:, 5:].any()
    assert accesses.loads == {"x": 10}
    interpreter.run(descriptors, (1,), values | {"first": -3})
    assert torch.equal(out[:1, :5], x[:1, :5] + 1)
    with pytest.raises(interpreter.OutOfBounds, match="load x"):
        interpreter.run(descriptors, (1,), values | {"rows": 7})
    for wrong in ({"stride": 6}, {"x": x.ravel()[1:]}):
        with pytest.raises(ValueError, match="16 bytes"):
            interpreter.run(descriptors, (1,), values | wrong)


@triton.jit
def block_pointers(x, out, rows, columns):
    source = tl.make_block_ptr(x, (rows, columns), (columns, 1), (0, 0), (4, 8), (1, 0))
    source = tl.advance(source, (2, 0))
    tile = tl.load(source, boundary_check=(0, 1), padding_option="nan")
    target = tl.make_block_ptr(out, (4, 8), (8, 1), (0, 0), (4, 8), (1, 0))
    tl.store(target, tile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_pointers(dtype):
    x, out = torch.arange(20.0).reshape(4, 5).to(dtype), torch.zeros(4, 8).to(dtype)
    interpreter.run(block_pointers, (1,), {"x": x, "out": out, "rows": 4, "columns": 5})
    assert torch.equal(out[:2, :5], x[2:])
    assert out[2:].isnan().all()
    assert out[:, 5:].isnan().all()


class Failed(Exception):
    """Raised by a kernel."""


def fail():
    raise Failed("as told")


@triton.jit
def inner_failure(x):
    fail()


@triton.jit
def failing(x):
    if tl.program_id(0) == 1:
        inner_failure(x)


OWNERS = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.block_type, tl.tensor_descriptor)
OTHERS = (tritons.InterpretedFunction, tritons.interpreter_semantic)


def test_nothing_of_the_language_is_left_behind():
    def state():
        return [dict(vars(owner)) for owner in OWNERS + OTHERS]

    before = state()
    interpreter.run(visit, (1,), {"out": torch.zeros(1), "seen": torch.zeros(1)})
    assert state() == before
    with pytest.raises(Failed):
        interpreter.run(failing, (2,), {"x": 1})
    assert state() == before


def test_exceptions_are_those_of_the_kernel():
    with pytest.raises(Failed, match="as told") as caught:
        interpreter.run(failing, (2,), {"x": 1})
    assert caught.value.__notes__ == ["in program (1, 0, 0) of the kernel failing"]
    assert "inner_failure" in [entry.name for entry in caught.traceback]


def test_the_language_is_not_made_anew(monkeypatch):
    """Which would take longer than most kernels do, for every call of a device function."""
    monkeypatch.setattr(tritons, "_patch_lang", fail)
    test_the_language()


AFTER_TRITON = """
from triton_attention import interpreter
interpreter.enable()
import torch, triton, triton.language as tl

@triton.jit
def total(x, out):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, 8)), 0))

x, out = torch.ones(8), torch.zeros(1)
total[(1,)](x, out)
print(tl.core.is_builtin(tl.core.load))
interpreter.run(total, (1,), {"x": 2 * x, "out": out})
print(int(out))
"""


def test_what_triton_leaves_behind_of_the_language_does_no_harm(tmp_path):
    script = tmp_path / "after_triton.py"
    script.write_text(AFTER_TRITON, encoding="utf-8")
    code = f"import runpy; runpy.run_path({str(script)!r})"
    assert in_new_process(code) == ["False", "16"]


def test_threads_take_turns():
    outs = [torch.zeros(50) for _ in range(4)]

    def run(out):
        for _ in range(20):
            interpreter.run(visit, (50,), {"out": out, "seen": torch.zeros(1)})

    threads = [threading.Thread(target=run, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, torch.arange(1.0, 51)) for out in outs)


def test_a_tensor_that_requires_a_gradient():
    x = torch.zeros(1, requires_grad=True)
    interpreter.run(visit, (1,), {"out": torch.zeros(1), "seen": x})
    assert x.item() == 1
