"""Random inputs, drawn on the device: fresh ones for every timed call, in the same memory.

``inputs.make`` draws the same bits on every machine, which takes minutes for 64k keys. These are
the same in every process on one device: each target gets them, and the judge draws them again.
"""

from __future__ import annotations

import torch

from attn_reference.inputs import Inputs, output_shape
from attn_reference.problem import Problem

PLAIN = frozenset(
    {
        "causal top-left",
        "causal bottom-right",
        "window",
        "softcap",
        "scale",
        "gqa",
        "head_dim_v",
        "gradients",
    }
)


def empty_inputs(problem: Problem, device: str) -> Inputs:
    """Memory for q, k, v and, with gradients, grad_out; those with a gradient require it.

    ValueError for a problem that has further tensors, or other distributions than N(0, 1).
    """
    if more := set(problem.features) - PLAIN:
        raise ValueError(f"{problem.id}: {', '.join(sorted(more))}: nothing draws its inputs")
    if problem.distribution != "normal":
        raise ValueError(f"distribution={problem.distribution!r}: accepted is normal")
    batch, heads, rows, value_dim = output_shape(problem)

    def empty(heads: int, rows: int, columns: int) -> torch.Tensor:
        return torch.empty((batch, heads, rows, columns), dtype=problem.torch_dtype, device=device)

    inputs = Inputs(
        q=empty(heads, rows, problem.head_dim),
        k=empty(problem.kv_heads, problem.keys, problem.head_dim),
        v=empty(problem.kv_heads, problem.keys, value_dim),
    )
    for name in problem.gradients:
        getattr(inputs, name).requires_grad_()
    if problem.gradients:
        inputs.grad_out = empty(heads, rows, value_dim)
    return inputs


@torch.no_grad()
def fill(inputs: Inputs, seed: int) -> None:
    """Put new numbers into the tensors. Never zeros: those take less power, hence less time."""
    generator = torch.Generator(inputs.q.device).manual_seed(seed)
    for tensor in inputs.tensors().values():
        tensor.normal_(generator=generator)


def drawn(problem: Problem, seed: int, device: str) -> Inputs:
    """The inputs of that seed."""
    inputs = empty_inputs(problem, device)
    fill(inputs, seed)
    for tensor in inputs.tensors().values():
        tensor.requires_grad_(False)
    return inputs
