"""The arithmetic of interpreted kernels, where numpy or Triton's interpreter differ from a GPU.

- bf16 is stored as its bits; every operation on it computes in fp32 and rounds once.
- Maxima and minima drop NaN unless they are told not to.
- Products of fp16 and bf16 are exact, those of fp32 round to tf32 where they are asked to.
- Sums of fp16 and bf16 round after every addition, as their dtype is that of the addition.

fp8 is as in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock

from .accesses import OBSERVERS
from .memory import Handle, Memory, array_dtype, like
from .short_floats import Array, double_to_bfloat16, from_bfloat16, to_bfloat16, to_tf32

_erf = np.vectorize(math.erf, otypes="d")

# Operations on floats: what they are called in Triton, counted as, and computed by.
ARITHMETIC: list[tuple[str, str, Callable[..., Array]]] = [
    ("fadd", "add", np.add),
    ("fsub", "sub", np.subtract),
    ("fmul", "mul", np.multiply),
    ("fdiv", "div", np.divide),
    ("precise_divf", "div", np.divide),
    ("frem", "rem", np.fmod),
    ("maxnumf", "maximum", np.fmax),
    ("maximumf", "maximum", np.maximum),
    ("minnumf", "minimum", np.fmin),
    ("minimumf", "minimum", np.minimum),
    ("exp", "exp", np.exp),
    ("exp2", "exp2", np.exp2),
    ("log", "log", np.log),
    ("log2", "log2", np.log2),
    ("sqrt", "sqrt", np.sqrt),
    ("precise_sqrt", "sqrt", np.sqrt),
    ("rsqrt", "rsqrt", lambda x: 1 / np.sqrt(x)),
    ("sin", "sin", np.sin),
    ("cos", "cos", np.cos),
    ("erf", "erf", lambda x: _erf(x).astype(x.dtype)),
]


class Builder(Memory):
    """Computes what Triton would generate code for."""

    def __init__(self) -> None:
        super().__init__()
        # Without the checks for overflow of integers: seven operations each, for debugging alone.
        self.options = stock.InterpreterOptions(sanitize_overflow=False)

    def get_null_value(self, type: Any) -> Handle:
        """The constant 0."""
        return Handle(np.zeros(1, array_dtype(type.scalar)), type.scalar)

    def get_bf16(self, value: float) -> Handle:
        """A constant."""
        return Handle(to_bfloat16(np.array([value], np.float32)), tl.bfloat16)

    def cast_impl(self, src: Any, dst_type: Any) -> Handle:
        """Of numbers: to nearest even, integers to bf16 by way of fp32."""
        source, target, data = src.dtype.scalar, dst_type.scalar, src.data
        if source.is_bf16():
            data = from_bfloat16(data)
        if not target.is_bf16():
            data = data.astype(array_dtype(target), copy=False)
        elif source.is_fp64():
            data = double_to_bfloat16(data)
        else:
            data = to_bfloat16(data.astype(np.float32, copy=False))
        return Handle(data, target)

    def apply(self, operation: Callable[..., Array], *operands: Any) -> Handle:
        """An operation on every element; those of comparisons are int1."""
        dtype = operands[0].dtype.scalar
        if dtype.is_bf16():
            result = operation(*(from_bfloat16(operand.data) for operand in operands))
            if result.dtype != np.bool_:
                result = to_bfloat16(result)
        else:
            result = operation(*(operand.data for operand in operands))
        return Handle(result, tl.int1 if result.dtype == np.bool_ else dtype)

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Array]) -> Handle:
        """Of the operations that are as in Triton's interpreter."""
        return self.apply(op, lhs, rhs)

    def unary_op(self, arg: Any, op: Callable[..., Array]) -> Handle:
        """Of the operations that are as in Triton's interpreter."""
        return self.apply(op, arg)

    def create_ashr(self, lhs: Any, rhs: Any) -> Handle:
        """Triton's interpreter changes the dtype of the operands, for whoever else has them."""
        return self.apply(np.right_shift, lhs, rhs)

    def create_fma(self, x: Any, y: Any, z: Any) -> Handle:
        """x * y + z: products of fp32 are exact in fp64."""

        def fused(x: Array, y: Array, z: Array) -> Array:
            return (x.astype(np.float64) * y + z).astype(z.dtype)

        self._count("fma", z.data)
        return self.apply(fused, x, y, z)

    def create_clampf(self, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Handle:
        """A maximum and a minimum."""
        self._count("maximum", arg.data)
        self._count("minimum", arg.data)
        if propagate_nans == tl.PropagateNan.ALL:
            return self.apply(np.clip, arg, lo, hi)
        return self.apply(lambda x, lo, hi: np.fmin(np.fmax(x, lo), hi), arg, lo, hi)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Handle:
        """a @ b in fp32 (tf32x3: as ieee), then added to d in its dtype."""
        for accesses in OBSERVERS:
            accesses.matmul += 2 * a.data.size * b.data.shape[-1]
        dtype = a.dtype.scalar
        if not (dtype.is_fp32() or dtype.is_fp16() or dtype.is_bf16()):
            return like(d, super().create_dot(a, b, d, input_precision, imprecise).data)
        left, right = (self.cast_impl(operand, tl.float32).data for operand in (a, b))
        if dtype.is_fp32() and input_precision == ir.INPUT_PRECISION.TF32:
            left, right = to_tf32(left), to_tf32(right)
        return like(d, (left @ right + d.data).astype(d.data.dtype, copy=False))

    def total(self, arg: Any, axis: int) -> Handle:
        """The sum over an axis."""
        data, dtype = arg.data, arg.dtype.scalar
        if dtype.is_floating():
            self._count("sum", data)
        if not (dtype.is_fp16() or dtype.is_bf16()):
            return Handle(data.sum(axis, dtype=data.dtype), dtype)
        data = np.moveaxis(data, axis, -1)
        while data.shape[-1] > 1:
            data = self.apply(np.add, like(arg, data[..., ::2]), like(arg, data[..., 1::2])).data
        return Handle(data[..., 0], dtype)

    def largest(self, arg: Any, axis: int) -> Handle:
        """The maximum over an axis; bf16 and fp16 are fp32 by then."""
        return self._extreme("amax", np.fmax, arg, axis)

    def smallest(self, arg: Any, axis: int) -> Handle:
        """The minimum likewise."""
        return self._extreme("amin", np.fmin, arg, axis)

    def _extreme(self, kind: str, operation: np.ufunc, arg: Any, axis: int) -> Handle:
        if arg.dtype.scalar.is_floating():
            self._count(kind, arg.data)
        return Handle(operation.reduce(arg.data, axis), arg.dtype.scalar)

    def _count(self, kind: str, data: Array) -> None:
        for accesses in OBSERVERS:
            accesses.other[kind] += data.size


for _name, _kind, _operation in ARITHMETIC:

    def _create(
        self: Builder,
        *operands: Any,
        kind: str = _kind,
        operation: Callable[..., Array] = _operation,
    ) -> Handle:
        result = self.apply(operation, *operands)
        self._count(kind, result.data)
        return result

    setattr(Builder, f"create_{_name}", _create)
