"""dQ, dK, dV, dBias, dSinks, through autograd; gradients come in for out and for the LSE."""

import itertools
from typing import Any

from attn_reference.problem import Problem

from ..cases import cases
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, GRADIENTS, each_dtype, in_each_dtype, joined, lengths, turning

# Optional features, each with what takes part in the backward.
FEATURES: tuple[dict[str, Any], ...] = (
    {"causal": "top-left"},
    {"causal": "bottom-right"},
    {"window": (20, 10)},
    {"softcap": 4.0, "distribution": "normal:4"},
    {"alibi": True},
    {"mask": "random"},
    {"mask": "empty-rows"},
    {"bias": "normal", "bias_shape": "1hqk"},
    {"sinks": True},
    {"scale": 0.3},
    {"heads_kv": 2},
    {"head_dim_v": 32},
)
BIAS_GRADIENTS: tuple[dict[str, Any], ...] = (
    {"bias": "normal"},
    {"bias": "normal", "bias_shape": "1hqk"},
    {"bias": "neginf-random", "bias_shape": "b11k"},
    {"bias": "normal", "bias_shape": "11qk"},
)
SUBSETS = [
    {"gradients": subset} for count in (1, 2) for subset in itertools.combinations(GRADIENTS, count)
]


@cases(
    quick=each_dtype(
        {
            "lengths": lengths((64, 64), (65, 127), (129, 33), (17, 16)),
            "head_dim": (64, 128),
        },
        heads_q=2,
        gradients=GRADIENTS,
    ),
    full=each_dtype(
        {
            "seqlen_q": (1, 16, 63, 64, 65, 127, 129, 257),
            "seqlen_k": (1, 16, 63, 64, 65, 127, 129, 257),
            "head_dim": (16, 64, 128),
            "distribution": ("normal", "normal:4"),
        },
        gradients=GRADIENTS,
    ),
    feature=lambda problem: f"gradients {problem.dtype}",
)
def test_dense(problem: Problem, subject: Subject) -> None:
    """The plain computation, over the edges of tiles."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        turning(FEATURES, heads_q=6, seqlen_q=65, seqlen_k=100, gradients=GRADIENTS)
    ),
    full=joined(
        problems(
            {"lengths": lengths((64, 64), (129, 65), (65, 257)), "dtype": DTYPES},
            heads_q=6,
            gradients=GRADIENTS,
            **feature,
        )
        for feature in FEATURES
    ),
    feature="gradients",
)
def test_features(problem: Problem, subject: Subject) -> None:
    """Each optional feature in the backward, where it is written a second time."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        turning(
            ({"causal": "top-left"}, {"causal": "bottom-right"}),
            heads_q=2,
            seqlen_q=100,
            seqlen_k=65,
            gradients=GRADIENTS,
        )
    ),
    full=problems(
        {
            "causal": ("top-left", "bottom-right"),
            "lengths": lengths((65, 65), (33, 129), (129, 33), (1, 65)),
            "dtype": DTYPES,
            "heads_kv": (2, 4),
        },
        heads_q=4,
        gradients=GRADIENTS,
    ),
    feature="gradients",
)
def test_causal(problem: Problem, subject: Subject) -> None:
    """Causality in the backward: keys that no query sees get zero, rows without a key too."""
    subject.check(problem)


@cases(
    quick=turning(
        [{**bias, "gradients": (*GRADIENTS, "bias")} for bias in BIAS_GRADIENTS],
        batch=2,
        heads_q=3,
        seqlen_q=33,
        seqlen_k=65,
    ),
    full=joined(
        problems(
            {"lengths": lengths((64, 64), (65, 129)), "dtype": DTYPES},
            batch=2,
            heads_q=3,
            gradients=gradients,
            **bias,
        )
        for bias in BIAS_GRADIENTS
        for gradients in (("bias",), (*GRADIENTS, "bias"))
    ),
    feature="gradient of the bias",
)
def test_bias(problem: Problem, subject: Subject) -> None:
    """dBias, summed over the dimensions that the bias broadcasts."""
    subject.check(problem)


@cases(
    quick=turning(
        # In bf16 more rows drown the gradient of a sink in their rounding.
        [{"seqlen_q": 33}, {"seqlen_q": 65}, {"seqlen_q": 33}],
        heads_q=8,
        seqlen_k=65,
        sinks=True,
        gradients=(*GRADIENTS, "sinks"),
    ),
    full=problems(
        {
            "lengths": lengths((16, 64), (33, 129), (65, 33)),
            "dtype": DTYPES,
            "causal": ("none", "top-left", "bottom-right"),
        },
        heads_q=8,
        sinks=True,
        gradients=(*GRADIENTS, "sinks"),
    ),
    feature="gradient of the sinks",
)
def test_sinks(problem: Problem, subject: Subject) -> None:
    """dSinks, a sum over all rows of a head."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        turning(
            ({}, {"causal": "bottom-right"}, {"causal": "top-left"}),
            heads_q=2,
            seqlen_q=65,
            seqlen_k=100,
            gradients=GRADIENTS,
            lse_gradient=True,
        )
    ),
    full=joined(
        problems(
            {"lengths": lengths((64, 64), (65, 129), (129, 33)), "dtype": DTYPES},
            heads_q=6,
            gradients=GRADIENTS,
            lse_gradient=True,
            **feature,
        )
        for feature in ({}, *FEATURES)
    ),
    feature="lse gradient",
)
def test_lse(problem: Problem, subject: Subject) -> None:
    """A gradient that comes in through the LSE too."""
    subject.check(problem)


@cases(
    quick=turning(SUBSETS, heads_q=2, seqlen_q=33, seqlen_k=65),
    full=problems(
        {
            "gradients": tuple(subset["gradients"] for subset in SUBSETS),
            "dtype": DTYPES,
            "causal": ("none", "top-left", "bottom-right"),
        },
        heads_q=2,
        seqlen_q=65,
        seqlen_k=65,
    ),
    feature="gradients",
)
def test_subsets(problem: Problem, subject: Subject) -> None:
    """Only some of Q, K and V need a gradient."""
    subject.check(problem)


@cases(
    quick=(
        Problem(seqlen_q=1000, seqlen_k=300, dtype="bf16", gradients=GRADIENTS),
        Problem(seqlen_q=257, dtype="fp16", distribution="large", gradients=GRADIENTS),
        Problem(seqlen_q=65, seqlen_k=300, distribution="needles", gradients=GRADIENTS),
    ),
    full=problems(
        {
            "distribution": ("large", "outliers", "needles", "rising", "duplicated", "tiny"),
            "dtype": DTYPES,
            "lengths": lengths((257, 65), (65, 1000), (1000, 300)),
        },
        gradients=GRADIENTS,
    ),
    feature="gradients",
)
def test_distributions(problem: Problem, subject: Subject) -> None:
    """Sums over many rows, and data that excite under- and overflow in the backward."""
    subject.check(problem)
