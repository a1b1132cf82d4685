"""The LSE: the natural logarithm of the row sum, sinks included, -inf for a row without keys.

Compared in base e and (batch, heads, rows) order; the target declares what it returns.
"""

from typing import Any

from attn_reference.problem import Problem

from ..cases import cases
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, each_dtype, in_each_dtype, joined, lengths, turning
from .requirements import require_lse

FEATURES: tuple[dict[str, Any], ...] = (
    {"causal": "top-left"},
    {"causal": "bottom-right"},
    {"window": (20, 10)},
    {"softcap": 4.0, "distribution": "normal:4"},
    {"alibi": True},
    {"mask": "empty-rows"},
    {"bias": "constant"},
    {"bias": "neginf-prefix"},
    {"sinks": True},
    {"scale": 0.3},
    {"heads_kv": 2},
    {"heads_kv": 1},
)


@cases(
    quick=each_dtype(
        {
            "lengths": lengths((64, 64), (33, 129), (1, 2039)),
            "distribution": ("normal", "large"),
        },
        heads_q=3,
    ),
    full=each_dtype(
        {
            "lengths": lengths((1, 127), (64, 64), (33, 129), (300, 257), (65, 1000)),
            "distribution": ("normal", "normal:8", "large", "rising", "equal", "duplicated"),
            "head_dim": (64, 128),
        },
        heads_q=3,
    ),
    feature="lse",
)
def test_dense(problem: Problem, subject: Subject) -> None:
    """Base, order of the dimensions and value, of small scores and of huge ones."""
    require_lse(subject)
    subject.check(problem)


@cases(
    quick=in_each_dtype(turning(FEATURES, heads_q=6, seqlen_q=65, seqlen_k=150)),
    full=joined(
        problems(
            {"lengths": lengths((64, 64), (129, 65), (65, 257)), "dtype": DTYPES},
            heads_q=6,
            **feature,
        )
        for feature in FEATURES
    ),
    feature="lse",
)
def test_features(problem: Problem, subject: Subject) -> None:
    """Whatever changes a score or hides it changes the LSE."""
    require_lse(subject)
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        turning(({"seqlen_k": 0}, {"seqlen_k": 0, "sinks": True}), seqlen_q=17, heads_q=2)
    ),
    full=problems(
        {"seqlen_q": (1, 65), "dtype": DTYPES, "sinks": (False, True)}, seqlen_k=0, heads_q=2
    ),
    feature="lse",
)
def test_no_keys(problem: Problem, subject: Subject) -> None:
    """Without keys the LSE is -inf, or the sink."""
    require_lse(subject)
    subject.check(problem)
