"""The order of the cases under pytest-xdist, which hands every worker a stretch of them.

Compiling is what takes long: cases for which a compiler makes the same kernel are neighbours, so
that one worker has it made, and not all of them at once.
"""

from __future__ import annotations

from attn_reference.problem import Problem

BLOCK = 128  # of FlexAttention's block masks


def kernel_key(problem: Problem) -> tuple[object, ...]:
    """What decides which kernel is compiled: what there is, and sizes only where they
    are 1 or within one block."""
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
        # Sizes of 1 are compiled in, by torch.compile and by Triton. A block mask counts blocks.
        problem.batch == 1,
        problem.heads_q == 1,
        problem.heads_kv == 1,
        problem.seqlen_q == 1,
        problem.seqlen_q <= BLOCK,
        problem.keys <= BLOCK,
        problem.layouts,  # of which a compiler learns what is aligned
    )
