"""The reference as a function that autograd knows, with the closed-form backward behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backward import gradients
from .forward import attention
from .inputs import Attention, Inputs
from .precision import FLASH, Precision
from .problem import GRADIENT_NAMES, Problem


def differentiable_attention(
    inputs: Inputs, problem: Problem, precision: Precision = FLASH
) -> Attention:
    """``attention(inputs, problem, precision)``, differentiable in q, k, v, bias and sinks.

    Gradients flow in through out and through lse. What is differentiated follows
    ``requires_grad`` of the tensors; ``problem.gradients`` need not name them. fp64 problems
    are computed in fp64 whatever the precision. Raises ValueError when the inputs do not fit
    the problem, or when k or v of a paged problem require gradients.
    """
    tensors = {name: getattr(inputs, name) for name in GRADIENT_NAMES}
    plain = replace(inputs, **{name: t.detach() for name, t in tensors.items() if t is not None})
    out, lse = _Attention.apply(*tensors.values(), plain, problem, precision)  # type: ignore[no-untyped-call]
    return Attention(out=out, lse=lse, keep_mask=inputs.keep_mask)


class _Attention(torch.autograd.Function):
    """(q, k, v, bias, sinks, inputs, problem, precision) -> (out, lse)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        inputs: Inputs,
        problem: Problem,
        precision: Precision,
    ) -> tuple[Tensor, Tensor]:
        result = attention(inputs, problem, precision)
        assert result.lse is not None
        needed = zip(GRADIENT_NAMES, ctx.needs_input_grad, strict=False)
        ctx.problem = problem.replace(
            gradients=tuple(name for name, need in needed if need), lse_gradient=True
        )
        ctx.inputs, ctx.precision = inputs, precision
        # Saved through autograd, which then notices when one of them is changed in place.
        ctx.save_for_backward(q, k, v, bias, sinks, result.out, result.lse)
        return result.out, result.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        *_, out, lse = ctx.saved_tensors
        found = gradients(
            replace(ctx.inputs, grad_out=grad_out, grad_lse=grad_lse),
            ctx.problem,
            ctx.precision,
            Attention(out=out, lse=lse),
        )
        return (*(getattr(found, name) for name in GRADIENT_NAMES), None, None, None)
