"""Patterns of boolean masks and additive biases, by the name that a ``Problem`` gives them.

A pattern is a function of a stream of random numbers and the shape (B, Hq, Sq, Sk) asked
for, in which dimensions that broadcast are 1. To add one, write the function here, say in
its docstring what it excites, and enter it in MASK_PATTERNS or BIAS_PATTERNS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .streams import Floats, Shape, Stream

Bools = NDArray[np.bool_]

# Keys that 'first-tile' and 'last-tile' hide: whole tiles of kernels with tiles up to this size.
TILE = 128


def _random(stream: Stream, shape: Shape) -> Bools:
    """Half of the keys visible, at random: polarity, indexing and strides of the mask."""
    return stream.bernoulli(shape, 0.5)


def _sparse(stream: Stream, shape: Shape) -> Bools:
    """One key in sixteen visible: rows with few keys, most tiles nearly hidden."""
    return stream.bernoulli(shape, 1 / 16)


def _alternate(stream: Stream, shape: Shape) -> Bools:
    """Every other key, shifted by one from row to row and from head to head."""
    batch, head, row, key = np.indices(shape, sparse=True)
    return np.asarray((batch + head + row + key) % 2 == 0)


def _empty_rows(stream: Stream, shape: Shape) -> Bools:
    """Random, and every third row sees no key: rows without a softmax."""
    batch, head, row, _ = np.indices(shape, sparse=True)
    return np.asarray(stream.bernoulli(shape, 0.5) & ((batch + head + row) % 3 != 1))


def _nothing(stream: Stream, shape: Shape) -> Bools:
    """No key visible anywhere: out 0, LSE -inf, all gradients 0."""
    return np.zeros(shape, dtype=bool)


def _first_tile(stream: Stream, shape: Shape) -> Bools:
    """The first tiles hidden (128 keys, at most half): the running maximum stays at -inf."""
    hidden = min(TILE, shape[-1] // 2)
    return np.broadcast_to(np.arange(shape[-1]) >= hidden, shape).copy()


def _last_tile(stream: Stream, shape: Shape) -> Bools:
    """The last tiles hidden (128 keys, at most half): what they hold must not count."""
    hidden = min(TILE, shape[-1] // 2)
    return np.broadcast_to(np.arange(shape[-1]) < shape[-1] - hidden, shape).copy()


def _row_prefix(stream: Stream, shape: Shape) -> Bools:
    """Each row sees a random number of leading keys (0 to all): a tile may be partly visible."""
    lengths = stream.integers((*shape[:-1], 1), 0, shape[-1])
    return np.asarray(np.arange(shape[-1]) < lengths)


def _tiles(stream: Stream, shape: Shape) -> Bools:
    """A checkerboard of 64 x 64 blocks: tiles and splits without any visible key."""
    _, head, row, key = np.indices(shape, sparse=True)
    return np.broadcast_to((head + row // 64 + key // 64) % 2 == 0, shape).copy()


def _one_key(stream: Stream, shape: Shape) -> Bools:
    """One visible key per row, at random: the output is a row of V, exactly."""
    chosen = stream.integers((*shape[:-1], 1), 0, max(shape[-1] - 1, 0))
    return np.asarray(np.arange(shape[-1]) == chosen)


MASK_PATTERNS: Mapping[str, Callable[[Stream, Shape], Bools]] = {
    "random": _random,
    "sparse": _sparse,
    "alternate": _alternate,
    "empty-rows": _empty_rows,
    "nothing": _nothing,
    "first-tile": _first_tile,
    "last-tile": _last_tile,
    "row-prefix": _row_prefix,
    "tiles": _tiles,
    "one-key": _one_key,
}


def _normal(stream: Stream, shape: Shape) -> Floats:
    """N(0, 1): sign, indexing, strides and broadcasting of the bias."""
    return stream.normal(shape)


def _large(stream: Stream, shape: Shape) -> Floats:
    """N(0, 1e4): scores near the largest number of fp16, one key dominates."""
    return stream.normal(shape, 1e4)


def _constant(stream: Stream, shape: Shape) -> Floats:
    """5 everywhere: shifts the LSE and nothing else."""
    return np.full(shape, 5.0, dtype=np.float32)


def _neginf_prefix(stream: Stream, shape: Shape) -> Floats:
    """N(0, 1), and -inf on the first tiles (128 keys, at most half): exp(-inf - -inf) is NaN."""
    bias = stream.normal(shape)
    bias[..., : min(TILE, shape[-1] // 2)] = -np.inf
    return bias


def _neginf_random(stream: Stream, shape: Shape) -> Floats:
    """N(0, 1), and -inf on half of the keys, at random: a mask in the form of a bias."""
    bias = stream.normal(shape)
    bias[stream.bernoulli(shape, 0.5)] = -np.inf
    return bias


def _neginf_rows(stream: Stream, shape: Shape) -> Floats:
    """N(0, 1), and every third row all -inf: rows without a softmax, through the bias."""
    batch, head, row, _ = np.indices(shape, sparse=True)
    hidden = (batch + head + row) % 3 == 1
    return np.where(hidden, np.float32(-np.inf), stream.normal(shape))


def _lowest_rows(stream: Stream, shape: Shape) -> Floats:
    """N(0, 1), and every third row at -3e4 throughout: hidden by a finite number, so visible."""
    batch, head, row, _ = np.indices(shape, sparse=True)
    low = (batch + head + row) % 3 == 1
    return np.where(low, np.float32(-3e4), stream.normal(shape))


BIAS_PATTERNS: Mapping[str, Callable[[Stream, Shape], Floats]] = {
    "normal": _normal,
    "large": _large,
    "constant": _constant,
    "neginf-prefix": _neginf_prefix,
    "neginf-random": _neginf_random,
    "neginf-rows": _neginf_rows,
    "lowest-rows": _lowest_rows,
}


def pattern(registry: Mapping[str, Any], name: str, field: str) -> Any:
    """The entry of that name; ValueError naming the field and the known names if unknown."""
    if name not in registry:
        raise ValueError(f"{field}={name!r}: unknown; known are {', '.join(sorted(registry))}")
    return registry[name]
