"""Launches: a kernel with its grid and arguments, to be run here or compiled for another GPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import interpreter


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel; ``options`` are num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int]

    def run(self) -> Any:
        """On the current device, or interpreted; nothing happens on an empty grid. Gives Triton's
        compiled kernel, None where none was needed."""
        if not math.prod(self.grid):
            return None
        if interpreter.enabled():
            interpreter.run(self.kernel, self.grid, self.arguments)
            return None
        return self.kernel[self.grid](**self.arguments, **self.options)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Launches in order, what they write, by name, and what else was allocated for them."""

    launches: list[Launch]
    tensors: dict[str, Tensor]
    scratch: list[Tensor] = field(default_factory=list)

    def run(self) -> dict[str, Tensor]:
        """Run the launches: what they have written."""
        for launch in self.launches:
            launch.run()
        return self.tensors


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the device of a tensor the current one. RuntimeError where Triton cannot run on it."""
    if interpreter.enabled():
        if tensor.device.type != "cpu":
            raise RuntimeError(
                f"q is on {tensor.device}: accepted is cpu where Triton interprets its kernels "
                "(TRITON_INTERPRET=1)"
            )
        return nullcontext()
    if tensor.device.type != "cuda":
        raise RuntimeError(
            f"q is on {tensor.device}: accepted is cuda, or cpu in a process that interprets "
            "Triton's kernels: set TRITON_INTERPRET=1 before Triton is imported"
        )
    return torch.cuda.device(tensor.device)
