"""One call of a backend: the inputs as it gets them, its answer, the gradients through it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attn_reference.inputs import Attention, Inputs, output_shape

from ..backend import Backend, Capabilities
from ..layout import expanded_shape
from ..plan import Call
from .returned import not_plain, shared_memory

LN_2 = math.log(2.0)
# A result may be this many times as large as all of them should be, for the judge to see it.
RESULT_FACTOR = 16
RESULT_FLOOR = 1 << 26

# Taken before any target is loaded: code that patches it does not reach this.
_grad = torch.autograd.grad


@dataclass(kw_only=True)
class Computed:
    """What one call gave, not yet looked at; gradients by the name of their input."""

    attention: object
    gradients: dict[str, Tensor] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def named(self) -> Iterator[tuple[str, object]]:
        """What came back: "out", "lse", "keep_mask", "dq" …; nothing if it is no Attention."""
        if type(self.attention) is not Attention:
            return
        yield "out", self.attention.out
        for name in ("lse", "keep_mask"):
            if (value := getattr(self.attention, name)) is not None:
                yield name, value
        for name, gradient in self.gradients.items():
            yield f"d{name}", gradient


def require_gradients(call: Call) -> Inputs:
    """The inputs of a call as leaves, those whose gradients are asked for requiring them."""
    leaves = replace(call.inputs)
    for name in call.problem.gradients:
        getattr(leaves, name).requires_grad_()
    return leaves


def compute(call: Call, leaves: Inputs, backend: Backend, device: str) -> Computed:
    """Call the backend, and take the gradients that the problem names through autograd.

    Raises whatever the backend raises.
    """
    computed = Computed(attention=backend.attention(_expanded(leaves, call), call.problem))
    attention = computed.attention
    if not call.problem.gradients or type(attention) is not Attention:
        return computed
    if not_plain(attention.out, device) or attention.out.shape != _required(leaves.grad_out).shape:
        return computed  # there is a complaint about the one, and the judge reports the other
    if not attention.out.requires_grad:
        computed.complaints.append("out does not require grad: no gradient goes through it")
        return computed
    outputs, incoming = [attention.out], [_required(leaves.grad_out)]
    lse = attention.lse
    if call.problem.lse_gradient and lse is not None and not not_plain(lse, device):
        if lse.requires_grad:
            outputs.append(lse)
            incoming.append(_for_lse(lse, _required(leaves.grad_lse), backend.capabilities))
        else:
            computed.complaints.append("lse does not require grad: no gradient goes through it")
    wanted = [getattr(leaves, name) for name in call.problem.gradients]
    # An input that the answer does not depend on has the gradient zero.
    taken = _grad(outputs, wanted, incoming, allow_unused=True, materialize_grads=True)
    computed.gradients = dict(zip(call.problem.gradients, taken, strict=True))
    return computed


def borrowed_memory(live: dict[str, Tensor], inputs: Inputs) -> Iterator[str]:
    """Sentences for results that lie in the memory of an input."""
    given = inputs.tensors()
    own = {n: t for n, t in given.items() if n not in ("grad_out", "grad_lse")}
    outputs = {n: t for n, t in live.items() if n in ("out", "lse", "keep_mask")}
    gradients = {n: t for n, t in live.items() if n not in outputs}
    yield from shared_memory(outputs, given.items())
    # A gradient may be the one that came in: autograd hands that on where the two agree.
    yield from shared_memory(gradients, own.items())


def result_bytes(call: Call) -> int:
    """About what a call allocates for its results."""
    out = math.prod(output_shape(call.problem)) * call.problem.torch_dtype.itemsize
    return out + sum(int(getattr(call.inputs, n).nbytes) for n in call.problem.gradients)


def result_limit(call: Call) -> int:
    """Bytes above which one returned tensor is not looked at: an expanded one costs nothing."""
    return RESULT_FLOOR + RESULT_FACTOR * result_bytes(call)


def _expanded(leaves: Inputs, call: Call) -> Inputs:
    """The inputs with mask and bias expanded where their layout says so. A bias expanded is
    no leaf: its gradient comes in the shape that the bias is stored in."""
    changes: dict[str, Tensor] = {}
    for name, tensor in leaves.tensors().items():
        if (shape := expanded_shape(call.problem, name)) is not None:
            changes[name] = tensor.expand(shape)
    return replace(leaves, **changes)


def _for_lse(lse: Tensor, grad_lse: Tensor, capabilities: Capabilities) -> Tensor:
    """The gradient of the natural (B, H, S) LSE, turned into that of the declared kind."""
    if capabilities.lse_layout == "bsh":
        grad_lse = grad_lse.transpose(1, 2)
    if capabilities.lse_base == "2":
        grad_lse = grad_lse * LN_2  # lse = ln 2 · lse₂
    return grad_lse.to(lse.dtype)


def _required(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("inputs: a problem with gradients needs grad_out (and grad_lse)")
    return tensor
