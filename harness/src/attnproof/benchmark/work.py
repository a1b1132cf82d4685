"""What a cell has to compute and to move, at least: FLOPs and bytes."""

from __future__ import annotations

from attn_reference.problem import Problem

from .suites import BACKWARD, BOTH, FORWARD, Cell

# Products of a visible pair, each 2 d operations: QK^T and PV; five in backward, which has to
# compute QK^T anew (Dao 2023, section 4.1: 2.5 times forward).
PRODUCTS = {FORWARD: 2.0, BACKWARD: 5.0, BOTH: 7.0}


def visible_pairs(problem: Problem) -> int:
    """Pairs of a query and a key that it sees, in one head: of causality and windows, in closed
    form. ValueError for what hides keys otherwise."""
    if {"boolean mask", "packed", "key lengths", "paged"} & set(problem.features):
        raise ValueError(f"{problem.id}: what it hides depends on more than positions")
    queries, keys = problem.seqlen_q, problem.keys
    shift = 0 if problem.causal == "top-left" else keys - queries
    left, right = problem.window or (None, None)
    if problem.causal != "none":
        right = 0 if right is None else min(right, 0)
    first = [0 if left is None else max(0, i + shift - left) for i in range(queries)]
    last = [keys - 1 if right is None else min(keys - 1, i + shift + right) for i in range(queries)]
    return sum(max(0, b - a + 1) for a, b in zip(first, last, strict=True))


def flops(cell: Cell) -> float:
    """Operations of the products, for what the mask leaves visible; QK^T with head_dim columns and
    PV with those of v, on average."""
    problem = cell.problem
    pairs = visible_pairs(problem) * problem.batch * problem.heads_q
    return PRODUCTS[cell.direction] * (problem.head_dim + problem.value_dim) * pairs


def moved_bytes(cell: Cell) -> int:
    """Bytes that cross the bus when each tensor does so once: q, k, v and out, in fp32 the LSE, and
    in backward these, dO and three gradients."""
    p = cell.problem
    q = p.batch * p.heads_q * p.seqlen_q * p.head_dim
    k = p.batch * p.kv_heads * p.keys * p.head_dim
    v = p.batch * p.kv_heads * p.keys * p.value_dim
    out = p.batch * p.heads_q * p.seqlen_q * p.value_dim
    lse = 4 * p.batch * p.heads_q * p.seqlen_q
    size = p.torch_dtype.itemsize
    forward = size * (q + k + v + out) + lse
    backward = size * (2 * (q + k + v) + 2 * out) + lse
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[cell.direction]
