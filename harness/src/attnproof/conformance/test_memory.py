"""Bytes that must not be read or written.

Inputs lie among NaN bytes (always), or against a page that nobody may touch; what the target
allocates through torch is NaN at first and has canaries on both sides. docs/chapters.md says what
each of these can and cannot see.
"""

from typing import Any

from attn_reference.problem import Problem

from ..cases import cases
from ..plan import Surroundings
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, GRADIENTS, each_dtype, heads, in_each_dtype, joined, lengths, turning

# Lengths whose last tile is partly empty, and head dimensions that fill no vector.
ODD = lengths((65, 97), (1, 17), (33, 300), (129, 63))
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"causal": "top-left"},
    {"causal": "bottom-right"},
    {"mask": "random"},
    {"bias": "normal"},
    {"heads_kv": 2},
    {"alibi": True},
    {"sinks": True},
)


@cases(
    quick=in_each_dtype(
        joined(
            (
                turning(ODD, heads_q=2),
                each_dtype({"lengths": ODD[:1]}, heads_q=2, head_dim=40),
                turning(RULES[1:6], heads_q=4, seqlen_q=65, seqlen_k=97),
            )
        )
    ),
    full=joined(
        problems(
            {"lengths": ODD, "dtype": DTYPES, "head_dim": (40, 64, 128)},
            heads_q=4,
            **rule,
        )
        for rule in RULES
    ),
    feature="memory",
)
def test_reads_behind(problem: Problem, subject: Subject) -> None:
    """Each input ends where an inaccessible page begins: a read past the end ends the process."""
    subject.check(problem, surroundings=Surroundings.GUARD_AFTER)


@cases(
    quick=in_each_dtype(turning(ODD[:2], heads_q=2)),
    full=joined(problems({"lengths": ODD, "dtype": DTYPES}, heads_q=4, **rule) for rule in RULES),
    feature="memory",
)
def test_reads_before(problem: Problem, subject: Subject) -> None:
    """Each input begins where an inaccessible page ends."""
    subject.check(problem, surroundings=Surroundings.GUARD_BEFORE)


@cases(
    quick=in_each_dtype(
        joined(
            (
                turning(ODD, heads_q=2),
                turning(ODD[:2], heads_q=2, gradients=GRADIENTS),
                turning(lengths((17, 0), (65, 1)), heads_q=2),
            )
        )
    ),
    full=joined(
        problems({"lengths": ODD, "dtype": DTYPES, "gradients": ((), GRADIENTS)}, heads_q=4, **rule)
        for rule in RULES
    ),
    feature="memory",
)
def test_allocations(problem: Problem, subject: Subject) -> None:
    """Writes beside its own allocations, reads behind them, and elements never written."""
    subject.check(problem, canary_allocations=True)


@cases(
    quick=in_each_dtype(
        turning(
            ({"causal": "top-left", "seqlen_k": 129}, {"seqlen_k": 0}),
            heads_q=2,
            seqlen_q=33,
            gradients=GRADIENTS,
        )
    ),
    full=problems(
        {
            "lengths": lengths((33, 129), (64, 257), (17, 0), (0, 17)),
            "causal": ("none", "top-left"),
            "dtype": DTYPES,
        },
        heads_q=2,
        gradients=GRADIENTS,
    ),
    feature="memory",
)
def test_gradients_without_queries(problem: Problem, subject: Subject) -> None:
    """Keys that no query sees: their dK and dV are written, as zeros."""
    subject.check(problem, canary_allocations=True)


@cases(
    quick=in_each_dtype(
        turning(heads((2, 2), (6, 2)), seqlen_q=65, seqlen_k=97, gradients=GRADIENTS)
    ),
    full=problems(
        {
            "heads": heads((2, 2), (6, 2)),
            "lengths": ODD,
            "dtype": DTYPES,
            "causal": ("none", "top-left", "bottom-right"),
        },
        gradients=GRADIENTS,
    ),
    feature="memory",
)
def test_reads_behind_in_backward(problem: Problem, subject: Subject) -> None:
    """The backward reads its inputs, and the gradient that comes in, no further than they go."""
    subject.check(problem, surroundings=Surroundings.GUARD_AFTER)
