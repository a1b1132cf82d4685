"""Dropout: what was kept is scaled by 1 / (1 - p), the same in the backward, and differs from
call to call.

The target says what it kept, or it is read out of its answers; everything else follows.
"""

import math
from dataclasses import replace

from attn_reference.problem import Problem

from ..cases import cases
from ..plan import Call, Plan
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, GRADIENTS, heads, in_each_dtype, lengths, turning
from .requirements import require_keep_mask

SIGMAS = 6.0  # of the binomial distribution: one false alarm in 500 million


@cases(
    quick=in_each_dtype(
        turning(
            (
                {"dropout": 0.1},
                {"dropout": 0.5, "causal": "top-left"},
                {"dropout": 0.5, "causal": "bottom-right"},
                {"dropout": 0.25, "gradients": GRADIENTS},
            ),
            heads_q=2,
            seqlen_q=65,
            seqlen_k=97,
        )
    ),
    full=problems(
        {
            "dropout": (0.1, 0.5, 0.9),
            "lengths": lengths((64, 64), (129, 65), (33, 300)),
            "dtype": DTYPES,
            "causal": ("none", "top-left", "bottom-right"),
            "gradients": ((), GRADIENTS),
            "heads": heads((2, 2), (6, 2)),
        },
    ),
    feature="dropout",
)
def test_kept(problem: Problem, subject: Subject) -> None:
    """Out and gradients are those of what was kept: both directions drop the same."""
    require_keep_mask(subject)
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        turning(({"dropout": 0.1}, {"dropout": 0.5}), batch=2, heads_q=3, seqlen_q=64)
    ),
    full=problems({"dropout": (0.05, 0.3, 0.9), "dtype": DTYPES}, batch=2, heads_q=4, seqlen_q=300),
    feature="dropout",
)
def test_rate(problem: Problem, subject: Subject) -> None:
    """The share that is kept is 1 - p: overall, in each head and in each column."""
    require_keep_mask(subject)
    problem, inputs = subject.prepare(problem)
    result = subject.run(Plan(calls=[Call(problem=problem, inputs=inputs)]))[0]
    subject.judge(problem, inputs, result)
    kept = None if result.attention is None else result.attention.keep_mask
    if kept is None:
        raise subject.deviates("missing", "what dropout kept was not returned", "keep_mask")
    rate = kept.double()
    for over, means in (
        ("all weights", rate.mean()),
        ("the weights of a head", rate.mean((2, 3))),
        ("the weights of a key", rate.mean((0, 1, 2))),
        ("the weights of a query", rate.mean((0, 1, 3))),
    ):
        count = rate.numel() / means.numel()
        spread = math.sqrt(problem.dropout * (1 - problem.dropout) / count)
        off = (means - (1 - problem.dropout)).abs().max().item()
        if off > SIGMAS * spread + 1 / count:
            raise subject.deviates(
                "dropout rate",
                f"the share kept of {over} is off 1 - p by {off:.3g}, where chance allows "
                f"{SIGMAS * spread:.3g}",
                "keep_mask",
            )


@cases(
    quick=in_each_dtype(turning(({"dropout": 0.5},), heads_q=2, seqlen_q=64)),
    full=problems({"dropout": (0.1, 0.5), "dtype": DTYPES}, heads_q=2, seqlen_q=128),
    feature="dropout",
)
def test_calls_differ(problem: Problem, subject: Subject) -> None:
    """Two calls drop differently, and so do two heads of one call.

    The seeds of their problems differ, for those that draw from it; all else is the same.
    """
    require_keep_mask(subject)
    problem, inputs = subject.prepare(problem)
    seeded = [problem, replace(problem, seed=problem.seed + 1)]
    results = subject.run(Plan(calls=[Call(problem=p, inputs=inputs) for p in seeded]))
    masks = []
    for result in results:
        subject.judge(problem, inputs, result)
        if result.attention is None or result.attention.keep_mask is None:
            raise subject.deviates("missing", "what dropout kept was not returned", "keep_mask")
        masks.append(result.attention.keep_mask)
    if bool((masks[0] == masks[1]).all()):
        raise subject.deviates("dropout", "two calls keep the same weights", "keep_mask")
    if bool((masks[0][:, 0] == masks[0][:, 1]).all()):
        raise subject.deviates("dropout", "two heads keep the same weights", "keep_mask")
