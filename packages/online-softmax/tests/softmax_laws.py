"""The laws of the softmax state: plain functions that raise AssertionError where one is broken.

Each takes an ``Implementation``, so that the package and copies of it with a fault go through the
same code; which inputs it is given is the business of the tests.

Where the bounds come from: let w_j = b^(x_j - m) be the exact weight of key j, u the unit
roundoff. Maxima are exact. A key's computed weight is a product of exponentials b^(m_i - m_(i+1))
along its way from its own block to the whole, and rounding the arguments errs by at most
u (m_(i+1) - m_i); m never falls, so these telescope to u (m - x_j), a factor of
e^(ln b · u (m - x_j)). To that come, for each merge on the way, an exponential (2 u: 1 ulp), a
product and an addition (u each); for the block itself an exponential, and a sum of N terms; for o
the product with the value. Numbers below the smallest normal one may be lost altogether. Nothing
else happens to a state, and nothing of it is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from online_softmax import arithmetic, state
from online_softmax.arithmetic import TWO, Base, E
from online_softmax.state import State


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """The operations of states that the laws speak of; those of the package, unless given."""

    identity: Callable[..., State] = state.identity
    state_of: Callable[..., State] = state.state_of
    merge: Callable[..., State] = state.merge
    absorb: Callable[..., State] = state.absorb
    fold: Callable[..., State] | None = None  # None: one after the other by ``merge``
    fold_tree: Callable[..., State] | None = None  # None: in pairs by ``merge``
    output: Callable[..., Tensor] = state.output
    lse: Callable[..., Tensor] = state.lse

    def folded(self, states: Iterable[State], base: Base) -> State:
        """The states merged one after the other."""
        if self.fold is not None:
            return self.fold(states, base)
        return reduce(lambda a, b: self.merge(a, b, base), states)

    def folded_as_tree(self, states: Sequence[State], base: Base) -> State:
        """The states merged in pairs, and pairs of pairs."""
        if self.fold_tree is not None:
            return self.fold_tree(states, base)
        level = list(states)
        while len(level) > 1:
            odd = level[len(level) // 2 * 2 :]
            level = [
                self.merge(a, b, base) for a, b in zip(level[::2], level[1::2], strict=False)
            ] + odd
        return level[0]


RIGHT = Implementation(fold=state.fold, fold_tree=state.fold_tree)


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Keys of some rows: scores (R, N) in the base, values (N, Dv)."""

    scores: Tensor
    values: Tensor
    base: Base = E

    def __getitem__(self, part: Any) -> Keys:
        """Some of the keys: a slice, or indices."""
        return Keys(scores=self.scores[:, part], values=self.values[part], base=self.base)

    def split(self, cuts: Iterable[int]) -> list[Keys]:
        """The keys cut at these points; cuts that coincide give parts of no key."""
        ends = [0, *sorted(cuts), self.scores.shape[-1]]
        return [self[a:b] for a, b in pairwise(ends)]

    def shifted(self, by: float) -> Keys:
        """With every score so much higher."""
        return Keys(scores=self.scores + by, values=self.values, base=self.base)

    @property
    def roundoff(self) -> float:
        """u of the dtype."""
        return torch.finfo(self.scores.dtype).eps / 2


def truth(keys: Keys) -> State:
    """(m, d, o) by their definition, in fp64."""
    x, v = keys.scores.double(), keys.values.double()
    m = x.amax(-1) if x.shape[-1] else x.new_full(x.shape[:-1], -math.inf)
    w = _weights(x, m, keys.base)
    return State(m=m, d=w.sum(-1), o=w @ v)


def allowed(keys: Keys, merges: int) -> State:
    """How far d and o may be from the truth after so many merges, in fp64; m not at all.

    The bound of the module's docstring, and the rounding of the truth itself.
    """
    x, v = keys.scores.double(), keys.values.double()
    m, n = truth(keys).m, x.shape[-1]
    w = _weights(x, m, keys.base)
    u = keys.roundoff + torch.finfo(torch.float64).eps / 2
    distance = (finite(m)[:, None] - x).masked_fill(w == 0, 0.0) * natural_log(keys.base)
    # Several factors 1 + e that err by r in total are a factor between 1 - (e^r - 1) and e^r.
    factor = torch.expm1(u * (distance + n + 4 * merges + 4))
    lost = torch.finfo(keys.scores.dtype).tiny * (merges + 1) * (n + 2)
    largest = v.abs().max().item() if v.numel() else 0.0
    return State(
        m=torch.zeros_like(m),
        d=(w * factor).sum(-1) + lost,
        o=(w * factor) @ v.abs() + lost * (1 + largest),
    )


