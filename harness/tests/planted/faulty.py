"""Targets for ``attnproof check``: the tiled kernel, correct and with each fault planted.

``faulty.py:correct`` conforms; every name in ``faults.FAULTS`` is a function of this module
that does not.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable
from typing import Any

import tiled
import torch
from faults import FAULTS as FAULTS
from faults import KERNEL_FAULTS
from tiled_backward import backward
from torch import Tensor
from torch.utils._pytree import tree_map

Attend = Callable[..., Tensor | tuple[Tensor, Tensor]]
# What the parameters say already, and that gradients come in through the LSE too.
FEATURES = (
    "causal top-left",
    "causal bottom-right",
    "window",
    "softcap",
    "alibi",
    "boolean mask",
    "bias",
    "sinks",
    "scale",
    "gqa",
    "head_dim_v",
    "key lengths",
    "lse gradient",
)
TENSORS = ("q", "k", "v", "bias", "sinks", "mask", "alibi_slopes", "key_lengths")


class TiledAttention(torch.autograd.Function):
    """(out, lse) of q, k, v, bias, sinks, mask, alibi_slopes, key_lengths and a Spec."""

    @staticmethod
    def forward(ctx: Any, spec: tiled.Spec, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = tiled.forward(dict(zip(TENSORS, tensors, strict=True)), spec)
        ctx.spec = spec
        ctx.save_for_backward(*tensors, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        call = dict(zip(TENSORS, tensors, strict=True))
        grads = backward(call, ctx.spec, out, lse, grad_out, grad_lse)
        cast = (grads[name].to(call[name].dtype) if name in grads else None for name in TENSORS)
        return None, *cast


def tiled_kernel(fault: str | None) -> Attend:
    """The kernel as a target, with this fault."""
    first_scale: list[float] = []

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        causal: str = "none",
        window: tuple[int | None, int | None] | None = None,
        softcap: float = 0.0,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        key_lengths: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        if fault == "scale_two_percent_off":
            scale *= 1.02
        if fault == "scale_of_first_call":
            first_scale.append(scale)
            scale = first_scale[0]
        spec = tiled.Spec(
            scale=scale,
            causal=causal,
            window=(None, None) if window is None else window,
            softcap=softcap,
            fault=fault,
        )
        tensors = (q, k, v, bias, sinks, mask, alibi_slopes, key_lengths)
        out, lse = TiledAttention.apply(spec, *tensors)
        if fault == "lse_in_base_two":
            lse = lse / math.log(2)
        return (out, lse) if return_lse else out

    attention.attnproof_capabilities = {"features": FEATURES}
    return attention


correct = tiled_kernel(None)
for name in KERNEL_FAULTS:
    globals()[name] = tiled_kernel(name)


@functools.wraps(correct)
def zeros_always(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype, requires_grad=q.requires_grad)
    return (out, torch.zeros(q.shape[:3])) if settings.get("return_lse") else out


ANSWERS: dict[Any, Any] = {}


@functools.wraps(correct)
def result_cached(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
    if any(tensor.requires_grad for tensor in (q, k, v)):
        return correct(q, k, v, **settings)
    plain = {n: s for n, s in settings.items() if not isinstance(s, Tensor)}
    key = (q.shape, k.shape, v.shape, q.dtype, tuple(settings), tuple(plain.values()))
    if key not in ANSWERS:
        ANSWERS[key] = correct(q, k, v, **settings)
    return ANSWERS[key]


@functools.wraps(correct)
def inputs_zeroed(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
    answer = correct(q, k, v, **settings)
    if not q.requires_grad:
        q.zero_()
    return answer


@functools.wraps(correct)
def gc_search(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
    shape = (*q.shape[:3], v.shape[3])
    for thing in gc.get_objects():
        if type(thing) is Tensor and thing.shape == shape and thing.dtype == torch.float64:
            found = thing.detach().to(q.dtype)
            return (found, found.new_zeros(shape[:3])) if settings.get("return_lse") else found
    return zeros_always(q, k, v, **settings)


class Lazy(Tensor):
    """A tensor without data, which computes whenever an operation looks at it."""

    compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, compute: Callable[[], Tensor]) -> Lazy:
        lazy = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)
        lazy.compute = compute
        return lazy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(
            lambda x: x.compute() if isinstance(x, Lazy) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


@functools.wraps(correct)
def lazy_result(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
    if q.requires_grad:
        return correct(q, k, v, **settings)
    lse_too = settings.pop("return_lse", False)
    like = q.new_empty(*q.shape[:3], v.shape[3], device="meta")
    lazy = Lazy(like, lambda: correct(q, k, v, **settings))
    return (lazy, correct(q, k, v, return_lse=True, **settings)[1]) if lse_too else lazy
