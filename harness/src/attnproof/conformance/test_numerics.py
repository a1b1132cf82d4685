"""Numbers: the plain computation, over sizes, head dimensions, scales and distributions.

Every element must lie within the error budget that is derived from the problem and the declared
precision; on iid inputs the statistics of rows must too.
"""

from typing import Any

from attn_reference.problem import Problem

from ..cases import cases
from ..subject import Subject
from .cover import problems
from .recipe import (
    BATCHES,
    DTYPES,
    EDGES,
    GRADIENTS,
    QUICK_LENGTHS,
    each_dtype,
    in_each_dtype,
    joined,
    lengths,
    turning,
)

SPREADS = ("normal", "normal:4")
SHAPES_OF_DATA = (
    "equal",
    "large",
    "tiny",
    "duplicated",
    "outliers",
    "one-hot",
    "ones",
    "rising",
    "falling",
)


@cases(
    quick=each_dtype(
        {
            "lengths": QUICK_LENGTHS,
            "head_dim": (64, 128),
            "batch": BATCHES,
            "distribution": SPREADS,
        }
    ),
    full=each_dtype(
        {
            "seqlen_q": EDGES,
            "seqlen_k": EDGES,
            "head_dim": (16, 32, 64, 128),
            "batch": BATCHES,
            "distribution": SPREADS,
        }
    ),
    feature=lambda problem: f"dense {problem.dtype}",
)
def test_dense(problem: Problem, subject: Subject) -> None:
    """The plain computation, over the edges of tiles."""
    subject.check(problem)


@cases(
    # Each in each dtype: 16-bit kernels are written for tiles of 16 or 32 along the head dimension.
    quick=problems(
        {"head_dim": (8, 40, 72, 80, 96, 192, 256), "dtype": DTYPES},
        seqlen_q=33,
        seqlen_k=65,
        heads_q=2,
    ),
    full=problems(
        {
            "head_dim": (1, 8, 16, 24, 32, 40, 72, 80, 96, 112, 160, 192, 224, 256),
            "dtype": DTYPES,
            "lengths": lengths((33, 65), (65, 64)),
        }
    ),
    feature="head dimensions",
)
def test_head_dims(problem: Problem, subject: Subject) -> None:
    """Head dimensions that are no power of two, and large ones."""
    subject.check(problem)


@cases(
    quick=turning(
        [{"distribution": name} for name in SHAPES_OF_DATA], seqlen_q=65, seqlen_k=300, heads_q=2
    ),
    full=problems(
        {
            "distribution": SHAPES_OF_DATA,
            "dtype": DTYPES,
            "lengths": lengths((65, 300), (17, 1000), (300, 129)),
            "head_dim": (64, 128),
        },
        heads_q=2,
    ),
    feature="distributions",
)
def test_distributions(problem: Problem, subject: Subject) -> None:
    """Data that excite overflow, cancellation, rescaling, underflow and equal probabilities."""
    subject.check(problem)


@cases(
    quick=(
        Problem(seqlen_q=2000, dtype="bf16", distribution="needles"),
        Problem(seqlen_q=300, seqlen_k=257, dtype="fp16", distribution="needles"),
        Problem(seqlen_q=129, heads_q=2, dtype="fp32", distribution="needles"),
    ),
    full=problems(
        {
            "lengths": lengths((127, 127), (128, 129), (1031, 1031), (2000, 2000), (64, 1000)),
            "dtype": DTYPES,
            "head_dim": (64, 128),
        },
        distribution="needles",
    ),
    feature="single keys",
)
def test_needles(problem: Problem, subject: Subject) -> None:
    """Every key dominates for some query: none may be lost, doubled or taken for another."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        (
            Problem(seqlen_q=64, seqlen_k=1000, dtype="bf16"),
            Problem(seqlen_q=33, seqlen_k=1000, dtype="bf16", distribution="ones"),
            Problem(seqlen_q=64, seqlen_k=1031, dtype="fp16"),
        )
    ),
    full=each_dtype(
        {
            "lengths": lengths((64, 1000), (33, 2039), (128, 4096)),
            "distribution": ("normal", "ones", "equal"),
        }
    ),
    feature="long rows",
)
def test_long(problem: Problem, subject: Subject) -> None:
    """Rows of many keys, where a single key or a little extra mass is near the noise."""
    subject.check(problem)


@cases(
    quick=(
        Problem(heads_q=4, seqlen_q=1, seqlen_k=2039, dtype="bf16", distribution="needles"),
        Problem(heads_q=4, seqlen_q=1, seqlen_k=1000, dtype="fp16", distribution="ones"),
        Problem(batch=2, seqlen_q=2, seqlen_k=1031),
    ),
    full=each_dtype(
        {
            "lengths": lengths((1, 4096), (1, 2039), (3, 8191)),
            "distribution": ("normal", "ones", "needles", "rising", "falling"),
            "batch": BATCHES,
        }
    ),
    feature="long rows",
)
def test_decode(problem: Problem, subject: Subject) -> None:
    """Few queries and many keys: where kernels split the keys, and merge what they got."""
    subject.check(problem)


@cases(
    quick=turning(({"scale": s} for s in (0.5, 1.0, 0.03)), seqlen_q=65, seqlen_k=127, heads_q=2),
    full=problems(
        {"scale": (0.01, 0.088, 0.3, 1.0), "dtype": DTYPES, "head_dim": (64, 128)},
        seqlen_q=65,
        seqlen_k=127,
    ),
    feature="scale",
)
def test_scale(problem: Problem, subject: Subject) -> None:
    """Another scale than 1/sqrt(head_dim)."""
    subject.check(problem)


# With a scale of 0 every visible key weighs the same, with a negative one the smallest product
# wins: what hides a key must do so after the scale, and a maximum must be that of the scores.
NOT_POSITIVE = ({"scale": 0.0}, {"scale": -0.125})
HIDING: tuple[dict[str, Any], ...] = ({}, {"causal": "top-left"}, {"causal": "bottom-right"})


@cases(
    quick=in_each_dtype(
        joined(turning(NOT_POSITIVE, seqlen_q=65, seqlen_k=127, **rule) for rule in HIDING)
        + turning(({"scale": -0.3},), seqlen_q=33, seqlen_k=65, gradients=GRADIENTS)
    ),
    full=joined(
        problems(
            {
                "scale": (0.0, -0.01, -0.3, -1.0),
                "dtype": DTYPES,
                "lengths": lengths((65, 65), (129, 33), (17, 300)),
            },
            **rule,
        )
        for rule in (*HIDING, {"mask": "random"})
    ),
    feature="scale",
)
def test_scale_not_positive(problem: Problem, subject: Subject) -> None:
    """A scale of zero, and a negative one, with keys that are hidden and without."""
    subject.check(problem)
