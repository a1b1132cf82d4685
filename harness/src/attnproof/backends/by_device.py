"""One name for an implementation on each device, which differ in what they take."""

from __future__ import annotations

from dataclasses import dataclass

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import Precision
from attn_reference.problem import Problem

from ..backend import Backend, Capabilities


@dataclass(frozen=True, kw_only=True)
class ByDevice:
    """A Backend that is another one on the CPU and on CUDA."""

    cpu: Backend
    cuda: Backend

    def on_device(self, device: str) -> Backend:
        """The one on 'cpu' or 'cuda'."""
        return self.cuda if device == "cuda" else self.cpu

    @property
    def name(self) -> str:
        """The name of both."""
        return self.cpu.name

    @property
    def capabilities(self) -> Capabilities:
        """Those on the CPU: ask ``on_device`` for those on a device."""
        return self.cpu.capabilities

    def precision(self, device: str) -> Precision:
        """That of the one on the device."""
        return self.on_device(device).precision(device)

    def availability(self, device: str) -> str | None:
        """None when the one on the device can run here, else the reason."""
        return self.on_device(device).availability(device)

    def attention(self, inputs: Inputs, problem: Problem) -> Attention:
        """Computed by the one on the device of the inputs."""
        return self.on_device(inputs.q.device.type).attention(inputs, problem)