def allowed_results(keys: Keys, merges: int) -> tuple[Tensor, Tensor]:
    """The same for out = o / d and for the LSE in nats; a division or logarithm more."""
    exact, error, u = truth(keys), allowed(keys, merges), 2 * keys.roundoff
    d = exact.d.masked_fill(exact.d == 0, 1.0)
    out = (exact.o / d[:, None]).abs()
    assert (error.d < d / 2).all(), "the inputs are too many for a bound"
    error_out = (error.o + out * error.d[:, None]) / (d - error.d)[:, None]
    tiny = torch.finfo(keys.scores.dtype).tiny
    error_log = error.d / (d - error.d) + 2 * u * d.log().abs()
    # The sum m + log d, and its way to nats: three roundings of numbers of that size.
    size = natural_log(keys.base) * finite(exact.m).abs() + d.log().abs()
    return error_out + 2 * u * (out + error_out) + tiny, error_log + 3 * u * size + tiny


def whole(impl: Implementation, keys: Keys) -> State:
    """The state of all keys at once."""
    return impl.state_of(keys.scores, keys.values, keys.base)


def nothing(impl: Implementation, keys: Keys) -> State:
    """The state of no key, for the same rows."""
    rows = keys.scores.shape[:-1]
    return impl.identity(rows, keys.values.shape[-1], keys.scores)


def absorbed(impl: Implementation, keys: Keys, parts: Iterable[Keys]) -> State:
    """The keys taken in part by part, from no key on."""
    running = nothing(impl, keys)
    for part in parts:
        running = taken_in(impl, running, part)
    return running


def taken_in(impl: Implementation, running: State, part: Keys) -> State:
    """The state after some keys more."""
    return impl.absorb(running, part.scores, lambda p: p @ part.values, part.base)


# The laws.


def merge_is_commutative(impl: Implementation, keys: Keys, cut: int) -> None:
    """Bit for bit: maximum and addition are."""
    a, b = (whole(impl, part) for part in keys.split([cut]))
    require_same(impl.merge(a, b, keys.base), impl.merge(b, a, keys.base), "a, b and b, a")


def merge_is_associative(impl: Implementation, keys: Keys, cuts: tuple[int, int]) -> None:
    """(a b) c = a (b c) = the state of all keys."""
    a, b, c = (whole(impl, part) for part in keys.split(cuts))
    base = keys.base
    left = impl.merge(impl.merge(a, b, base), c, base)
    right = impl.merge(a, impl.merge(b, c, base), base)
    require_close(left, truth(keys), allowed(keys, 2), "(a b) c")
    require_close(right, truth(keys), allowed(keys, 2), "a (b c)")
    require_close(left, right, twice(allowed(keys, 2)), "(a b) c and a (b c)")


def identity_is_neutral(impl: Implementation, keys: Keys) -> None:
    """Bit for bit, on either side, for the state of no key too, which has no out and LSE -inf."""
    nil, all_keys, base = nothing(impl, keys), whole(impl, keys), keys.base
    require_same(impl.merge(nil, all_keys, base), all_keys, "the identity, then a state")
    require_same(impl.merge(all_keys, nil, base), all_keys, "a state, then the identity")
    require_same(impl.merge(nil, nil, base), nil, "the identity twice")
    require_same(whole(impl, keys[:0]), nil, "the state of no key")
    require_same(taken_in(impl, nil, keys), all_keys, "keys absorbed by the identity")
    require_same(taken_in(impl, all_keys, keys[:0]), all_keys, "no key absorbed")
    require(bool((impl.output(nil) == 0).all()), "out of the identity is not 0")
    require(bool((impl.lse(nil, base) == -math.inf).all()), "LSE of the identity is not -inf")


def empty_states_change_no_bit(impl: Implementation, keys: Keys, cuts: Sequence[int]) -> None:
    """States that saw no key may be merged in anywhere."""
    states = [whole(impl, part) for part in keys.split(cuts)]
    hidden = whole(
        impl,
        Keys(scores=torch.full_like(keys.scores, -math.inf), values=keys.values, base=keys.base),
    )
    nil = nothing(impl, keys)
    among = [nil, *(s for one in states for s in (one, hidden, nil))]
    require_same(
        impl.folded(among, keys.base), impl.folded(states, keys.base), "empty states among others"
    )


