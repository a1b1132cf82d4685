"""Launches made once for each form of tensors, and then run again with others of that form.

Choosing tiles, collecting arguments and binding them takes Python several times as long as the
launch. All of it depends on the form of the tensors alone: shapes, strides, dtypes, devices and
whether they are aligned, which is what Triton compiles a kernel for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import interpreter
from .launch import Launch, Result

ALIGNMENT = 16  # bytes; what Triton tells apart
MOST = 4096  # plans, after which they are made anew

Make = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True)
class _Step:
    """A launch without its tensors: ``values`` in the order of the kernel's parameters, None where
    ``slots`` say how a value is made of tensors."""

    launch: Callable[..., None]
    values: list[Any]
    slots: list[tuple[int, Make]]

    def run(self, tensors: Sequence[Tensor]) -> None:
        values = self.values.copy()
        for position, make in self.slots:
            values[position] = make(tensors)
        self.launch(*values)


@dataclass(frozen=True)
class Plan:
    """Launches, what they write by name, and the forms of the tensors that they allocate."""

    steps: list[_Step]
    new: Sequence[Callable[[], Tensor]]
    names: dict[str, int]  # of what is written, among inputs and new tensors

    def run(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """What ``Result.run`` gives."""
        tensors = [*inputs, *(make() for make in self.new)]
        for step in self.steps:
            step.run(tensors)
        return {name: tensors[index] for name, index in self.names.items()}


_plans: dict[Hashable, Plan | None] = {}


def run(inputs: Sequence[Tensor], rest: Hashable, make: Callable[[], Result]) -> dict[str, Tensor]:
    """What the launches of ``make`` write, a function of ``inputs``, by name.

    Made once for each form of the inputs and ``rest``, which is all else that decides what is
    launched. Launches with tensors that are neither inputs nor allocated for them, such as copies,
    are made every time.
    """
    same = tuple(_index(inputs, tensor)[0] for tensor in inputs)  # one may be given twice
    key = (rest, same, *map(_form, inputs))
    plan = _plans.get(key)
    if plan is not None:
        return plan.run(inputs)
    result = make()
    handles = [launch.run() for launch in result.launches]
    if key not in _plans:
        if len(_plans) >= MOST:
            _plans.clear()
        _plans[key] = _plan(result, handles, inputs)
    return result.tensors


def _form(tensor: Tensor) -> Hashable:
    aligned = tensor.data_ptr() % ALIGNMENT == 0
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, aligned


def _plan(result: Result, handles: Sequence[Any], inputs: Sequence[Tensor]) -> Plan | None:
    """None where a launch has a tensor that is of no known origin."""
    written = [*result.tensors.values(), *result.scratch]
    known = [*inputs, *(tensor for tensor in written if not _index(inputs, tensor))]
    steps = []
    for launch, handle in zip(result.launches, handles, strict=True):
        order = list(launch.arguments) if handle is None else launch.kernel.arg_names
        values, slots = [launch.arguments[name] for name in order], []
        for position, value in enumerate(values):
            if not _held(value):
                continue
            make = _maker(value, known)
            if make is None:
                return None
            values[position] = None
            slots.append((position, make))
        steps.append(_Step(_launcher(launch, handle, order), values, slots))
    names = {name: _index(known, tensor)[0] for name, tensor in result.tensors.items()}
    return Plan(steps, [_allocation(tensor) for tensor in known[len(inputs) :]], names)


def _held(value: Any) -> list[Tensor]:
    """The tensors that an argument holds: itself, that of a descriptor, or those of a tuple."""
    items = value if isinstance(value, tuple) else (getattr(value, "base", value),)
    return [item for item in items if isinstance(item, Tensor)]


def _maker(value: Any, known: Sequence[Tensor]) -> Make | None:
    """How an argument that holds tensors is made of others like those that are ``known``; None
    where it holds an unknown one, or another than one, at the head of a tuple."""
    held = _held(value)
    found = _index(known, held[0])
    if len(held) > 1 or not found:
        return None
    (index,) = found
    if isinstance(value, Tensor):
        return partial(_take, index)
    if isinstance(value, TensorDescriptor):
        empty = copy.copy(value)
        empty.base = None
        return partial(_describe, empty, index)
    head, *tail = value
    return partial(_tuple, type(value), index, tuple(tail)) if isinstance(head, Tensor) else None


def _index(tensors: Sequence[Tensor], wanted: Any) -> list[int]:
    """Where that very tensor is, once at most."""
    return [index for index, tensor in enumerate(tensors) if tensor is wanted][:1]


def _take(index: int, tensors: Sequence[Tensor]) -> Tensor:
    return tensors[index]


def _describe(empty: TensorDescriptor, index: int, tensors: Sequence[Tensor]) -> TensorDescriptor:
    made = copy.copy(empty)
    made.base = tensors[index]
    return made


def _tuple(kind: Any, index: int, tail: tuple[Any, ...], tensors: Sequence[Tensor]) -> Any:
    return kind(tensors[index], *tail)


def _allocation(tensor: Tensor) -> Callable[[], Tensor]:
    """Allocates one of that form."""
    shape, stride = tuple(tensor.shape), tensor.stride()
    return partial(torch.empty_strided, shape, stride, dtype=tensor.dtype, device=tensor.device)


def _launcher(launch: Launch, handle: Any, names: Sequence[str]) -> Callable[..., None]:
    """Launches with the values of the parameters: compiled, interpreted, or, on an empty grid,
    nothing."""
    if handle is not None:
        return handle[(*launch.grid, 1, 1)[:3]]  # type: ignore[no-any-return]
    if not interpreter.enabled():
        return lambda *values: None
    kernel, grid = launch.kernel, launch.grid  # not the launch, which has tensors
    return lambda *values: interpreter.run(kernel, grid, dict(zip(names, values, strict=True)))
