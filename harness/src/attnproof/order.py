"""The order of the cases under pytest-xdist, which hands every worker a stretch of them.

Compiling is what takes long: cases for which a compiler makes the same kernel are neighbours, so
that one worker has it made, and not all of them at once.
"""

from __future__ import annotations

from attn_reference.problem import Problem


def kernel_key(problem: Problem) -> tuple[object, ...]:
    """What decides which kernel is compiled: not lengths and numbers, but what there is."""
    left, right = problem.window or (None, None)
    return (
        problem.dtype,
        problem.head_dim,
        problem.value_dim,
        problem.gradients,
        problem.causal,
        left is not None,
        right is not None,
        bool(problem.softcap),
        problem.alibi,
        problem.mask is not None,
        problem.bias is not None,
        problem.sinks,
        bool(problem.dropout),
        problem.packed is not None,
        problem.key_lengths is not None,
        problem.page_size or 0,
        problem.group > 1,
        problem.seqlen_q == 1,
        problem.layouts,  # of which a compiler learns what is aligned
    )