def splits_do_not_matter(
    impl: Implementation, keys: Keys, cuts: Sequence[int], order: Sequence[int]
) -> None:
    """Keys split at any points and merged in any order, in sequence or as a tree."""
    states = [whole(impl, part) for part in keys.split(cuts)]
    shuffled = [states[n] for n in order]
    budget = allowed(keys, len(states))
    for name, found in {
        "in sequence": impl.folded(states, keys.base),
        "in another order": impl.folded(shuffled, keys.base),
        "as a tree": impl.folded_as_tree(states, keys.base),
        "as a tree in another order": impl.folded_as_tree(shuffled, keys.base),
    }.items():
        require_close(found, truth(keys), budget, name)


def absorb_is_merge(impl: Implementation, keys: Keys, cuts: Sequence[int]) -> None:
    """absorb(s, x) = merge(s, state_of(x)), part by part."""
    parts = keys.split(cuts)
    running, done = nothing(impl, keys), 0
    for part in parts:
        done += part.scores.shape[-1]
        merged = impl.merge(running, whole(impl, part), keys.base)
        running = taken_in(impl, running, part)
        budget = twice(allowed(keys[:done], len(parts)))
        require_close(running, merged, budget, f"absorb and merge after {done} keys")


def one_pass_is_two_pass(impl: Implementation, keys: Keys) -> None:
    """Key by key: rescaled as the maximum rises, or with the final maximum from the start."""
    n = keys.scores.shape[-1]
    one = absorbed(impl, keys, keys.split(range(1, n)))
    m = keys.scores.amax(-1)  # pass 1
    d, o = nothing(RIGHT, keys).d, nothing(RIGHT, keys).o
    for j in range(n):  # pass 2
        w = _weights(keys.scores[:, j : j + 1], m, keys.base)
        d, o = d + w[:, 0], o + w * keys.values[j]
    two = State(m=m, d=d, o=o)
    require_close(one, two, twice(allowed(keys, n)), "one pass and two")
    require_results(impl, one, keys, n, "one pass")


def maximum_is_monotone(impl: Implementation, keys: Keys) -> None:
    """m is the maximum of what was seen, never falls, and d >= 1 as soon as a key was seen.

    (In floating point too: the key of the maximum adds b^0, or was there and is rescaled by it.)
    """
    running = nothing(impl, keys)
    for j in range(keys.scores.shape[-1]):
        after = taken_in(impl, running, keys[j : j + 1])
        seen = keys.scores[:, : j + 1].amax(-1)
        require(torch.equal(after.m, seen), f"m is not the maximum of {j + 1} keys")
        require(bool((after.m >= running.m).all()), "m falls")
        require(torch.equal(after.d >= 1, seen > -math.inf), f"d < 1 after {j + 1} keys")
        running = after


def scores_shift(impl: Implementation, keys: Keys, by: float, cuts: Sequence[int]) -> None:
    """Scores + c: m + c, the same d and o, bit for bit, where no score + c is rounded."""
    moved = keys.shifted(by)
    assert torch.equal(moved.scores.double(), keys.scores.double() + by), "the shift is rounded"
    found = absorbed(impl, moved, moved.split(cuts))
    expected = absorbed(impl, keys, keys.split(cuts))
    shifted = State(m=expected.m + by, d=expected.d, o=expected.o)
    require_same(found, shifted, f"scores higher by {by}")


def values_shift(impl: Implementation, keys: Keys, by: float, cuts: Sequence[int]) -> None:
    """Values + c: out + c, where a key was seen."""
    moved = Keys(scores=keys.scores, values=keys.values + by, base=keys.base)
    assert torch.equal(moved.values.double(), keys.values.double() + by), "the shift is rounded"
    merges = len(keys.split(cuts))
    out = impl.output(absorbed(impl, keys, keys.split(cuts))).double()
    found = impl.output(absorbed(impl, moved, moved.split(cuts))).double()
    seen = truth(keys).d > 0
    budget = allowed_results(keys, merges)[0] + allowed_results(moved, merges)[0]
    require_within(
        (found - out - by)[seen], budget[seen], f"out of values higher by {by}, and out + {by}"
    )


