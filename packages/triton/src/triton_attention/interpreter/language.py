"""Triton's language as interpreted kernels see it, and how it is put in place while they run.

Triton's interpreter makes the replacements of its language anew for every launch and for every call
of a device function. Here they are made once, and are only assigned.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

from .memory import like
from .operations import Builder
from .short_floats import Array

unwrap = tl.core._unwrap_if_constexpr
NO_SIZES = tl.tuple([])
# Dtypes that the operands of any operation may keep if they are the same.
UNPROMOTED = {"fp32", "fp64", "int1", "int32", "int64", "uint32", "uint64"}
BLOCKS: dict[tuple[Any, ...], Any] = {}


class _Interned(type):
    """Types of blocks are made once, as making one takes longer than most operations."""

    def __call__(cls, element_ty: Any, shape: Any) -> Any:
        key = (element_ty.name, *shape)
        if key not in BLOCKS:
            BLOCKS[key] = super().__call__(element_ty, list(shape))
        return BLOCKS[key]


class Block(tl.block_type, metaclass=_Interned):  # type: ignore[misc]
    """The type of a block; ``sizes`` is the shape of its values."""

    def __init__(self, element_ty: Any, shape: Iterable[int]) -> None:
        super().__init__(element_ty, shape)
        self.sizes = tl.tuple([tl.constexpr(size) for size in self.shape])


class Tensor(tl.tensor):  # type: ignore[misc]
    """A value of a kernel: numbers or pointers, a scalar or a block."""

    def __init__(self, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar

    @property
    def shape(self) -> Any:
        """Sizes as constexpr."""
        return self.type.sizes if self.type.is_block() else NO_SIZES

    @property
    def numel(self) -> Any:
        """Elements, as constexpr."""
        return tl.constexpr(self.handle.data.size)

    @property
    def T(self) -> Any:
        """The last two dimensions swapped."""
        rank = len(self.type.shape)
        return SEMANTIC.permute(self, (*range(rank - 2), rank - 1, rank - 2))

    def __index__(self) -> int:
        return int(self.handle.data.item())

    def __bool__(self) -> bool:
        # Blocks are true, as in Triton, whose code asks "if mask" of them.
        return bool(self.handle.data.item()) if self.handle.data.size == 1 else True

    def __repr__(self) -> str:
        return repr(self.handle.data)

    __str__ = __repr__


class Descriptor(tl.tensor_descriptor):  # type: ignore[misc]
    """A tensor that is loaded and stored in blocks."""


class Semantic(TritonSemantic):  # type: ignore[misc]
    """What expressions mean: as in Triton, at once where there is nothing to convert."""

    tensor = Tensor

    def binary_op_type_checking_impl(
        self, lhs: Any, rhs: Any, *checks: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """The operands of one dtype and shape."""
        if isinstance(lhs, Tensor) and lhs.dtype.name in UNPROMOTED:
            if isinstance(rhs, float) and lhs.dtype is tl.float32:
                rhs = self.scalar_constant(rhs, tl.float32)
            if isinstance(rhs, Tensor) and rhs.dtype is lhs.dtype:
                return self.broadcast_impl_value(lhs, rhs)
        pair: tuple[Tensor, Tensor] = super().binary_op_type_checking_impl(
            lhs, rhs, *checks, **more
        )
        return pair

    def cast(self, input: Tensor, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        """The value in a dtype."""
        if input.dtype is dst_ty.scalar:
            return input
        return super().cast(input, dst_ty, fp_downcast_rounding)

    def broadcast_impl_value(self, lhs: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """Both in one shape. Triton broadcasts as numpy does, but between scalars."""
        if lhs.type.is_block() or rhs.type.is_block():
            left = lhs.handle.data.shape if lhs.type.is_block() else ()
            right = rhs.handle.data.shape if rhs.type.is_block() else ()
            if left != right:
                shape = np.broadcast_shapes(left, right)
                lhs = lhs if left == shape else _broadcast(lhs, shape)
                rhs = rhs if right == shape else _broadcast(rhs, shape)
        return lhs, rhs


def _broadcast(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    data = np.broadcast_to(tensor.handle.data, shape)
    return Tensor(like(tensor.handle, data), Block(tensor.dtype, shape))


BUILDER = Builder()
SEMANTIC = Semantic(BUILDER)
REDUCTIONS = {
    tl.standard._sum_combine: BUILDER.total,
    tl.standard._elementwise_max: BUILDER.largest,
    tl.standard._elementwise_min: BUILDER.smallest,
}


def _reduce(input: Any, axis: Any, combine_fn: Any, keep_dims: Any = False, **unused: Any) -> Any:
    axis, keep_dims = unwrap(axis), unwrap(keep_dims)
    if combine_fn not in REDUCTIONS:
        return stock.ReduceOps(axis, combine_fn, keep_dims).apply(input)
    data: Array = input.handle.data
    shape: tuple[int, ...]
    if axis is None:
        shape = (1,) * data.ndim if keep_dims else ()
        axis, data = 0, data.reshape(-1)
    else:
        axis %= data.ndim
        shape = (*data.shape[:axis], *((1,) if keep_dims else ()), *data.shape[axis + 1 :])
    result = REDUCTIONS[combine_fn](like(input.handle, data), axis)
    result.data = result.data.reshape(shape or (1,))
    return Tensor(result, Block(input.dtype, shape) if shape else input.dtype)


def _scan(input: Any, axis: Any, combine_fn: Any, reverse: Any = False, **unused: Any) -> Any:
    return stock.ScanOps(unwrap(axis), combine_fn, unwrap(reverse)).apply(input)


def _range(arg1: Any, arg2: Any = None, step: Any = None, **hints: Any) -> range:
    start, stop = (0, arg1) if arg2 is None else (arg1, arg2)
    return range(start, stop, 1 if step is None else step)


def _static_assert(condition: Any, message: str = "") -> None:
    assert condition, message


def _hint(input: Any, values: Any) -> Any:
    return input


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a device function by another or by a kernel."""
    return self.rewrite()(*args, **kwargs)


