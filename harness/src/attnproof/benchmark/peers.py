"""Targets that are measured side by side, each with what it makes of a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem

from ..backend import Backend
from ..targets import TargetSpec, load
from .suites import BACKWARD, FORWARD, Cell

DIFFERENTIABLE = ("q", "k", "v")


@dataclass(frozen=True)
class Peer:
    """A target on a device."""

    name: str
    backend: Backend
    device: str

    def refuses(self, cell: Cell) -> str | None:
        """Why it is not measured on a cell: unavailable here, or unsupported."""
        if reason := self.backend.availability(self.device):
            return reason
        reasons = self.backend.capabilities.unsupported_reasons(self._taken(cell))
        return "; ".join(reasons) or None

    def _taken(self, cell: Cell) -> Problem:
        """The problem in the words of the target: of as many queries as keys, both alignments of
        causality are the same, and a target may know but one."""
        problem = cell.judged
        if problem.causal != "none" and problem.seqlen_q == problem.keys:
            other = replace(problem, causal="top-left")
            unsupported = self.backend.capabilities.unsupported_reasons
            if unsupported(problem) and not unsupported(other):
                return other
        return problem

    def call(self, cell: Cell, inputs: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """What is timed. What comes before it, such as forward before backward, is done here."""
        problem, backend = self._taken(cell), self.backend
        tensors = {name: inputs[name].detach() for name in DIFFERENTIABLE}
        if cell.direction == FORWARD:

            def forward() -> dict[str, Tensor]:
                with torch.no_grad():
                    return {"out": backend.attention(Inputs(**tensors), problem).out}

            return forward
        leaves = [tensor.requires_grad_() for tensor in tensors.values()]
        given = Inputs(**tensors, grad_out=inputs["grad_out"])

        def both() -> dict[str, Tensor]:
            out = backend.attention(given, problem).out
            return {"out": out, **_gradients(out, leaves, inputs["grad_out"])}

        if cell.direction != BACKWARD:
            return both
        out = backend.attention(given, problem).out

        def backward() -> dict[str, Tensor]:
            return {"out": out, **_gradients(out, leaves, inputs["grad_out"])}

        return backward


def load_peer(name: str, signature: str | None, device: str) -> Peer:
    """Import a target; LoadError when it cannot be loaded."""
    return Peer(name=name, backend=load(TargetSpec(name, signature), device), device=device)


def fresh_inputs(cell: Cell, device: str, seed: int) -> dict[str, Tensor]:
    """q, k, v and, for backward, grad_out, standard normal, made on the device."""
    p = cell.problem
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return made.to(p.torch_dtype)

    inputs = {
        "q": normal(p.batch, p.heads_q, p.seqlen_q, p.head_dim),
        "k": normal(p.batch, p.kv_heads, p.keys, p.head_dim),
        "v": normal(p.batch, p.kv_heads, p.keys, p.value_dim),
    }
    if cell.direction != FORWARD:
        inputs["grad_out"] = normal(p.batch, p.heads_q, p.seqlen_q, p.value_dim)
    return inputs


def _gradients(out: Tensor, leaves: list[Tensor], grad_out: Tensor) -> dict[str, Any]:
    found = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    return {f"d{name}": tensor for name, tensor in zip(DIFFERENTIABLE, found, strict=True)}