def bases_agree(impl: Implementation, keys: Keys, cuts: Sequence[int]) -> None:
    """Natural scores in base e, and multiplied by log2(e) in base 2, have one out and one LSE."""
    merges = len(keys.split(cuts))
    inside = Keys(scores=TWO.scores(keys.scores), values=keys.values, base=TWO)
    one = absorbed(impl, keys, keys.split(cuts))
    other = impl.folded([whole(impl, part) for part in inside.split(cuts)], TWO)
    third = absorbed(impl, inside, inside.split(cuts))
    require_results(impl, one, keys, merges, "base e")
    # What the multiplication does to the scores is no fault of the state: its truth is theirs.
    require_results(impl, other, inside, merges, "base 2, merged")
    require_results(impl, third, inside, merges, "base 2, absorbed")
    # Each score, and the maximum, is off by a rounding of the product and one of log2(e).
    off = 2 * keys.roundoff * keys.scores.double().masked_fill(keys.scores == -math.inf, 0).abs()
    spread = torch.expm1(4 * off.amax(-1))[:, None]
    budget = [
        a + b
        for a, b in zip(allowed_results(keys, merges), allowed_results(inside, merges), strict=True)
    ]
    largest = keys.values.double().abs().max()
    out = impl.output(one).double() - impl.output(other).double()
    require_within(out, budget[0] + 2 * spread * largest, "out in base e and in base 2")
    seen = truth(keys).d > 0
    lse = (impl.lse(one, E).double() - impl.lse(other, TWO).double())[seen]
    require_within(lse, (budget[1] + 2 * off.amax(-1))[seen], "LSE in base e and in base 2")


def nothing_is_nan(impl: Implementation, keys: Keys, cuts: Sequence[int]) -> None:
    """Whatever the scores: no NaN, and no infinity but m and LSE of rows that saw no key."""
    states = [whole(impl, part) for part in keys.split(cuts)]
    for name, found in {
        "at once": whole(impl, keys),
        "merged": impl.folded(states, keys.base),
        "absorbed": absorbed(impl, keys, keys.split(cuts)),
    }.items():
        empty = (keys.scores == -math.inf).all(-1)
        out, lse = impl.output(found), impl.lse(found, keys.base)
        for what, value in {"d": found.d, "o": found.o, "out": out}.items():
            require(bool(value.isfinite().all()), f"{what} is not finite, {name}")
        for what, value in {"m": found.m, "LSE": lse}.items():
            require(torch.equal(value == -math.inf, empty), f"{what} and empty rows, {name}")
            require(bool(value[~empty].isfinite().all()), f"{what} is not finite, {name}")
        require(bool((out[empty] == 0).all()), f"out of rows without a key is not 0, {name}")


# Exactly, in rationals.


class Rational(Base):
    """Base 2 over numpy arrays of fractions, with whole scores: nothing is rounded."""

    def rescale(self, old: Any, new: Any) -> Any:
        """2^(old - new); 0 for -inf."""
        return np.frompyfunc(_two_to_the, 2, 1)(old, new)


def _two_to_the(old: Any, new: Any) -> Fraction:
    return Fraction(0) if old == -math.inf else Fraction(2) ** int(old - new)


RATIONAL = Rational(name="2", power=np.exp2, logarithm=np.log2, maximum=np.maximum)