def _unchecked(builtin: Any) -> Any:
    """A function of the language without the wrapper that asks whether code is being generated."""
    return getattr(builtin, "__wrapped__", builtin)


def _builtins(module: Any) -> Iterator[tuple[str, Any]]:
    """The functions of the language in a module. Launches by Triton's own interpreter leave some of
    them behind replaced, with the function as a default."""
    for name, member in list(vars(module).items()):
        defaults = getattr(member, "__kwdefaults__", None) or {}
        member = defaults.get("member", member)
        if tl.core.is_builtin(member):
            yield name, _unchecked(member)


def _method(member: Any) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        return member(*args, **{"_semantic": SEMANTIC, **kwargs})

    return method


for _cls in (Tensor, Descriptor):
    for _name, _member in inspect.getmembers(_cls, inspect.isfunction):
        if "_semantic" in inspect.signature(_member).parameters:
            setattr(_cls, _name, _method(_unchecked(_member)))
Tensor.reduce, Tensor.associative_scan = _reduce, _scan

Assignment = tuple[Any, str, Any]  # owner, name of the attribute, value


def _language() -> list[Assignment]:
    """What is assigned while kernels run."""
    assignments: list[Assignment] = []
    for module in (tl, tl.core, tl.math):
        for name, function in _builtins(module):
            assignments.append((module, name, partial(function, _semantic=SEMANTIC)))
    others = {
        "tensor": Tensor,
        "block_type": Block,
        "tensor_descriptor": Descriptor,
        "reduce": _reduce,
        "associative_scan": _scan,
        "range": _range,
        "static_range": _range,
        "static_assert": _static_assert,
        "static_print": print,
        "multiple_of": _hint,
        "max_contiguous": _hint,
        "max_constancy": _hint,
    }
    assignments += [(module, *other) for module in (tl, tl.core) for other in others.items()]
    # The types of the IR do not tell signed integers from unsigned ones.
    types = (tl.dtype, tl.pointer_type, tl.block_type)
    assignments += [(cls, "to_ir", lambda self, builder: self) for cls in types]
    # Triton rewrites assignments in kernels into calls of this.
    assignments.append((stock.interpreter_semantic, "to_tensor", SEMANTIC.to_tensor))
    assignments.append((stock.InterpretedFunction, "__call__", _call))
    return assignments


ABSENT = object()
INTERPRETED = _language()
COMPILED = [(owner, name, vars(owner).get(name, ABSENT)) for owner, name, _ in INTERPRETED]
LOCK = threading.Lock()


@contextmanager
def in_place() -> Iterator[None]:
    """The language of interpreted kernels in the place of Triton's, for one thread at a time."""
    with LOCK:
        try:
            for owner, name, value in INTERPRETED:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in COMPILED:
                if value is not ABSENT:
                    setattr(owner, name, value)
                elif name in vars(owner):
                    delattr(owner, name)
