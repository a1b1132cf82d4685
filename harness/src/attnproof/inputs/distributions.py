"""Distributions of q, k and v, by the name that a ``Problem`` gives them.

A distribution is a function of the problem and of the argument behind the colon of its name
(``normal:4``), and returns q, k and v as float32 in dense canonical shapes; the caller rounds
them to the problem's dtype. To add one, write the function here, say in its docstring what it
excites, and enter it in DISTRIBUTIONS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from attn_reference.inputs import key_count, output_shape
from attn_reference.problem import Problem

from .needles import EXACT_GAP, NEEDLE_GAP, needles
from .streams import Floats, Shape, Stream

Triple = tuple[Floats, Floats, Floats]


def shapes(problem: Problem) -> tuple[Shape, Shape, Shape]:
    """Dense shapes of q, k and v; packed problems have batch 1 and total lengths."""
    batch, heads, rows, value_dim = output_shape(problem)
    keys = key_count(problem)
    return (
        (batch, heads, rows, problem.head_dim),
        (batch, problem.kv_heads, keys, problem.head_dim),
        (batch, problem.kv_heads, keys, value_dim),
    )


def draw(problem: Problem, query_scale: float = 1.0) -> Triple:
    """Normal q (times ``query_scale``), k and v, each from its own stream."""
    q, k, v = shapes(problem)
    return (
        Stream(problem.seed, "q").normal(q, query_scale),
        Stream(problem.seed, "k").normal(k),
        Stream(problem.seed, "v").normal(v),
    )


def _normal(problem: Problem, argument: str) -> Triple:
    """N(0, 1), with ':x' queries N(0, x²): the general case, and the one for statistics."""
    return draw(problem, query_scale(argument))


def query_scale(argument: str) -> float:
    """The number behind the colon, 1 when there is none; ValueError if it is no number."""
    try:
        scale = float(argument) if argument else 1.0
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise ValueError(
            f"distribution='normal:{argument}': behind the colon goes the scale of the queries, "
            "a finite number"
        )
    return scale


def _equal(problem: Problem, argument: str) -> Triple:
    """q = 0, so that all scores are equal: a key too many or too few changes every output."""
    q, k, v = draw(problem)
    return np.zeros_like(q), k, v


def _large(problem: Problem, argument: str) -> Triple:
    """Scores up to about ±6e4: overflow of exponentials, of differences and of 16-bit scores."""
    q, k, v = draw(problem)
    spread = abs(problem.softmax_scale) * math.sqrt(problem.head_dim)
    # Powers of two that bring the deviation of the scores near 2^13.
    power = 14 - math.frexp(spread)[1] if spread else 0
    return q * np.float32(2.0 ** (power - power // 2)), k * np.float32(2.0 ** (power // 2)), v


def _tiny(problem: Problem, argument: str) -> Triple:
    """Values near the smallest: fp16 subnormals (2^-18), else 2^-100. Zeros are no answer."""
    q, k, v = draw(problem)
    return q, k, v * np.float32(2.0**-18 if problem.dtype == "fp16" else 2.0**-100)


def _duplicated(problem: Problem, argument: str) -> Triple:
    """Keys repeat with period 8, values do not: equal probabilities round in the same direction."""
    q, k, v = draw(problem)
    return q, k[:, :, np.arange(k.shape[2]) % 8], v


def _outliers(problem: Problem, argument: str) -> Triple:
    """N(0, 1) + N(0, 100) · Bernoulli(0.001) in q, k and v: the outlier channels of real models."""

    def one(name: str, values: Floats) -> Floats:
        stream = Stream(problem.seed, f"{name}/outliers")
        rare = stream.bernoulli(values.shape, 0.001)
        return values + stream.normal(values.shape, 10.0) * rare

    q, k, v = draw(problem)
    return one("q", q), one("k", k), one("v", v)


def _one_hot(problem: Problem, argument: str) -> Triple:
    """V[j] is one-hot at column j mod head_dim_v: the output shows the probabilities themselves."""
    q, k, v = draw(problem)
    keys, columns = v.shape[2:]
    hot = (np.arange(keys)[:, None] % columns) == np.arange(columns)
    return q, k, np.broadcast_to(hot.astype(np.float32), v.shape).copy()


def _ones(problem: Problem, argument: str) -> Triple:
    """V = 1: so is the output, unless weight is lost or counted twice; scores are normal."""
    q, k, v = draw(problem)
    return q, k, np.ones_like(v)


def _slope(problem: Problem, sign: float) -> Triple:
    """Scores that change by 40 nats from the first key to the last, plus noise."""
    q, k, v = draw(problem, 0.25)
    keys = k.shape[2]
    scale = problem.softmax_scale
    q[..., 0] = math.copysign(8.0, scale)
    if scale:
        step = sign * 5.0 / (abs(scale) * max(keys - 1, 1))
        k[..., 0] = np.arange(keys) * step
    return q, k, v


def _rising(problem: Problem, argument: str) -> Triple:
    """Scores rise along the keys: the running maximum moves in every tile, all must be rescaled."""
    return _slope(problem, 1.0)


def _falling(problem: Problem, argument: str) -> Triple:
    """Scores fall along the keys: the first tile dominates, later ones must not replace it."""
    return _slope(problem, -1.0)


def _needles(problem: Problem, argument: str) -> Triple:
    """Each key dominates for some query: whatever becomes of a single key is seen.

    A query singles out one key, or an aligned run of keys where there are fewer queries than
    keys, among those that it may see; values are normal, so that each key has its own.
    """
    q, k, v = shapes(problem)
    queries, keys = needles(problem, q, k, NEEDLE_GAP, share=True)
    return queries, keys, Stream(problem.seed, "v").normal(v)


def _integers(problem: Problem, argument: str) -> Triple:
    """One dominating key per query, by over 110 nats, and integer values up to 256: out is exactly
    one row of V where that key is visible."""
    q, k, v = shapes(problem)
    queries, keys = needles(problem, q, k, EXACT_GAP, share=False)
    values = Stream(problem.seed, "v").integers(v, -256, 256)
    return queries, keys, values.astype(np.float32)


DISTRIBUTIONS: Mapping[str, Callable[[Problem, str], Triple]] = {
    "normal": _normal,
    "needles": _needles,
    "integers": _integers,
    "equal": _equal,
    "large": _large,
    "tiny": _tiny,
    "duplicated": _duplicated,
    "outliers": _outliers,
    "one-hot": _one_hot,
    "ones": _ones,
    "rising": _rising,
    "falling": _falling,
}
