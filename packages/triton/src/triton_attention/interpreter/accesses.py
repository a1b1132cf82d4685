"""What interpreted kernels access and compute: the tensors that they may touch, and the counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .short_floats import Array

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class OutOfBounds(IndexError):
    """A kernel addressed what is not an element of the tensor that its pointer came from."""


@dataclass(kw_only=True, eq=False)
class Accesses:
    """What kernels load, store and compute; tensors by the name they are passed under.

    ``loads`` and ``stores`` are in elements whose mask is true; an atomic operation is both.
    ``matmul``: 2 M N K of every product, as issued, padding included. ``other``: operations on
    floats by kind, one per element of the result, or of the operand of a sum or maximum over an
    axis ("sum", "amax", "amin"). ``lines``: "load q", "store out" …, each the first time.
    """

    loads: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)
    load_bytes: int = 0
    store_bytes: int = 0
    matmul: int = 0
    other: Counter[str] = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)

    def load(self, region: Region, elements: int) -> None:
        """Note a load."""
        self.loads[region.name] += elements
        self.load_bytes += elements * region.itemsize
        self._seen(f"load {region.name}")

    def store(self, region: Region, elements: int) -> None:
        """Note a store."""
        self.stores[region.name] += elements
        self.store_bytes += elements * region.itemsize
        self._seen(f"store {region.name}")

    def _seen(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)


OBSERVERS: list[Accesses] = []


@contextmanager
def counting() -> Iterator[Accesses]:
    """Counts what kernels that are run inside do. Contexts nest, and then all of them count."""
    accesses = Accesses()
    OBSERVERS.append(accesses)
    try:
        yield accesses
    finally:
        OBSERVERS.remove(accesses)


class Region:
    """The memory of a tensor argument from its first element to its last.

    ``bits`` are the elements, and what lies between them, as a flat array of integers that shares
    the memory. Pointers are indices into it, so that what they may address goes with them.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        span = 0
        if tensor.numel():
            sizes = zip(tensor.shape, tensor.stride(), strict=True)
            span = 1 + sum((size - 1) * stride for size, stride in sizes)
        self.name = name
        self.itemsize = tensor.element_size()
        self.address = tensor.data_ptr()
        flat = tensor.detach().as_strided((span,), (1,))
        self.bits: Array = flat.view(_BITS[self.itemsize]).numpy()
        self.runs = runs(tensor.shape, tensor.stride())
        self.dense = not self.runs or (len(self.runs) == 1 and self.runs[0].stride == 1)

    def check(self, access: str, indices: Array, program: tuple[int, ...]) -> None:
        """OutOfBounds unless all int64 ``indices`` are those of elements."""
        if not indices.size:
            return
        wrong = ""
        # As unsigned numbers, negative ones are the largest.
        if indices.view(np.uint64).max() >= self.bits.size:
            wrong = self._beyond(indices)
        elif not self.dense and not (inside := among(indices, self.runs)).all():
            wrong = f"{_elements(int(np.count_nonzero(~inside)))} between its own"
        if wrong:
            raise OutOfBounds(f"{access} {self.name} in program {program}: {wrong}")

    def _beyond(self, indices: Array) -> str:
        size = self.bits.size
        if not size:
            return "it has no elements"
        before, after = -int(indices.min()), int(indices.max()) - size + 1
        found = [f"{_elements(before)} before its first"] if before > 0 else []
        found += [f"{_elements(after)} beyond its last"] if after > 0 else []
        return f"{' and '.join(found)} (of {size} from first to last)"


class Run(NamedTuple):
    """Equidistant offsets: 0, stride, 2 stride … up to size - 1 of them further."""

    size: int
    stride: int


def runs(sizes: Sequence[int], strides: Sequence[int]) -> tuple[Run, ...]:
    """Runs, as few as possible, the sums of whose offsets are those of the elements of a tensor.

    The longest strides first. Of a tensor without gaps it is one of stride 1, or none.
    """
    found: list[Run] = []
    for stride, size in sorted(zip(strides, sizes, strict=True)):
        if size == 1 or not stride:
            continue  # what broadcasts is one element
        inner = found[-1] if found else None
        if inner and not stride % inner.stride and stride // inner.stride <= inner.size:
            # It goes on where the inner run ends, or before.
            found[-1] = inner._replace(size=inner.size + (size - 1) * (stride // inner.stride))
        else:
            found.append(Run(size, stride))
    return tuple(reversed(found))


def among(indices: Array, runs: tuple[Run, ...]) -> Array:
    """Which indices, all 0 or more, are sums of offsets, one of each run.

    By arithmetic, as a table would need as much memory as lies between first and last element.
    """
    if not runs:
        found: Array = indices == 0
        return found
    (size, stride), inner = runs[0], runs[1:]
    last = np.minimum(indices // stride, size - 1)
    found = among(indices - last * stride, inner)
    # Where runs overlap, what is left may as well be reached from an offset before.
    reach = sum((run.size - 1) * run.stride for run in inner)
    for back in range(1, reach // stride + 1):
        offset = last - back
        found |= (offset >= 0) & among(indices - offset * stride, inner)
    return found


def _elements(count: int) -> str:
    return f"{count} element" if count == 1 else f"{count} elements"
