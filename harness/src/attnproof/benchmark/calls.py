"""The calls of a target in one cell: what is made before each, what is timed, what comes back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attn_reference.inputs import Attention

from ..backend import Backend, prepared
from .clock import DeviceClock, Timed, synchronize, wall_time
from .draw import empty_inputs, fill
from .suites import Cell

ITERATIONS = {"cuda": 100, "cpu": 20}  # in a row, of a call timed by the wall clock

# Taken before any target is loaded: code that patches it does not reach this.
_grad = torch.autograd.grad


class Calls:
    """A target's calls on one cell, all on the same memory. ``backward`` times autograd alone."""

    def __init__(self, cell: Cell, backend: Backend, clock: DeviceClock) -> None:
        self.cell, self.device = cell, clock.device
        self.inputs = empty_inputs(cell.problem, self.device)
        fill(self.inputs, 0)
        self._wanted = [getattr(self.inputs, name) for name in cell.problem.gradients]
        self._attention = prepared(backend, self.inputs, cell.problem)
        self._clock = clock if cell.clock == "device" else None
        clock.reset()

    @property
    def iterations(self) -> int:
        """Calls that one number is the mean of."""
        return 1 if self._clock is not None else ITERATIONS[self.device]

    def untimed(self, seed: int) -> dict[str, Any]:
        """What a timed call does, untimed: compiles what is compiled, and fills torch's cache of
        memory."""
        returned = self._call(self._before(seed))
        synchronize(self.device)
        return returned

    def timed(self, seed: int) -> Timed[dict[str, Any]]:
        """A timed call on the inputs of that seed, and what it returned, by name."""

        def before() -> Attention | None:
            return self._before(seed)

        if self._clock is not None:
            return self._clock.time(before, self._call)
        return wall_time(self.device, before, self._call, self.iterations)

    def _before(self, seed: int) -> Attention | None:
        """Everything that is not to be timed: new inputs, and the forward pass of a backward."""
        fill(self.inputs, seed)
        return self._attention() if self.cell.direction == "backward" else None

    def _call(self, forward: Attention | None) -> dict[str, Any]:
        attention = self._attention() if forward is None else forward
        returned: dict[str, Any] = {"out": attention.out}
        if self.cell.direction != "forward":
            gradients: tuple[Tensor, ...] = _grad(attention.out, self._wanted, self.inputs.grad_out)
            for name, gradient in zip(self.cell.problem.gradients, gradients, strict=True):
                returned[f"d{name}"] = gradient
        return returned
