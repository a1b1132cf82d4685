"""One measurement of the calibration: a random problem, a kernel, and how much room was left."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from attn_reference.inputs import Gradients, Inputs
from attn_reference.precision import Precision
from attn_reference.problem import Problem

from ..budget.expectation import Expected, expectation
from ..budget.expected import compare
from ..inputs.make import make_inputs, make_keep_mask
from ..judge.form import given
from ..judge.judging import compare_values
from ..plan import Call, CallResult
from ..verdict import Status
from ..worker.calling import compute, require_gradients
from .kernels import Kernel

# A term's room is measured where it gives at least this share of the bound.
DOMINANT = 0.5


@dataclass(kw_only=True)
class Measurement:
    """What one problem told.

    ``status`` is conforms, deviates, vacuous, skipped, raised, crashed or timed out.
    """

    kernel: str
    device: str
    instructions: str  # instruction set of the CPU, or name of the GPU
    dtype: str
    index: int
    problem: str
    status: str
    reason: str = ""
    worst: dict[str, float] = field(default_factory=dict)  # error over bound, by tensor
    rules: list[str] = field(default_factory=list)  # that were broken: "dv bound", …
    # Largest error over bound where a term dominates, by tensor and term.
    room: dict[str, dict[str, float]] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)  # value over limit
    values: dict[str, float] = field(default_factory=dict)  # the statistics themselves

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What makes two measurements the same."""
        return self.kernel, self.device, self.instructions, self.dtype, self.index

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of ``as_dict``."""
        return cls(**values)


def instructions(device: str) -> str:
    """The instruction set that torch uses on this CPU, or the name of the GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return str(torch.backends.cpu.get_cpu_capability()).lower()


def measure(
    name: str, kernel: Kernel, problem: Problem, index: int, device: str, precision: Precision
) -> Measurement:
    """Run the kernel on one problem and judge it; what the kernel raises is part of the result."""
    result = Measurement(
        kernel=name,
        device=device,
        instructions=instructions(device),
        dtype=problem.dtype,
        index=index,
        problem=problem.id,
        status="raised",
    )
    inputs = _on(device, problem)
    # Made first: to require gradients changes the tensors that both are computed from.
    try:
        called = _call(kernel, problem, inputs, device)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        result.reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return result
    _judge(result, kernel, problem, inputs, called, precision)
    return result


def _on(device: str, problem: Problem) -> Inputs:
    """The inputs on the device, and a keep_mask for targets that take one."""
    inputs = make_inputs(problem)
    if problem.dropout:
        inputs.keep_mask = make_keep_mask(problem)
    return Inputs(**{name: tensor.to(device) for name, tensor in inputs.tensors().items()})


def _call(kernel: Kernel, problem: Problem, inputs: Inputs, device: str) -> CallResult:
    torch.manual_seed(problem.seed)  # what dropout drops
    call = Call(problem=problem, inputs=inputs)
    leaves = Inputs(**{name: t.clone() for name, t in inputs.tensors().items()})
    leaves = require_gradients(replace(call, inputs=leaves))
    computed = compute(call, leaves, kernel.backend, device)
    return CallResult(
        attention=computed.attention,  # type: ignore[arg-type]
        gradients=Gradients(**computed.gradients),
        complaints=computed.complaints,
    )


def _judge(
    result: Measurement,
    kernel: Kernel,
    problem: Problem,
    inputs: Inputs,
    called: CallResult,
    precision: Precision,
) -> None:
    capabilities = kernel.backend.capabilities
    came = given(problem, inputs, called, capabilities)
    expected = expectation(problem, came.inputs, precision, terms=True)
    if not kernel.empty_rows and bool((expected["lse"].value == -math.inf).any()):
        result.status, result.reason = "skipped", "has rows without a visible key"
        return
    verdict = compare_values(problem, came, expected, precision, capabilities)
    findings = came.findings + verdict.findings
    status = Status.DEVIATES if findings else verdict.status
    result.status = str(status)
    result.reason = "; ".join([f.message for f in findings] or [verdict.reason])
    result.rules = [f"{f.tensor} {f.rule}" for f in findings]
    result.worst = {name: worst for name, worst in verdict.worst.items() if math.isfinite(worst)}
    for name in ("z_row", "z_max", "z_global"):
        if name in verdict.statistics:
            result.values[name] = verdict.statistics[name]
            result.statistics[name] = verdict.statistics[name] / verdict.statistics[f"{name}_limit"]
    for name, actual in came.tensors.items():
        result.room[name] = _room(expected[name], actual)


def _room(expected: Expected, actual: Tensor) -> dict[str, float]:
    """The largest error over bound among the elements in which each term dominates."""
    comparison = compare(expected, actual)
    judged = expected.bound.isfinite() & (expected.bound > 0) & comparison.ratio.isfinite()
    room: dict[str, float] = {}
    for name, term in expected.terms.items():
        dominated = judged & (term >= DOMINANT * expected.bound)
        worst = comparison.ratio.masked_fill(~dominated, -1.0)
        largest = worst.max().item() if worst.numel() else -1.0
        if largest >= 0:
            room[name] = largest
    return room
