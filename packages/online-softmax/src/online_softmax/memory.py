"""The memory that the algorithms run in: HBM, whose every access is counted, and the chip.

An algorithm gets its tensors as ``HbmTensor``; it loads tiles, computes with plain torch, and
stores tiles. What it loads and stores is counted by tensor, in elements, so that the number of
accesses is that of the code which is judged, not that of a formula. What it computes is counted
by ``Operations`` (a torch dispatch mode), where somebody asks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(kw_only=True)
class Memory:
    """What went over the bus between HBM and the chip, in elements and in bytes, by tensor."""

    loads: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)
    load_bytes: int = 0
    store_bytes: int = 0
    lines: list[str] = field(default_factory=list)  # "load Q", "store S" …, each the first time

    def place(
        self, name: str, data: Tensor, compute: torch.dtype, vector: bool = False
    ) -> HbmTensor:
        """A tensor that lies in HBM; ``vector``: a tile takes no dimension whole."""
        return HbmTensor(
            memory=self, name=name, data=data, compute=compute, whole=0 if vector else 1
        )

    def seen(self, access: str) -> None:
        """Note an access for ``lines``."""
        if access not in self.lines:
            self.lines.append(access)

    @property
    def accesses(self) -> int:
        """Elements loaded and stored, all in all."""
        return self.loads.total() + self.stores.total()


@dataclass(kw_only=True, eq=False)
class HbmTensor:
    """A tensor in HBM. ``load`` and ``store`` take slices of the dimensions before the last
    ``whole`` ones: rows of a matrix (..., L, D), or rows and keys of one (..., Lq, Lk)."""

    memory: Memory
    name: str
    data: Tensor
    compute: torch.dtype  # of the tiles on the chip
    whole: int

    def load(self, *slices: slice) -> Tensor:
        """A tile, on the chip, in the dtype that is computed in."""
        part = self.data[self._index(slices)]
        self.memory.loads[self.name] += part.numel()
        self.memory.load_bytes += part.numel() * part.element_size()
        self.memory.seen(f"load {self.name}")
        return part.to(self.compute) if part.is_floating_point() else part

    def store(self, tile: Tensor, *slices: slice) -> None:
        """A tile back to HBM, rounded to the dtype of the tensor there."""
        part = self.data[self._index(slices)]
        part.copy_(tile)
        self.memory.stores[self.name] += part.numel()
        self.memory.store_bytes += part.numel() * part.element_size()
        self.memory.seen(f"store {self.name}")

    def _index(self, slices: tuple[slice, ...]) -> tuple[Any, ...]:
        """Dimensions of size 1 are broadcast: they are loaded whole."""
        end = self.data.dim() - self.whole
        sizes = self.data.shape[end - len(slices) : end]
        chosen = (slice(None) if n == 1 else s for n, s in zip(sizes, slices, strict=True))
        return (..., *chosen, *(slice(None),) * self.whole)


# What counts as one operation per element of its result, or, of a reduction, of its operand.
POINTWISE = {
    "exp", "exp2", "log", "log2", "add", "sub", "rsub", "mul", "div", "maximum", "neg", "tanh",
    "square", "pow", "reciprocal",
}  # fmt: skip
REDUCTIONS = {"sum", "amax", "max"}
MATMULS = {"mm", "bmm", "baddbmm", "addmm"}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts arithmetic while it is entered: ``matmul`` in multiply-adds times two, ``other`` by
    kind. Copies, casts, selections and comparisons are not arithmetic and are not counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.matmul = 0
        self.other: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result  # of positions and masks
        name = function.overloadpacket.__name__.rstrip("_")
        if name in MATMULS:
            left, right = [a for a in args if isinstance(a, Tensor)][-2:]
            self.matmul += 2 * left.numel() * right.shape[-1]
        elif name in POINTWISE:
            self.other[name] += result.numel()
        elif name in REDUCTIONS:
            self.other[name] += args[0].numel()
        return result
