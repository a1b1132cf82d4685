"""Random numbers that are the same bits on every machine.

Only the raw 64-bit words of a counter-based generator (Philox 4x64-10, Salmon et al. 2011)
are used, and exact or singly rounded arithmetic on them: no logarithm, sine or vectorised
exponential, whose last bits differ between libraries and processors.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
Floats = NDArray[np.float32]

_CHUNK = 1 << 18  # numbers made at a time, so that temporaries stay small
_LANES = np.uint64(0x0000FFFF0000FFFF)
_LOW = np.uint64(0xFFFFFFFF)
# A sum of eight 16-bit uniforms has mean 8 (2^16 - 1)/2 and variance 8 (2^32 - 1)/12.
_MEAN = 262140.0
_PER_DEVIATION = 1.0 / 53509.91992145008


class Stream:
    """The numbers of one tensor: ``Stream(seed, name)`` always gives the same ones in turn."""

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
        self._words = np.random.Philox(key=int.from_bytes(digest, "little"))

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next ``count`` raw words, uint64."""
        raw: NDArray[np.uint64] = np.asarray(self._words.random_raw(count), dtype=np.uint64)
        return raw

    def normal(self, shape: Shape, scale: float = 1.0) -> Floats:
        """Nearly normal numbers of mean 0 and standard deviation ``scale``: float32.

        Each is a sum of eight 16-bit uniforms, hence within 4.9 standard deviations.
        """
        count = math.prod(shape)
        numbers = np.empty(count, dtype=np.float32)
        factor = _PER_DEVIATION * scale
        for start in range(0, count, _CHUNK):
            piece = numbers[start : start + _CHUNK]
            words = self.words(2 * len(piece))
            lanes = (words & _LANES) + ((words >> np.uint64(16)) & _LANES)  # two sums of two each
            lanes = lanes[0::2] + lanes[1::2]
            sums = (lanes & _LOW) + (lanes >> np.uint64(32))
            piece[:] = (sums.astype(np.float64) - _MEAN) * factor
        return numbers.reshape(shape)

    def integers(self, shape: Shape, low: int, high: int) -> NDArray[np.int64]:
        """Integers from ``low`` to ``high``, both included: int64."""
        words = self.words(math.prod(shape)) % np.uint64(high - low + 1)
        return (words.astype(np.int64) + low).reshape(shape)

    def bernoulli(self, shape: Shape, probability: float) -> NDArray[np.bool_]:
        """True with that probability, to a multiple of 2^-16."""
        threshold = np.uint64(round(probability * 65536))
        kept = (self.words(math.prod(shape)) & np.uint64(0xFFFF)) < threshold
        return kept.reshape(shape)

    def permutation(self, count: int) -> NDArray[np.int64]:
        """The numbers 0 to count - 1 in random order: int64."""
        order: NDArray[np.int64] = np.argsort(self.words(count), kind="stable").astype(np.int64)
        return order
