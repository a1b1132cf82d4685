"""Random problems for the calibration: everything that a kernel supports, wildly mixed."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from attn_reference.problem import Problem

from ..backend import Capabilities

ATTEMPTS = 500
# Mostly normal inputs, whose query scale goes from 0 (all scores equal) to 300 (all but one-hot).
QUERY_SCALES = ("0", "0.01", "0.25", "1", "1", "1", "2", "4", "30", "300")
STRUCTURED = (
    "needles", "equal", "large", "tiny", "duplicated", "outliers", "one-hot", "rising", "falling",
)  # fmt: skip
MASKS = ("random", "sparse", "empty-rows", "first-tile", "row-prefix", "tiles", "one-key")
BIASES = (
    "normal", "large", "constant", "neginf-prefix", "neginf-random", "neginf-rows", "lowest-rows",
)  # fmt: skip
MASK_SHAPES = ("bhqk", "11qk", "b11k", "bh1k")


@dataclass(frozen=True, kw_only=True)
class Space:
    """Where the random problems are drawn from."""

    seqlens: tuple[int, ...]  # (smallest, largest), evenly in the logarithm; or a set of lengths
    head_dims: tuple[int, ...]
    scores: int  # score elements at most
    any_length: bool = True  # seqlens are bounds, not a set
    structured: float = 0.25  # share of problems with structured inputs
    shares: tuple[tuple[str, float], ...] = ()  # of features, where not FEATURE_SHARE
    most: int = 2  # batch entries, and key/value heads


FEATURE_SHARE = 0.25
CPU = Space(
    seqlens=(1, 512), head_dims=(8, 16, 24, 32, 40, 64, 72, 96, 128), scores=1 << 18
)  # fmt: skip
CUDA = Space(
    seqlens=(1, 1500), head_dims=(32, 40, 64, 72, 80, 96, 128, 160, 192, 256), scores=1 << 22
)  # fmt: skip
# A compiled kernel is compiled again for each shape: few of them.
COMPILED = Space(
    seqlens=(128, 1024),
    any_length=False,
    head_dims=(64, 128),
    scores=1 << 23,
    structured=0.1,
    shares=(("softcap", 1.0), ("scale", 0.0)),
    most=1,
)


def random_problem(
    index: int, dtype: str, capabilities: Capabilities, space: Space, seed: int = 0
) -> Problem:
    """The problem of that number: the same for the same arguments.

    Raises ValueError when the capabilities leave nothing that the space holds.
    """
    rng = np.random.default_rng([seed, index, zlib.crc32(dtype.encode())])
    for _ in range(ATTEMPTS):
        problem = _draw(rng, dtype, capabilities, space, seed=index)
        if problem is not None and not capabilities.unsupported_reasons(problem):
            return problem
    raise ValueError(
        f"dtype={dtype!r}: none of {ATTEMPTS} random problems was supported "
        f"({'; '.join(capabilities.unsupported_reasons(Problem(dtype=dtype)))})"
    )


def _draw(
    rng: np.random.Generator, dtype: str, capabilities: Capabilities, space: Space, seed: int
) -> Problem | None:
    """One attempt; None when what was drawn contradicts itself."""
    shares = dict(space.shares)

    def wants(feature: str) -> bool:
        share = shares.get(feature, FEATURE_SHARE)
        return rng.random() < share and feature in capabilities.features

    def one_of(values: tuple[str, ...]) -> str:
        return str(values[rng.integers(len(values))])

    seqlen_q, seqlen_k = _length(rng, space), _length(rng, space)
    if rng.random() < 0.4:
        seqlen_k = seqlen_q
    kv_heads = int(rng.integers(1, space.most + 1))
    group = int(rng.integers(2, 4)) if wants("gqa") else 1
    batch = int(rng.integers(1, space.most + 1))
    while batch * kv_heads * group * seqlen_q * seqlen_k > space.scores:
        if seqlen_q * seqlen_k > space.scores:
            return None
        batch, kv_heads, group = max(1, batch - 1), max(1, kv_heads - 1), max(1, group - 1)
    head_dim = int(rng.choice(space.head_dims))
    values: dict[str, object] = {
        "batch": batch,
        "heads_q": kv_heads * group,
        "heads_kv": kv_heads,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
        "head_dim": head_dim,
        "head_dim_v": int(rng.choice(space.head_dims)) if wants("head_dim_v") else head_dim,
        "dtype": dtype,
        "seed": seed,
    }
    causal = [c for c in ("top-left", "bottom-right") if f"causal {c}" in capabilities.features]
    if causal and rng.random() < 0.4:
        values["causal"] = one_of(tuple(causal))
    if wants("window"):
        sides = [None if rng.random() < 0.3 else int(rng.integers(0, 80)) for _ in range(2)]
        values["window"] = tuple(sides)
    if wants("boolean mask"):
        values |= {"mask": one_of(MASKS), "mask_shape": one_of(MASK_SHAPES)}
    if wants("bias"):
        values |= {"bias": one_of(BIASES), "bias_shape": one_of(MASK_SHAPES)}
    if wants("softcap"):
        values["softcap"] = float(rng.choice((2.0, 15.0, 50.0)))
    if wants("scale"):
        values["scale"] = float(rng.choice((0.05, 0.3, 1.0)))
    values |= {"alibi": wants("alibi"), "sinks": wants("sinks")}
    if wants("key lengths"):
        values["key_lengths"] = tuple(int(n) for n in rng.integers(0, seqlen_k + 1, size=batch))
    if wants("dropout"):
        values["dropout"] = float(rng.choice((0.1, 0.5)))
    structured = rng.random() < space.structured
    values["distribution"] = one_of(STRUCTURED) if structured else f"normal:{one_of(QUERY_SCALES)}"
    names = {"bias": "bias" in values, "sinks": bool(values["sinks"])}
    values["gradients"] = tuple(n for n in capabilities.gradients if names.get(n, True))
    values["lse_gradient"] = bool(values["gradients"]) and wants("lse gradient")
    return Problem(**values)  # type: ignore[arg-type]


def _length(rng: np.random.Generator, space: Space) -> int:
    if not space.any_length:
        return int(rng.choice(space.seqlens))
    low, high = space.seqlens
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))
