"""Answers that are known without rounding: they must come out to the bit.

One key gets all the weight, so out is that row of V; with integer values and integer incoming
gradients dV is a sum of integers, and dQ and dK are zero.
"""

from attn_reference.problem import Problem

from ..cases import cases
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, GRADIENTS, heads, in_each_dtype, lengths, turning


@cases(
    quick=turning(
        (
            {"seqlen_q": 1},
            {"seqlen_q": 65},
            {"seqlen_q": 17, "heads_q": 3, "batch": 2},
        ),
        seqlen_k=1,
    ),
    full=problems(
        {"seqlen_q": (1, 64, 129), "head_dim": (16, 64, 128), "dtype": DTYPES},
        seqlen_k=1,
        batch=2,
        heads_q=3,
    ),
    feature="one key",
)
def test_one_key(problem: Problem, subject: Subject) -> None:
    """A single key: out is V."""
    subject.check(problem)


@cases(
    quick=turning(
        (
            {"seqlen_q": 65, "seqlen_k": 129},
            {"seqlen_q": 127, "seqlen_k": 64, "heads_q": 2},
            {"seqlen_q": 33, "seqlen_k": 257, "head_dim": 128},
        ),
        distribution="integers",
    ),
    full=problems(
        {
            "lengths": lengths((1, 64), (65, 129), (127, 64), (300, 300), (64, 1031)),
            "head_dim": (32, 64, 128),
            "dtype": DTYPES,
        },
        distribution="integers",
    ),
    feature="one dominating key",
)
def test_dominating_key(problem: Problem, subject: Subject) -> None:
    """One key outweighs the others by over 110 nats: out is its row of V, integers up to 256."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        turning(({"window": (0, 0)}, {"window": (0, 0), "seqlen_k": 97}), seqlen_q=65, heads_q=2)
    ),
    full=problems(
        {"lengths": lengths((64, 64), (65, 97), (257, 129)), "dtype": DTYPES},
        window=(0, 0),
        heads_q=2,
    ),
    feature="window",
)
def test_window_of_one(problem: Problem, subject: Subject) -> None:
    """A window of one key: out is V along the diagonal."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        turning(({"seqlen_k": 65}, {"seqlen_k": 300}), seqlen_q=33, heads_q=2, mask="one-key")
    ),
    full=problems(
        {"mask_shape": ("bhqk", "11qk", "b11k", "1h1k"), "dtype": DTYPES, "seqlen_k": (64, 257)},
        batch=2,
        heads_q=3,
        seqlen_q=65,
        mask="one-key",
    ),
    feature="boolean mask",
)
def test_mask_of_one(problem: Problem, subject: Subject) -> None:
    """A mask that leaves one key to each query."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        turning(
            ({"heads_q": 6, "heads_kv": 2}, {"heads_q": 15, "heads_kv": 3}),
            seqlen_q=33,
            seqlen_k=65,
            distribution="integers",
        )
    ),
    full=problems(
        {"heads": heads((8, 1), (6, 3), (14, 2), (24, 8)), "dtype": DTYPES},
        seqlen_q=33,
        seqlen_k=65,
        distribution="integers",
    ),
    feature="gqa",
)
def test_dominating_key_by_head(problem: Problem, subject: Subject) -> None:
    """Each query head reads the values of its own key/value head."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        turning(
            ({"seqlen_q": 65, "seqlen_k": 65}, {"seqlen_q": 129, "seqlen_k": 33}),
            distribution="integers",
            gradients=GRADIENTS,
        )
    ),
    full=problems(
        {
            "lengths": lengths((64, 64), (65, 129), (129, 33)),
            "head_dim": (64, 128),
            "dtype": DTYPES,
        },
        distribution="integers",
        gradients=GRADIENTS,
    ),
    feature="gradients",
)
def test_dominating_key_gradients(problem: Problem, subject: Subject) -> None:
    """dV is a sum of integer gradients; dQ and dK are zero, since no weight can move."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        turning(
            (
                {"seqlen_k": 0},
                {"seqlen_q": 0},
                {"batch": 0},
                {"seqlen_k": 0, "gradients": GRADIENTS},
                {"seqlen_q": 0, "seqlen_k": 17, "gradients": GRADIENTS},
            ),
            heads_q=2,
            seqlen_q=17,
        )
    ),
    full=problems(
        {
            "lengths": lengths((0, 0), (0, 65), (65, 0), (1, 0)),
            "batch": (0, 2),
            "dtype": DTYPES,
            "gradients": ((), GRADIENTS),
        },
        heads_q=2,
    ),
    feature="empty inputs",
)
def test_empty(problem: Problem, subject: Subject) -> None:
    """No keys: out is 0 and the LSE -inf. No queries: nothing comes out, and dK and dV are 0."""
    subject.check(problem, canary_allocations=True)
