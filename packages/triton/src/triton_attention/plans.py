"""Launches made once for each form of tensors, and then run again with others of that form.

Choosing tiles, collecting arguments and binding them takes Python several times as long as the
launch. All of it depends on the form of the tensors alone: shapes, strides, dtypes, devices and
whether they are aligned, which is what Triton compiles a kernel for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
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
    new = [partial(_empty_like, *_empty(tensor)) for tensor in known[len(inputs) :]]
    names = {}
    for name, tensor in result.tensors.items():
        (names[name],) = _index(known, tensor)
    steps = []
    for launch, handle in zip(result.launches, handles, strict=True):
        slots = list(_slots(launch, known))
        if any(make is None for _, make in slots):
            return None
        positions = {position for position, _ in slots}
        order = list(launch.arguments) if handle is None else launch.kernel.arg_names
        values = [None if name in positions else launch.arguments[name] for name in order]
        at = {name: position for position, name in enumerate(order)}
        steps.append(
            _Step(
                _launcher(launch, handle, order),
                values,
                [(at[name], make) for name, make in slots if make is not None],
            )
        )
    return Plan(steps, new, names)


def _slots(launch: Launch, known: Sequence[Tensor]) -> Iterator[tuple[str, Make | None]]:
    """The arguments of a launch that hold a tensor, and how each is made; None where it is not one
    of those that are known."""
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            found = _index(known, value)
            yield name, partial(_take, found[0]) if found else None
        elif isinstance(value, TensorDescriptor):
            found = _index(known, value.base)
            empty = copy.copy(value)
            empty.base = None
            yield name, partial(_describe, empty, found[0]) if found else None
        elif isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value):
            head, *tail = value
            found = _index(known, head)
            if any(isinstance(item, Tensor) for item in tail):
                found = []
            yield name, partial(_tuple, type(value), found[0], tuple(tail)) if found else None


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


def _empty(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _empty_like(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _launcher(launch: Launch, handle: Any, names: Sequence[str]) -> Callable[..., None]:
    """Launches with the values of the parameters: compiled, interpreted, or, on an empty grid,
    nothing."""
    if handle is not None:
        return handle[(*launch.grid, 1, 1)[:3]]  # type: ignore[no-any-return]
    if not interpreter.enabled():
        return lambda *values: None
    kernel, grid = launch.kernel, launch.grid  # not the launch, which has tensors
    return lambda *values: interpreter.run(kernel, grid, dict(zip(names, values, strict=True)))
