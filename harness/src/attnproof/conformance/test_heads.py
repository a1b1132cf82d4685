"""Which key/value head a query head reads, and head dimensions of V that differ from Q's."""

from typing import Any

from attn_reference.problem import Problem

from ..cases import cases
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, dims, heads, in_each_dtype, joined, lengths, turning

# Groups of 1, 2, 3, 5, 7 and 8, more than one key/value head, counts that differ from the group.
GROUPS = heads((6, 2), (8, 4), (10, 2), (14, 2), (24, 3), (5, 1), (12, 6))
VALUE_DIMS = dims((64, 128), (128, 64), (64, 32), (40, 24), (96, 64), (192, 128))
# Rows of no multiple of 16 bytes, beside rows that are padded to another width.
ODD_VALUE_DIMS = dims((56, 12), (24, 72), (136, 40))
RULES: tuple[dict[str, Any], ...] = ({}, {"causal": "top-left"}, {"causal": "bottom-right"})


@cases(
    quick=in_each_dtype(
        joined(
            (
                turning(GROUPS, seqlen_q=33, seqlen_k=65),
                *(
                    turning(heads((6, 2), (15, 3)), seqlen_q=129, seqlen_k=65, batch=2, **rule)
                    for rule in RULES
                ),
            )
        )
    ),
    full=joined(
        problems(
            {
                "heads": GROUPS,
                "lengths": lengths((1, 127), (64, 64), (129, 65), (17, 300)),
                "dtype": DTYPES,
                "head_dim": (64, 128),
            },
            batch=2,
            **rule,
        )
        for rule in RULES
    ),
    feature="gqa",
)
def test_groups(problem: Problem, subject: Subject) -> None:
    """Query head h reads key/value head h // group."""
    subject.check(problem)


@cases(
    quick=joined(
        (
            turning(VALUE_DIMS, seqlen_q=65, seqlen_k=100, heads_q=2),
            # A wider V, and dimensions that tiles of 32 do not divide, in each dtype.
            problems(
                {"dims": (VALUE_DIMS[0], VALUE_DIMS[3]), "dtype": DTYPES},
                seqlen_q=65,
                seqlen_k=100,
                heads_q=2,
            ),
        )
    ),
    full=joined(
        problems(
            {
                "dims": (*VALUE_DIMS, *ODD_VALUE_DIMS),
                "lengths": lengths((1, 127), (65, 100), (129, 64)),
                "dtype": DTYPES,
            },
            heads_q=2,
            **rule,
        )
        for rule in RULES
    ),
    feature="head_dim_v",
)
def test_value_dims(problem: Problem, subject: Subject) -> None:
    """V narrower or wider than Q and K."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(turning(heads((33, 33), (40, 8)), batch=3, seqlen_q=5, seqlen_k=9)),
    full=problems(
        {"heads": heads((64, 64), (96, 12), (7, 7)), "dtype": DTYPES}, batch=33, seqlen_q=7
    ),
    feature=lambda problem: "gqa" if problem.group > 1 else "many heads",
)
def test_many_heads(problem: Problem, subject: Subject) -> None:
    """Many small heads: indices over batch and heads."""
    subject.check(problem)
