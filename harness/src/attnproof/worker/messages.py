"""The plan that is sent to the process of a target, and its answer, as JSON and raw bytes.

The parent believes no header: every field of an answer is checked against what was asked for
before a byte of memory is set aside for it, and whatever does not fit is a
``ProtocolError``, which costs the case.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_reference.inputs import Attention, Gradients, Inputs
from attn_reference.problem import GRADIENT_NAMES, Problem

from ..plan import Call, CallResult, Outcome, Plan, Surroundings
from . import returned
from .calling import result_limit
from .protocol import TEXT_LIMIT, Channel, Header, ProtocolError, clean

COMPLAINTS_LIMIT = 200
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in returned.DTYPES}
ATTENTION_NAMES = ("out", "lse", "keep_mask")
ROLES = (*ATTENTION_NAMES, *(f"d{name}" for name in GRADIENT_NAMES))
MAX_DIMENSIONS = 8


def plan_header(plan: Plan) -> Header:
    """A plan without its tensors, which travel in the arena."""
    return {
        "surroundings": str(plan.surroundings),
        "canary_allocations": plan.canary_allocations,
        "invalid": plan.invalid,
        "threads": plan.threads,
        "calls": [
            {
                "problem": call.problem.id,
                "side_stream": call.side_stream,
                "graph_replay": call.graph_replay,
            }
            for call in plan.calls
        ],
    }


def plan_of(header: Header, inputs: Sequence[Inputs]) -> Plan:
    """The plan of a header, on these inputs."""
    calls = [
        Call(**{**call, "problem": Problem.from_id(call["problem"]), "inputs": given})
        for call, given in zip(header["calls"], inputs, strict=True)
    ]
    surroundings = Surroundings(header["surroundings"])
    return Plan(**{**header, "surroundings": surroundings, "calls": calls})


def results_header(results: Sequence[CallResult]) -> tuple[list[Header], list[memoryview]]:
    """The results of a plan as headers, and their bytes in the order of the headers."""
    headers, payload = [], []
    for result in results:
        tensors = []
        for role, tensor in _tensors(result):
            dtype = str(tensor.dtype).removeprefix("torch.")
            tensors.append({"role": role, "dtype": dtype, "shape": list(tensor.shape)})
            payload.append(bytes_of(tensor).data)
        headers.append(
            {
                "unsupported": result.unsupported,
                "raised": result.raised,
                "traceback": result.traceback,
                "complaints": [c[:TEXT_LIMIT] for c in result.complaints[:COMPLAINTS_LIMIT]],
                "out_strides": result.out_strides,
                "seconds": result.seconds,
                "tensors": tensors,
            }
        )
    return headers, payload


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous tensor."""
    raw: NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return raw


def _tensors(result: CallResult) -> Iterator[tuple[str, Tensor]]:
    if result.attention is not None:
        for name in ATTENTION_NAMES:
            if (tensor := getattr(result.attention, name)) is not None:
                yield name, tensor
    if result.gradients is not None:
        for name, tensor in result.gradients.tensors().items():
            yield f"d{name}", tensor


def read_results(headers: object, plan: Plan, channel: Channel) -> list[CallResult]:
    """The results that a reply announces, their bytes read; ProtocolError if they do not fit."""
    expect = _Fields("results")
    announced = expect.list_of(headers, dict, len(plan.calls), "results")
    room = sum(len(ROLES) * result_limit(call) for call in plan.calls)
    results, awaited = [], []
    for header in announced:
        tensors: dict[str, Tensor] = {}
        for one in expect.list_of(header.get("tensors"), dict, len(ROLES), "tensors"):
            role, tensor, room = _announced(one, room)
            if role in tensors:
                raise ProtocolError(f"two tensors called {role}")
            tensors[role] = tensor
            awaited.append(tensor)
        results.append(_result(header, tensors, expect))
    for tensor in awaited:
        raw = bytes_of(tensor)
        channel.receive_into(raw.data)
        if tensor.dtype == torch.bool:
            np.not_equal(raw, 0, out=raw.view(np.bool_))  # any other byte is no bool
    return results


def _announced(header: Header, room: int) -> tuple[str, Tensor, int]:
    """Memory for one announced tensor, and how many more bytes the reply may announce."""
    role, dtype, shape = header.get("role"), header.get("dtype"), header.get("shape")
    if role not in ROLES:
        raise ProtocolError(f"a tensor called {clean(repr(role), 80)}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ProtocolError(f"{role} of dtype {clean(repr(dtype), 80)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(n) is int and n >= 0 for n in shape)
    ):
        raise ProtocolError(f"{role} of shape {clean(repr(shape), 80)}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if nbytes > room:
        raise ProtocolError(f"{role} of shape {shape}: more bytes than any answer has")
    try:
        return role, torch.empty(shape, dtype=DTYPES[dtype]), room - nbytes
    except (RuntimeError, TypeError):  # sizes beyond 64 bits, beside a 0
        raise ProtocolError(f"{role} of shape {clean(repr(shape), 80)}") from None


def _result(header: Header, tensors: dict[str, Tensor], expect: _Fields) -> CallResult:
    attention = None
    if "out" in tensors:
        attention = Attention(**{n: tensors[n] for n in ATTENTION_NAMES if n in tensors})
    gradients = {n: t for n in GRADIENT_NAMES if (t := tensors.get(f"d{n}")) is not None}
    strides = header.get("out_strides")
    if strides is not None:
        strides = tuple(expect.list_of(strides, int, MAX_DIMENSIONS, "out_strides"))
    seconds = header.get("seconds")
    if not isinstance(seconds, float) or not math.isfinite(seconds):
        raise ProtocolError("seconds that are no number")
    complaints = expect.list_of(header.get("complaints"), str, COMPLAINTS_LIMIT, "complaints")
    return CallResult(
        attention=attention,
        gradients=Gradients(**gradients) if gradients else None,
        unsupported=expect.text(header, "unsupported"),
        raised=expect.text(header, "raised"),
        traceback=expect.text(header, "traceback") or "",
        complaints=[clean(c) for c in complaints],
        out_strides=strides,
        seconds=seconds,
    )


def read_outcome(header: Header) -> tuple[Outcome, str]:
    """How the plan ended and why, of a reply."""
    expect = _Fields("reply")
    said = header.get("outcome")
    if said not in (Outcome.ANSWERED, Outcome.CRASHED, Outcome.OUT_OF_MEMORY):
        raise ProtocolError(f"outcome {clean(repr(said), 80)}")
    return Outcome(said), expect.text(header, "reason") or ""


class _Fields:
    """Fields of untrusted headers, each of the type and size that it must have."""

    def __init__(self, what: str) -> None:
        self._what = what

    def text(self, header: Header, name: str) -> str | None:
        value = header.get(name)
        if value is not None and not isinstance(value, str):
            raise ProtocolError(f"{self._what}: {name} is no text")
        return None if value is None else clean(value)

    def list_of(self, value: object, kind: type, limit: int, name: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > limit:
            raise ProtocolError(f"{self._what}: {name} is no list of at most {limit}")
        if not all(type(item) is kind for item in value):
            raise ProtocolError(f"{self._what}: {name} holds something else than {kind.__name__}")
        return value
