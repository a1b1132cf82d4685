"""Launches of interpreted kernels: what they get as arguments, and the walk over the grid."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor as TorchTensor
from triton.runtime.jit import mangle_type

from .accesses import Region
from .language import BUILDER, Tensor, in_place
from .memory import Handle, array_dtype


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, object]) -> None:
    """Run a kernel over its grid, one program after the other."""
    function, constants, defaults = _prepared(kernel)
    grid = (*grid, *(1,) * (3 - len(grid)))
    with in_place(), np.errstate(all="ignore"):  # hardware does not warn
        values = {
            name: value if name in constants else _argument(name, value)
            for name, value in {**defaults, **arguments}.items()
        }
        BUILDER.set_grid_dim(*grid)
        for program in np.ndindex(*grid):
            BUILDER.grid_idx = program
            try:
                function(**values)
            except Exception as error:
                error.add_note(f"in program {program} of the kernel {kernel.__name__}")
                raise


@cache
def _prepared(kernel: Any) -> tuple[Callable[..., None], set[str], dict[str, Any]]:
    """What runs a program, its parameters that are constants, and defaults of parameters."""
    parameters = inspect.signature(kernel.fn).parameters.values()
    constants = {each.name for each in parameters if "constexpr" in str(each.annotation)}
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    return kernel.rewrite(), constants, defaults


def _argument(name: str, value: Any) -> Any:
    """An argument as compiled kernels get it: a pointer, or a number of 32 bits where it fits."""
    if isinstance(value, TorchTensor):
        dtype = _pointer_type(value.dtype)
        return Tensor(Handle(np.zeros(1, np.int64), dtype, Region(name, value)), dtype)
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        if fields is None:
            return tuple(_argument(name, member) for member in value)
        names = (name if field == "ptr" else field for field in fields)
        return type(value)(*map(_argument, names, value))
    if isinstance(value, bool):
        return _scalar(value, tl.int1)
    if isinstance(value, int):
        narrow = -(2**31) <= value < 2**31
        return _scalar(value, tl.int32 if narrow else tl.int64 if value < 2**63 else tl.uint64)
    if isinstance(value, float):
        return _scalar(value, tl.float32)
    return value


def _scalar(value: float, dtype: Any) -> Tensor:
    return Tensor(Handle(np.array([value], array_dtype(dtype)), dtype), dtype)


@cache
def _pointer_type(dtype: torch.dtype) -> Any:
    return tl.str_to_ty(mangle_type(torch.empty(0, dtype=dtype)), None)
