"""Sequences of different lengths: packed one after another, or padded with key lengths.

What lies beyond a sequence is NaN, or belongs to another one. What the target allocates is NaN
too: the rows of a sequence without keys are easily left unwritten, and memory is often zero.
"""

from typing import Any

from attn_reference.problem import Problem

from ..cases import cases
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, GRADIENTS, heads, in_each_dtype, joined, turning

PACKED = (
    ((33, 33), (65, 65), (1, 1)),
    ((1, 127), (64, 64), (17, 16)),
    ((5, 65), (0, 33), (129, 0), (0, 0), (7, 128)),
    ((128, 128), (127, 127), (129, 129)),
    ((1, 5),) * 9,
)
KEY_LENGTHS = (
    (100, 1, 33),
    (64, 65, 63),
    (0, 100, 17),
    (99, 0, 0),
)
RULES: tuple[dict[str, Any], ...] = ({}, {"causal": "bottom-right"}, {"causal": "top-left"})


@cases(
    quick=in_each_dtype(
        joined(
            turning([{"packed": packed} for packed in some], heads_q=2, **rule)
            for some, rule in zip((PACKED, PACKED[:3], PACKED[1:3]), RULES, strict=True)
        )
    ),
    full=joined(
        problems(
            {
                "packed": PACKED,
                "dtype": DTYPES,
                "heads": heads((2, 2), (6, 2)),
                "distribution": ("normal", "needles"),
            },
            **rule,
        )
        for rule in RULES
    ),
    feature="packed",
)
def test_packed(problem: Problem, subject: Subject) -> None:
    """Each sequence attends to itself, empty ones among them."""
    subject.check(problem, canary_allocations=True)


@cases(
    quick=in_each_dtype(
        turning([{"packed": packed} for packed in PACKED[:3]], heads_q=2, gradients=GRADIENTS)
        + turning([{"packed": PACKED[2]}], causal="bottom-right", heads_q=2, gradients=GRADIENTS)
    ),
    full=joined(
        problems(
            {"packed": PACKED, "dtype": DTYPES, "heads": heads((2, 2), (6, 2))},
            gradients=GRADIENTS,
            **rule,
        )
        for rule in RULES
    ),
    feature="packed",
)
def test_packed_gradients(problem: Problem, subject: Subject) -> None:
    """A sequence without queries leaves zeros in dK and dV, not what was there before."""
    subject.check(problem, canary_allocations=True)


@cases(
    quick=in_each_dtype(
        turning(
            (
                {"window": (5, 0), "causal": "bottom-right"},
                {"softcap": 2.0},
                {"alibi": True, "causal": "bottom-right"},
                {"heads_kv": 2},
            ),
            packed=PACKED[1],
            heads_q=6,
        )
    ),
    full=joined(
        problems({"packed": PACKED[:3], "dtype": DTYPES}, heads_q=6, **feature)
        for feature in (
            {"window": (5, 0), "causal": "bottom-right"},
            {"window": (20, 20)},
            {"softcap": 2.0},
            {"alibi": True, "causal": "bottom-right"},
            {"scale": 0.3},
            {"head_dim_v": 32},
            {"sinks": True},
        )
    ),
    feature="packed",
)
def test_packed_features(problem: Problem, subject: Subject) -> None:
    """The diagonal belongs to the sequence, not to the pack."""
    subject.check(problem)


@cases(
    quick=joined(
        turning(
            [{"key_lengths": lens} for lens in KEY_LENGTHS],
            batch=3,
            heads_q=2,
            seqlen_k=100,
            **{"seqlen_q": 17, **rule},
        )
        for rule in ({}, {"causal": "bottom-right"}, {"seqlen_q": 1})
    ),
    full=joined(
        problems(
            {
                "key_lengths": KEY_LENGTHS,
                "seqlen_q": (1, 17, 100),
                "dtype": DTYPES,
                "heads": heads((2, 2), (6, 2)),
                "distribution": ("normal", "needles"),
            },
            batch=3,
            seqlen_k=100,
            **rule,
        )
        for rule in RULES
    ),
    feature="key lengths",
)
def test_key_lengths(problem: Problem, subject: Subject) -> None:
    """Keys beyond a sequence's length are NaN and are not read; a length may be 0."""
    subject.check(problem, canary_allocations=True)


@cases(
    quick=in_each_dtype(
        turning(
            ({}, {"causal": "bottom-right"}),
            batch=3,
            key_lengths=(100, 0, 33),
            seqlen_q=33,
            seqlen_k=100,
            gradients=GRADIENTS,
        )
    ),
    full=problems(
        {
            "key_lengths": KEY_LENGTHS,
            "dtype": DTYPES,
            "causal": ("none", "top-left", "bottom-right"),
        },
        batch=3,
        seqlen_q=33,
        seqlen_k=100,
        gradients=GRADIENTS,
    ),
    feature="key lengths",
)
def test_key_lengths_gradients(problem: Problem, subject: Subject) -> None:
    """dK and dV are 0 beyond a sequence's length."""
    subject.check(problem, canary_allocations=True)
