"""The smallest problem that still fails: greedy, one change at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from attn_reference.problem import Problem

# Fields that are dropped one at a time, with the value that stands for their absence.
FEATURES: dict[str, object] = {
    "lse_gradient": False,
    "gradients": (),
    "dropout": 0.0,
    "sinks": False,
    "bias": None,
    "mask": None,
    "alibi": False,
    "softcap": 0.0,
    "window": None,
    "key_lengths": None,
    "page_size": None,
    "causal": "none",
    "scale": None,
    "layouts": (),
    "distribution": "normal",
}
SMALL_DIM = 8

Changes = Mapping[str, object]


def shrink(
    problem: Problem, fails: Callable[[Problem], bool], seconds: float
) -> tuple[Problem, int]:
    """The smallest problem found that ``fails``, and how many were tried in the time given.

    ``fails`` is asked about smaller and smaller problems; ``problem`` itself is known to.
    """
    deadline = time.monotonic() + seconds
    tried = {problem}
    shrunk = True
    while shrunk:
        shrunk = False
        for candidate in smaller(problem):
            if candidate in tried:
                continue
            if time.monotonic() > deadline:
                return problem, len(tried) - 1
            tried.add(candidate)
            if fails(candidate):
                problem, shrunk = candidate, True
                break
    return problem, len(tried) - 1


def smaller(problem: Problem) -> Iterator[Problem]:
    """Problems a step simpler, the boldest steps first; those that make no sense are left out."""
    for changes in _steps(problem):
        try:
            yield problem.replace(**changes)
        except ValueError:
            continue


def _steps(p: Problem) -> Iterator[Changes]:
    yield from _features(p)
    if p.packed is not None:
        yield from _packed(p.packed)
    else:
        yield from _batch(p)
        yield from _lengths(p)
    yield from _heads(p)
    yield from _dims(p)
    yield {"seed": 0}


def _features(p: Problem) -> Iterator[Changes]:
    for name, absent in FEATURES.items():
        if getattr(p, name) == absent:
            continue
        if name == "gradients":
            yield {"gradients": (), "lse_gradient": False}
            yield from ({"gradients": (kept,)} for kept in p.gradients if len(p.gradients) > 1)
        elif name in ("bias", "sinks"):
            yield {name: absent, "gradients": tuple(g for g in p.gradients if g != name)}
        elif name == "layouts":
            yield {"layouts": ()}
            yield from ({"layouts": (kept,)} for kept in p.layouts if len(p.layouts) > 1)
        else:
            yield {name: absent}
    if p.window is not None and None not in p.window:
        yield {"window": (p.window[0], None)}
        yield {"window": (None, p.window[1])}


def _packed(packed: tuple[tuple[int, int], ...]) -> Iterator[Changes]:
    if len(packed) > 1:
        half = len(packed) // 2
        yield {"packed": packed[:half]}
        yield {"packed": packed[half:]}
        for i in range(len(packed)):
            yield {"packed": packed[:i] + packed[i + 1 :]}
    for i, (a, b) in enumerate(packed):
        for len_q in _shorter(a):
            yield {"packed": (*packed[:i], (len_q, b), *packed[i + 1 :])}
        for len_k in _shorter(b):
            yield {"packed": (*packed[:i], (a, len_k), *packed[i + 1 :])}


def _batch(p: Problem) -> Iterator[Changes]:
    if p.batch < 2:
        return
    if p.key_lengths is None:
        yield {"batch": 1}
        yield {"batch": p.batch // 2}
    else:
        for length in dict.fromkeys(p.key_lengths):
            yield {"batch": 1, "key_lengths": (length,)}
        yield {"batch": p.batch - 1, "key_lengths": p.key_lengths[:-1]}
        yield {"batch": p.batch - 1, "key_lengths": p.key_lengths[1:]}


def _lengths(p: Problem) -> Iterator[Changes]:
    """Shorter sequences; both at once where they are equal, so that alignment stays."""

    def cut(keys: int) -> dict[str, object]:
        if p.key_lengths is None:
            return {"seqlen_k": keys}
        return {"seqlen_k": keys, "key_lengths": tuple(min(n, keys) for n in p.key_lengths)}

    if p.seqlen_q == p.keys:
        yield from ({"seqlen_q": n} | cut(n) for n in _shorter(p.keys))
    yield from ({"seqlen_q": n} for n in _shorter(p.seqlen_q))
    yield from (cut(n) for n in _shorter(p.keys))
    if p.key_lengths is not None:
        for i, length in enumerate(p.key_lengths):
            for n in _shorter(length):
                yield {"key_lengths": (*p.key_lengths[:i], n, *p.key_lengths[i + 1 :])}


def _heads(p: Problem) -> Iterator[Changes]:
    if p.heads_q == 1:
        return
    yield {"heads_q": 1, "heads_kv": 1}
    if p.group > 1:
        yield {"heads_q": p.group, "heads_kv": 1}
        yield {"heads_q": 2 * p.kv_heads, "heads_kv": p.kv_heads}
    if p.kv_heads > 1:
        yield {"heads_q": p.kv_heads, "heads_kv": p.kv_heads}
        half = p.kv_heads // 2
        yield {"heads_q": half * p.group, "heads_kv": half}
        yield {"heads_q": p.heads_q - p.group, "heads_kv": p.kv_heads - 1}


def _dims(p: Problem) -> Iterator[Changes]:
    if p.value_dim != p.head_dim:
        yield {"head_dim_v": p.head_dim}
        yield {"head_dim": p.value_dim}
    for size in (SMALL_DIM, p.head_dim // 2 // SMALL_DIM * SMALL_DIM):
        if 0 < size < p.head_dim:
            same = {"head_dim_v": size} if p.value_dim == p.head_dim else {}
            yield {"head_dim": size} | same


def _shorter(length: int) -> list[int]:
    """A few lengths below this one, from the shortest: tiny, around powers of two, one less."""
    powers = [n for n in (16, 32, 64, 128, 256, 512, 1024) if n < length]
    around = [m for n in powers for m in (n, n + 1)]
    candidates = [1, 2, 3, *around, length // 2, length - 1]
    return sorted({n for n in candidates if 0 < n < length})