def merge_is_exact_in_rationals(
    impl: Implementation, keys: Keys, cuts: Sequence[int], order: Sequence[int]
) -> None:
    """Associative, commutative, neutral identity, and any order: equal, not nearly so."""
    rows = range(keys.scores.shape[0])
    value_dim = keys.values.shape[-1]
    scores = [[x if x == -math.inf else int(x) for x in row] for row in keys.scores.tolist()]
    values = [[Fraction(v) for v in row] for row in keys.values.tolist()]

    def array(nested: list[Any], *shape: int) -> Any:
        made = np.empty(shape, dtype=object)
        for place in np.ndindex(*shape):
            made[place] = nested[place[0]] if len(place) == 1 else nested[place[0]][place[1]]
        return made

    def over(part: Sequence[int]) -> State:
        """The state of some keys by its definition."""
        m = [max((scores[r][j] for j in part), default=-math.inf) for r in rows]
        w = [[_two_to_the(scores[r][j], m[r]) for j in part] for r in rows]
        d = [sum(w[r], Fraction(0)) for r in rows]
        o = [
            [
                sum((w[r][n] * values[j][e] for n, j in enumerate(part)), Fraction(0))
                for e in range(value_dim)
            ]
            for r in rows
        ]
        return State(m=array(m, len(rows)), d=array(d, len(rows)), o=array(o, len(rows), value_dim))

    def same(found: State, expected: State, what: str) -> None:
        for name in ("m", "d", "o"):
            one, other = getattr(found, name), getattr(expected, name)
            require(bool((one == other).all()), f"{what}: {name} is {one}, not {other}")

    keys_of = [list(part) for part in _cut(range(keys.scores.shape[-1]), cuts)]
    states = [over(part) for part in keys_of]
    nil, right = over([]), over(range(keys.scores.shape[-1]))
    shuffled = [states[n] for n in order]
    same(impl.folded(states, RATIONAL), right, "in sequence")
    same(impl.folded(shuffled, RATIONAL), right, "in another order")
    same(impl.folded_as_tree(shuffled, RATIONAL), right, "as a tree")
    same(impl.merge(nil, right, RATIONAL), right, "the identity, then a state")
    same(impl.merge(right, nil, RATIONAL), right, "a state, then the identity")
    for a, b in pairwise(states):
        same(impl.merge(a, b, RATIONAL), impl.merge(b, a, RATIONAL), "a, b and b, a")
    for a, b, c in zip(states, states[1:], states[2:], strict=False):
        left = impl.merge(impl.merge(a, b, RATIONAL), c, RATIONAL)
        same(left, impl.merge(a, impl.merge(b, c, RATIONAL), RATIONAL), "(a b) c and a (b c)")


def _cut(keys: Sequence[int], cuts: Iterable[int]) -> list[Sequence[int]]:
    ends = [0, *sorted(cuts), len(keys)]
    return [keys[a:b] for a, b in pairwise(ends)]


