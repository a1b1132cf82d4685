"""V2 as operators of torch, ``torch.ops.triton_attention``, for graphs: torch.compile and export.

    attention(q, k, v, …) -> (out, lse)
    attention_backward(grad_out, grad_lse, out, lse, wanted, q, k, v, …) -> gradients
    keep_mask(q, k, v, …) -> bool (B, Hq, Sq, Sk)

The arguments are those of ``triton_attention.attention``, checked when an operator runs, with three
differences. Tensors come first, in the order of ``TENSORS``, all else by keyword. A window is
``window_left`` and ``window_right``. Dropout takes its ``seed``, int64 (1,): an operator is a
function of its arguments, and gives the same bits every time. There is no ``mask_rule``, since no
schema takes a function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import passes
from .arguments import TENSORS, Arguments
from .passes import DIFFERENTIABLE

_INPUTS = ", ".join(
    [f"Tensor {name}" for name in TENSORS[:3]]
    + [f"Tensor? {name}=None" for name in (*TENSORS[3:], "seed")]
)
_OPTIONS = (
    'float? scale=None, str causal="none", SymInt? window_left=None, SymInt? window_right=None, '
    "float softcap=0.0, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, float dropout_p=0.0"
)
_BEFORE = "Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool[] wanted"


@torch.library.custom_op(
    "triton_attention::attention",
    mutates_args=(),
    schema=f"({_INPUTS}, *, {_OPTIONS}, SymInt? num_splits=None) -> (Tensor, Tensor)",
)
def attention(
    *tensors: Tensor | None, num_splits: int | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq)."""
    return passes.forward(*_read(tensors, options), num_splits)


@torch.library.custom_op(
    "triton_attention::attention_backward",
    mutates_args=(),
    schema=f"({_BEFORE}, {_INPUTS}, *, {_OPTIONS}) -> Tensor[]",
)
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: Sequence[bool],
    *tensors: Tensor | None,
    **options: Any,
) -> list[Tensor]:
    """The gradients of those ``DIFFERENTIABLE`` that are ``wanted``, in their order."""
    x, seed = _read(tensors, options)
    found = passes.backward(x, seed, out, lse, grad_out, grad_lse, _names(wanted))
    return list(found.values())


@torch.library.custom_op(
    "triton_attention::keep_mask",
    mutates_args=(),
    schema=f"({_INPUTS}, *, {_OPTIONS}) -> Tensor",
)
def keep_mask(*tensors: Tensor | None, **options: Any) -> Tensor:
    """What dropout keeps, bool (B, Hq, Sq, Sk)."""
    x, seed = _read(tensors, options)
    if seed is None or not x.dropout_p:
        raise ValueError(f"dropout_p={x.dropout_p}: accepted is more than 0, with a seed")
    return passes.keep_mask(x, seed)


def _read(
    tensors: Sequence[Tensor | None], options: Mapping[str, Any]
) -> tuple[Arguments, Tensor | None]:
    """Arguments and seed; the dispatcher leaves out what has its default."""
    given = dict(zip((*TENSORS, "seed"), tensors, strict=False))
    seed = given.pop("seed", None)
    rest = dict(options)
    window = (rest.pop("window_left", None), rest.pop("window_right", None))
    x = Arguments(**given, **rest, window=None if window == (None, None) else window)  # type: ignore[arg-type]
    if x.dropout_p and seed is None:
        raise ValueError("seed is None: accepted with dropout_p is its seed, int64 (1,)")
    return x, seed


def _names(wanted: Sequence[bool]) -> set[str]:
    return {name for name, flag in zip(DIFFERENTIABLE, wanted, strict=True) if flag}


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    rows = q.shape[:3]
    return q.new_empty((*rows, v.shape[3])), q.new_empty(rows, dtype=torch.float32)


@attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: Sequence[bool],
    *tensors: Tensor | None,
    **options: Any,
) -> list[Tensor]:
    given = dict(zip(TENSORS, tensors, strict=False))
    names = (name for name in DIFFERENTIABLE if name in _names(wanted))
    return [torch.empty_like(given[name]) for name in names]  # type: ignore[arg-type]


@keep_mask.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor | None, **options: Any) -> Tensor:
    table = dict(zip(TENSORS[3:], tensors, strict=False)).get("page_table")
    keys = k.shape[2] if table is None else table.shape[1] * k.shape[2]
    return q.new_empty((*q.shape[:3], keys), dtype=torch.bool)


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> None:
    # What has its default was left out, and is none that needs a gradient.
    needed = dict.fromkeys(TENSORS, False) | dict(zip(TENSORS, ctx.needs_input_grad, strict=False))
    if needed["alibi_slopes"]:
        raise ValueError(
            "alibi_slopes requires a gradient, and has none: accepted is one that is detached"
        )
    ctx.set_materialize_grads(False)
    ctx.options = {n: value for n, value in keyword_only_inputs.items() if n != "num_splits"}
    ctx.wanted = [needed[name] for name in DIFFERENTIABLE]
    ctx.save_for_backward(*output, *inputs)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    names = _names(ctx.wanted)
    passes.refuse_gradients(dict(zip(TENSORS, tensors, strict=False))["page_table"], names)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    found = iter(
        attention_backward(grad_out, grad_lse, out, lse, ctx.wanted, *tensors, **ctx.options)
    )
    return tuple(next(found) if name in names else None for name in (*TENSORS, "seed"))


attention.register_autograd(_backward, setup_context=_setup_context)
