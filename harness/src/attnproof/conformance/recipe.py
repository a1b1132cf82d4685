"""The input recipe: the sizes and values at which attention kernels have gone wrong.

Tiles of unknown kernels are 16 to 128 keys or queries: lengths lie at their edges, one off
them, at primes and beyond two tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_reference.masks import positional_mask
from attn_reference.problem import Problem

from .cover import problems

DTYPES = ("fp32", "fp16", "bf16")
GRADIENTS = ("q", "k", "v")


def lengths(*pairs: tuple[int, int]) -> list[Mapping[str, int]]:
    """(seqlen_q, seqlen_k) as values of one dimension."""
    return [{"seqlen_q": queries, "seqlen_k": keys} for queries, keys in pairs]


def heads(*pairs: tuple[int, int]) -> list[Mapping[str, int]]:
    """(heads_q, heads_kv) as values of one dimension."""
    return [{"heads_q": queries, "heads_kv": keys} for queries, keys in pairs]


def dims(*pairs: tuple[int, int]) -> list[Mapping[str, int]]:
    """(head_dim, head_dim_v) as values of one dimension."""
    return [{"head_dim": one, "head_dim_v": other} for one, other in pairs]


# One query, a tile exactly, a tile and one, several tiles; more queries than keys and fewer.
QUICK_LENGTHS = lengths((1, 65), (64, 64), (17, 16), (65, 127), (129, 33), (113, 257))
EDGES = (1, 2, 15, 16, 17, 33, 63, 64, 65, 113, 127, 128, 129, 257)
BATCHES = [{"batch": 1, "heads_q": 1}, {"batch": 2, "heads_q": 3}]


def each_dtype(dimensions: Mapping[str, Sequence[Any]], **base: Any) -> tuple[Problem, ...]:
    """A cover for each dtype: that a target lacks one costs nothing of the others."""
    return joined(problems(dimensions, dtype=dtype, **base) for dtype in DTYPES)


def joined(covers: Iterable[Iterable[Problem]]) -> tuple[Problem, ...]:
    """Several covers as one, each problem once."""
    return tuple(dict.fromkeys(problem for one in covers for problem in one))


def turning(values: Iterable[Mapping[str, Any]], **base: Any) -> tuple[Problem, ...]:
    """A problem for each value, the dtypes in turn where none is given."""
    return tuple(
        Problem(**{"dtype": DTYPES[n % len(DTYPES)], **base, **value})
        for n, value in enumerate(values)
    )


def in_each_dtype(chosen: Iterable[Problem], *, fewest: bool = False) -> tuple[Problem, ...]:
    """These, and repeats of some in another dtype: each set of features is met in each dtype.

    So a target with one dtype loses nothing of what its features allow. With ``fewest`` only the
    sets that contain no other one are.
    """
    given = tuple(chosen)
    sets = dict.fromkeys(frozenset(problem.features) for problem in given)
    more: list[Problem] = []
    for features in sets:
        if fewest and any(other < features for other in sets):
            continue
        alike = [problem for problem in given if set(problem.features) == features]
        missing = [dtype for dtype in DTYPES if dtype not in {p.dtype for p in alike}]
        # The last first: what stands first may be large, and chosen for its dtype.
        repeated = zip(missing, itertools.cycle(reversed(alike)), strict=False)
        more += [problem.replace(dtype=dtype) for dtype, problem in repeated]
    return joined((given, more))


def rules_hide(problem: Problem) -> bool:
    """Whether causality, its corner and the window each hide keys that are seen without."""

    def visible(**changes: Any) -> Tensor:
        rule = positional_mask(problem.replace(**changes), problem.seqlen_q, problem.keys)
        return rule.dense(problem.seqlen_q, problem.keys)

    others = []
    if problem.window is not None:
        others.append(visible(window=None))
    if problem.causal != "none":
        others.append(visible(causal="none"))
        if problem.seqlen_q != problem.keys:
            other = "bottom-right" if problem.causal == "top-left" else "top-left"
            others.append(visible(causal=other))
    seen = visible()
    return not any(torch.equal(other, seen) for other in others)
