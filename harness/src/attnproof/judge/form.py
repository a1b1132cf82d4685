"""Is every tensor there, of the right shape and dtype? And in the form that the judge compares."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attn_reference.inputs import Inputs, key_count, output_shape
from attn_reference.problem import Problem

from ..backend import Capabilities
from ..plan import CallResult
from ..verdict import Finding


@dataclass(kw_only=True)
class Given:
    """What came, ready to be compared."""

    tensors: dict[str, Tensor]  # out, lse, dq, …: those of the right form
    inputs: Inputs  # with what dropout kept
    dropout_unseen: bool = False  # nobody knows what was kept; all is taken to be
    findings: list[Finding] = field(default_factory=list)


def given(
    problem: Problem, inputs: Inputs, result: CallResult, capabilities: Capabilities
) -> Given:
    """Take a result apart: tensors of the right form, and a finding for every other one."""
    found = Given(tensors={}, inputs=inputs)
    _take_keep_mask(found, problem, result)
    shape = output_shape(problem)
    came = _came(problem, result, capabilities)
    floating = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    for name, tensor in came.items():
        wanted: tuple[int, ...]
        dtypes: tuple[torch.dtype, ...]
        if name == "out":
            wanted, dtypes = shape, (problem.torch_dtype,)
        elif name == "lse":  # one of 16 bits is judged by its error
            wanted, dtypes = shape[:-1], floating
        else:
            source: Tensor = getattr(inputs, name[1:])
            wanted, dtypes = tuple(source.shape), (source.dtype,)
        finding = _misfit(name, tensor, wanted, dtypes)
        if finding is not None:
            found.findings.append(finding)
        elif tensor is not None:
            found.tensors[name] = tensor.detach()
    return found


def canonical_lse(lse: Tensor, capabilities: Capabilities) -> Tensor:
    """An LSE as declared (base, order of dimensions) as the natural LSE in (B, H, S)."""
    if capabilities.lse_layout == "bsh" and lse.dim() == 3:
        lse = lse.transpose(1, 2)
    return lse.double() * math.log(2.0) if capabilities.lse_base == "2" else lse


def _came(
    problem: Problem, result: CallResult, capabilities: Capabilities
) -> dict[str, Tensor | None]:
    """What should have come, by name; None for what did not."""
    attention, gradients = result.attention, result.gradients
    came: dict[str, Tensor | None] = {"out": None if attention is None else attention.out}
    lse = None if attention is None else attention.lse
    if lse is not None or capabilities.returns_lse:
        came["lse"] = None if lse is None else canonical_lse(lse, capabilities)
    for name in problem.gradients:
        came[f"d{name}"] = None if gradients is None else getattr(gradients, name)
    return came


def _misfit(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> Finding | None:
    if tensor is None:
        return Finding(tensor=name, rule="missing", message=f"{name} is missing")
    if tuple(tensor.shape) != tuple(shape):
        text = f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}"
        return Finding(tensor=name, rule="shape", message=text)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(map(_plain, dtypes))
        text = f"{name} has dtype {_plain(tensor.dtype)}, not {wanted}"
        return Finding(tensor=name, rule="dtype", message=text)
    return None


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _take_keep_mask(found: Given, problem: Problem, result: CallResult) -> None:
    """Put what dropout kept into the inputs: what the target says, else what it was given."""
    if not problem.dropout:
        return
    kept = found.inputs.keep_mask
    returned = None if result.attention is None else result.attention.keep_mask
    if returned is not None:
        shape = (*output_shape(problem)[:-1], key_count(problem))
        misfit = _misfit("keep_mask", returned, shape, (torch.bool,))
        if misfit is None:
            kept = returned.to(found.inputs.q.device)
        else:
            found.findings.append(misfit)
    if kept is None:
        found.dropout_unseen = True
        kept = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=found.inputs.q.device)
    found.inputs = replace(found.inputs, keep_mask=kept)


def complaints(result: CallResult) -> Iterator[Finding]:
    """What the runner saw go wrong beside the numbers, as findings."""
    for text in result.complaints:
        yield Finding(tensor="inputs", rule="side effect", message=text)
