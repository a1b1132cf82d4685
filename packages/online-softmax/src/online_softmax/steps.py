"""The steps from standard attention to FlashAttention, by name, each ready to be called.

A step runs an algorithm on every sequence of a problem; it is differentiable where the algorithm
has a backward pass. ``STEPS`` is in the order of the story.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_reference.inputs import Attention, Inputs, output_shape
from attn_reference.precision import EAGER, FLASH, FLASH_FP32_P, Precision
from attn_reference.problem import GRADIENT_NAMES, Problem
from attn_reference.rounding import full_fp32_products
from attn_reference.sequences import Sequence, cut, sequences
from attn_reference.validation import validate

from . import per_row, ring, split_kv, standard, tiled_v1, tiled_v2
from .gradients import Backward
from .memory import Memory
from .operands import Operands

BLOCK_Q, BLOCK_K, SPLITS, RANKS = 64, 64, 4, 4
FEW_KEYS = 16  # at a time, where the papers take one: 70,000 keys are not to take minutes
Saved = list[tuple[Any, ...]]  # by sequence: what forward leaves in HBM for backward


@dataclass(frozen=True, kw_only=True)
class Step:
    """One algorithm. ``forward(operands)`` gives out, lse and what ``backward`` takes besides."""

    name: str
    title: str
    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., None] | None = None
    precision: Precision = FLASH

    def attention(
        self, inputs: Inputs, problem: Problem, memory: Memory | None = None
    ) -> Attention:
        """out and lse, in canonical shapes, differentiable in q, k, v, bias and sinks where the
        algorithm has a backward pass. Accesses to HBM are counted in ``memory``, if given.

        Raises ValueError when the inputs do not fit the problem.
        """
        validate(inputs, problem)
        memory = Memory() if memory is None else memory
        tensors = [getattr(inputs, name) for name in GRADIENT_NAMES]
        out, lse = _Attention.apply(*tensors, inputs, problem, self, memory)  # type: ignore[no-untyped-call]
        return Attention(out=out, lse=lse, keep_mask=inputs.keep_mask)


STEPS = {
    step.name: step
    for step in (
        Step(
            name="standard",
            title="Standard attention: S and P in HBM",
            forward=standard.forward,
            backward=standard.backward,
            precision=EAGER,
        ),
        Step(
            name="two-pass",
            title="Online softmax, then the values: two passes over the keys",
            forward=partial(per_row.two_pass, block_k=FEW_KEYS),
            precision=FLASH_FP32_P,
        ),
        Step(
            name="one-pass",
            title="Values rescaled as the maximum rises: one pass",
            forward=partial(per_row.one_pass, block_k=FEW_KEYS),
            precision=FLASH_FP32_P,
        ),
        Step(
            name="tiled-v1",
            title="FlashAttention V1: outer loop over K and V",
            forward=partial(tiled_v1.forward, block_q=BLOCK_Q, block_k=BLOCK_K),
            backward=partial(tiled_v1.backward, block_q=BLOCK_Q, block_k=BLOCK_K),
        ),
        Step(
            name="tiled-v2",
            title="FlashAttention V2: outer loop over Q, one rescale",
            forward=partial(tiled_v2.forward, block_q=BLOCK_Q, block_k=BLOCK_K),
            backward=partial(tiled_v2.backward, block_q=BLOCK_Q, block_k=BLOCK_K),
        ),
        Step(
            name="split-kv",
            title="Split-KV: the keys shared out, the parts merged",
            forward=partial(split_kv.forward, splits=SPLITS, block_q=BLOCK_Q, block_k=BLOCK_K),
        ),
        Step(
            name="ring",
            title="Ring attention: the keys passed around 4 ranks, zig-zag",
            forward=partial(ring.forward, ranks=RANKS, block_q=BLOCK_Q, block_k=BLOCK_K),
            backward=partial(ring.backward, ranks=RANKS, block_q=BLOCK_Q, block_k=BLOCK_K),
        ),
    )
}


class _Attention(torch.autograd.Function):
    """(q, k, v, bias, sinks, inputs, problem, step, memory) -> (out, lse)."""

    @staticmethod
    @full_fp32_products()
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        inputs: Inputs,
        problem: Problem,
        step: Step,
        memory: Memory,
    ) -> tuple[Tensor, Tensor]:
        shape = output_shape(problem)
        out = torch.zeros(shape, dtype=q.dtype, device=q.device)
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.full(shape[:-1], -torch.inf, dtype=lse_dtype, device=q.device)
        plain = replace(inputs, q=q, k=k, v=v, bias=bias, sinks=sinks)
        saved: Saved = []
        for sequence in sequences(plain, problem):
            found, found_lse, *left = step.forward(Operands(sequence, problem, memory))
            out[sequence.rows] = found.data.flatten(0, 1).to(q.dtype)
            lse[sequence.rows] = found_lse.data.flatten(0, 1)
            saved.append(tuple(left))
        needed = zip(GRADIENT_NAMES, ctx.needs_input_grad, strict=False)
        ctx.problem = problem.replace(
            gradients=tuple(name for name, need in needed if need), lse_gradient=True
        )
        ctx.inputs, ctx.step, ctx.memory, ctx.saved = inputs, step, memory, saved
        # Saved through autograd, which then notices when one of them is changed in place.
        others = (inputs.mask, inputs.alibi_slopes, inputs.keep_mask, inputs.page_table)
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse, *others)
        return out, lse

    @staticmethod
    @once_differentiable
    @full_fp32_products()
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, sinks, out, lse, *_ = ctx.saved_tensors
        problem, step = ctx.problem, ctx.step
        if step.backward is None:
            raise NotImplementedError(f"{step.name} has no backward pass")
        inputs = replace(
            ctx.inputs, q=q, k=k, v=v, bias=bias, sinks=sinks, grad_out=grad_out, grad_lse=grad_lse
        )
        wide = lse.dtype
        totals = {
            name: torch.zeros(tensor.shape, dtype=wide, device=tensor.device)
            for name, tensor in zip(GRADIENT_NAMES, (q, k, v, bias, sinks), strict=True)
            if name in problem.gradients
        }
        for sequence, saved in zip(sequences(inputs, problem), ctx.saved, strict=True):
            x = Operands(sequence, problem, ctx.memory)
            g = Backward(x, Attention(out=out, lse=lse))
            step.backward(x, g, *saved)
            collect(totals, sequence, g)
        named = zip(GRADIENT_NAMES, (q, k, v, bias, sinks), strict=True)
        found = (totals[n].to(t.dtype) if n in totals else None for n, t in named)
        return (*found, None, None, None, None)


def collect(totals: dict[str, Tensor], sequence: Sequence, g: Backward) -> None:
    """Bring the gradients of one sequence to where they belong in the whole."""
    if "q" in totals:
        totals["q"][sequence.rows] = g.dq.data.flatten(0, 1)
    if "k" in totals:
        totals["k"][sequence.keys] = g.dk.data[:, 0]
    if "v" in totals:
        totals["v"][sequence.keys] = g.dv.data[:, 0]
    if g.dbias is not None:
        part = cut(totals["bias"], sequence.block)
        assert part is not None
        part += g.dbias.data.flatten(0, 1)
    if g.dsinks is not None:
        totals["sinks"] += g.dsinks.flatten()
