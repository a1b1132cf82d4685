"""What interpreted kernels access and compute: the tensors that they may touch, and the counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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

    ``bits`` are the elements as a flat array of integers that shares the memory. Pointers are
    indices into it, so that what they may address goes with them.
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

    def check(self, access: str, indices: Array, program: tuple[int, ...]) -> None:
        """OutOfBounds unless all int64 ``indices`` are those of elements."""
        # As unsigned numbers, negative ones are the largest.
        if indices.size and indices.view(np.uint64).max() >= self.bits.size:
            raise OutOfBounds(f"{access} {self.name} in program {program}: {self._beyond(indices)}")

    def _beyond(self, indices: Array) -> str:
        size = self.bits.size
        if not size:
            return "it has no elements"
        before, after = -int(indices.min()), int(indices.max()) - size + 1
        found = [f"{_elements(before)} before its first"] if before > 0 else []
        found += [f"{_elements(after)} beyond its last"] if after > 0 else []
        return f"{' and '.join(found)} (of {size} from first to last)"


def _elements(count: int) -> str:
    return f"{count} element" if count == 1 else f"{count} elements"