# All of them, on one sample.


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a law is tried on: scores (rows of keys), values (keys of columns), and how they are
    cut, ordered and shifted."""

    scores: Sequence[Sequence[float]]
    values: Sequence[Sequence[float]]
    cuts: tuple[int, ...] = (1, 2)
    order: tuple[int, ...] = (2, 0, 1)
    by: float = 8.0

    def keys(self, dtype: torch.dtype, base: Base) -> Keys:
        """The keys as tensors."""
        scores, values = (torch.tensor(x, dtype=dtype) for x in (self.scores, self.values))
        return Keys(scores=scores, values=values, base=base)


def rounded(keys: Keys, step: float) -> Keys:
    """The same with scores and values that are multiples of a step, and at most 64 or -inf."""
    scores, values = ((x.clamp(-64, 64) / step).round() * step for x in (keys.scores, keys.values))
    scores = scores.masked_fill(keys.scores == -math.inf, -math.inf)
    return Keys(scores=scores, values=values, base=keys.base)


Law = Callable[[Implementation, Keys, Sample], None]
LAWS: dict[str, Law] = {
    "commutative": lambda i, k, s: merge_is_commutative(i, k, s.cuts[0]),
    "associative": lambda i, k, s: merge_is_associative(i, k, s.cuts[:2]),
    "exact": lambda i, k, s: merge_is_exact_in_rationals(i, rounded(k, 1.0), s.cuts, s.order),
    "neutral": lambda i, k, s: identity_is_neutral(i, k),
    "empty states": lambda i, k, s: empty_states_change_no_bit(i, k, s.cuts),
    "splits": lambda i, k, s: splits_do_not_matter(i, k, s.cuts, s.order),
    "absorb": lambda i, k, s: absorb_is_merge(i, k, s.cuts),
    "passes": lambda i, k, s: one_pass_is_two_pass(i, k),
    "monotone": lambda i, k, s: maximum_is_monotone(i, k),
    "scores shift": lambda i, k, s: scores_shift(i, rounded(k, 0.125), s.by, s.cuts),
    "values shift": lambda i, k, s: values_shift(i, rounded(k, 0.125), s.by, s.cuts),
    "bases": lambda i, k, s: bases_agree(i, replace(k, base=E), s.cuts),
    "finite": lambda i, k, s: nothing_is_nan(i, k, s.cuts),
}

INF, ROOM = math.inf, [[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0], [0.25, 7.0]]
# What implementations got wrong, or could.
REGRESSIONS = {
    "rising": Sample(scores=[[-3.0, 0.0, 5.0, 9.0]], values=ROOM, cuts=(1, 3)),
    "falling": Sample(scores=[[9.0, 5.0, 0.0, -3.0]], values=ROOM, cuts=(2, 3)),
    "far below zero": Sample(scores=[[-200.0, -201.0, -900.0, -200.5]], values=ROOM),
    "far above zero": Sample(scores=[[200.0, 201.0, 90.0, 200.5]], values=ROOM),
    "hidden first": Sample(scores=[[-INF, -INF, 1.0, 2.0], [-INF, 0.5, -INF, -INF]], values=ROOM),
    "hidden last": Sample(scores=[[1.0, 2.0, -INF, -INF]], values=ROOM, cuts=(2, 3)),
    "nothing seen": Sample(scores=[[-INF] * 4, [0.0, 1.0, -INF, 2.0]], values=ROOM),
    "huge": Sample(scores=[[6e4, -6e4, 59999.5, 6e4], [-6e4, -6e4, -6e4, -59999.0]], values=ROOM),
    "tiny": Sample(
        scores=[[1e-30, -1e-30, 1e-45, -1e-40]], values=[[1e-30], [1e-40], [-1e-45], [1e-38]]
    ),
    "equal": Sample(scores=[[2.5] * 4], values=ROOM, cuts=(0, 4), order=(1, 2, 0)),
    "one key": Sample(scores=[[-1.5]], values=[[2.0]], cuts=(0, 1)),
    "many parts": Sample(
        scores=[[0.0, 8.0, -8.0, 16.0]], values=ROOM, cuts=(0, 1, 1, 2, 3), order=(5, 3, 0, 4, 2, 1)
    ),
}


def breaks(law: str, impl: Implementation, dtype: torch.dtype, base: Base) -> bool:
    """Whether an implementation breaks a law on one of REGRESSIONS."""
    for sample in REGRESSIONS.values():
        try:
            LAWS[law](impl, sample.keys(dtype, base), sample)
        except AssertionError:
            return True
    return False


# How they compare.


def require(holds: bool, broken: str) -> None:
    """Raise unless it holds."""
    if not holds:
        raise AssertionError(broken)


def require_same(found: State, expected: State, what: str) -> None:
    """Equal numbers in m, d and o (-0 equals 0)."""
    for part in ("m", "d", "o"):
        one, other = getattr(found, part), getattr(expected, part)
        require(torch.equal(one, other), f"{what}: {part} is {one}, not {other}")


def require_close(found: State, expected: State, budget: State, what: str) -> None:
    """Equal m; d and o within the budget."""
    m, right = found.m.double(), expected.m.double()
    require(torch.equal(m, right), f"{what}: m is {m}, not {right}")
    for part in ("d", "o"):
        error = getattr(found, part).double() - getattr(expected, part).double()
        require_within(error, getattr(budget, part), f"{what}: {part}")


def require_results(impl: Implementation, found: State, keys: Keys, merges: int, what: str) -> None:
    """out and LSE within the budget of the truth; 0 and -inf for rows that saw no key."""
    exact = truth(keys)
    error_out, error_lse = allowed_results(keys, merges)
    out = exact.o / exact.d.masked_fill(exact.d == 0, 1.0)[:, None]
    require_within(impl.output(found).double() - out, error_out, f"{what}: out")
    lse, right = impl.lse(found, keys.base).double(), exact.m * natural_log(keys.base)
    right, seen = right + exact.d.log(), exact.d > 0
    require(bool((lse[~seen] == -math.inf).all()), f"{what}: LSE of rows that saw no key")
    require_within((lse - right)[seen], error_lse[seen], f"{what}: LSE")


def require_within(error: Tensor, budget: Tensor, what: str) -> None:
    """No element beyond its budget; NaN is."""
    bad = ~(error.abs() <= budget)
    if bool(bad.any()):
        text = f"off by {error[bad].abs().max():.3g} where {budget[bad].max():.3g} is allowed"
        raise AssertionError(f"{what} is {text}")


def twice(budget: State) -> State:
    """For two that both may be off."""
    return State(m=budget.m, d=2 * budget.d, o=2 * budget.o)


def finite(m: Tensor) -> Tensor:
    """m, and 0 where no key was seen."""
    return torch.where(m == -math.inf, torch.zeros_like(m), m)


def natural_log(base: Base) -> float:
    """ln b."""
    return {arithmetic.E.name: 1.0, arithmetic.TWO.name: math.log(2)}[base.name]


def _weights(x: Tensor, m: Tensor, base: Base) -> Tensor:
    """b^(x - m), by torch itself."""
    power = torch.exp if base.name == "e" else torch.exp2
    return power(x - finite(m)[:, None])
