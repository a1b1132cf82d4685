"""The laws of the softmax state, in fp32 and fp64, base e and base 2, and exactly in rationals."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import Verbosity, example, given, settings
from hypothesis import strategies as st
from softmax_laws import (
    LAWS,
    RATIONAL,
    REGRESSIONS,
    RIGHT,
    Implementation,
    Sample,
    allowed,
    breaks,
    splits_do_not_matter,
    truth,
    whole,
)

from attnproof.conformance.exploring import FULL
from online_softmax.arithmetic import TWO, Base, E
from online_softmax.state import State, absorb, fold, identity, lse, merge, output, state_of

# The profile of the harness: derandomised, no deadline, no database. Here failures are printed.
laws = settings(settings.get_profile(FULL), max_examples=40, verbosity=Verbosity.normal)

DTYPES, BASES = (torch.float32, torch.float64), (E, TWO)
scores = st.floats(-20, 20, width=32) | st.sampled_from(
    [-math.inf, -math.inf, 6e4, -6e4, 59999.5, 1e-30, -1e-30, 1e-45, 0.0, -0.0, -104.0, 89.0]
)
values = st.floats(-100, 100, width=32) | st.sampled_from([1e-30, -1e-45, 0.0])


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    n, rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    cuts = sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=6)))
    return Sample(
        scores=[draw(st.lists(scores, min_size=n, max_size=n)) for _ in range(rows)],
        values=[draw(st.lists(values, min_size=columns, max_size=columns)) for _ in range(n)],
        cuts=tuple(cuts),
        order=tuple(draw(st.permutations(range(len(cuts) + 1)))),
        by=draw(st.integers(-8000, 8000)) / 8,
    )


@pytest.mark.parametrize("law", LAWS)
def test_law(law):
    @laws
    @given(sample=samples(), dtype=st.sampled_from(DTYPES), base=st.sampled_from(BASES))
    def holds(sample: Sample, dtype: torch.dtype, base: Base) -> None:
        LAWS[law](RIGHT, sample.keys(dtype, base), sample)

    for regression in reversed(REGRESSIONS.values()):
        for dtype, base in itertools.product(DTYPES, BASES):
            holds = example(sample=regression, dtype=dtype, base=base)(holds)
    holds()


def test_the_bounds_are_close_to_what_happens():
    """A bound that is far too wide proves nothing: errors of many keys reach a tenth of it."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(200, 6, generator=generator) * 4
    sample = Sample(
        scores=drawn.tolist(),
        values=torch.randn(6, 4, generator=generator).tolist(),
        cuts=(1, 2, 3, 4, 5),
        order=(3, 1, 5, 0, 2, 4),
    )
    keys = sample.keys(torch.float32, E)
    splits_do_not_matter(RIGHT, keys, sample.cuts, sample.order)
    found = RIGHT.folded([whole(RIGHT, part) for part in keys.split(sample.cuts)], E)
    ratio = (found.d.double() - truth(keys).d).abs() / allowed(keys, 6).d
    assert 0.02 < ratio.max() < 1


@pytest.mark.parametrize("law", LAWS)
def test_each_law_can_be_broken(law):
    """A merge that doubles d and o, an absorb that forgets the state, an identity that is none."""

    def doubled(a, b, base=E):
        right = merge(a, b, base)
        return State(m=right.m, d=right.d * 2, o=right.o * 2)

    def lopsided(a, b, base=E):
        right = merge(a, b, base)
        return State(m=right.m, d=right.d + a.d, o=right.o)

    def forgetful(state, scores, product=None, base=E):
        return absorb(identity(state.m.shape, state.o.shape[-1], state.m), scores, product, base)

    def low(shape, value_dim=None, like=None):
        nothing = identity(shape, value_dim, like)
        return State(m=torch.full_like(nothing.m, -1.0), d=nothing.d, o=nothing.o)

    def absolute(state):
        return output(state).abs()

    def not_a_number(state):
        return state.o / state.d[..., None]

    broken = [
        Implementation(merge=doubled),
        Implementation(merge=lopsided),
        Implementation(absorb=forgetful),
        Implementation(identity=low),
        Implementation(output=absolute),
        Implementation(output=not_a_number),
        Implementation(lse=lambda state, base=E: lse(state, E)),
    ]
    assert any(breaks(law, impl, dtype=torch.float32, base=TWO) for impl in broken)


def test_states_of_fractions_stay_fractions():
    """The exact law is about the code of the package: its own merge and folds, without a float."""

    def one_key(score: int, value: int) -> State:
        x, v = (np.array([Fraction(number)], dtype=object) for number in (score, value))
        return State(m=x, d=np.array([Fraction(1)], dtype=object), o=v[:, None])

    states = [one_key(*key) for key in ((-3, 2), (4, -1), (0, 5))]
    found = fold(states, RATIONAL)
    assert found.m[0] == 4
    assert found.d[0] == 1 + Fraction(1, 16) + Fraction(1, 128)
    assert found.o[0, 0] == Fraction(2, 128) - 1 + Fraction(5, 16)
    assert all(isinstance(part, Fraction) for part in (found.d[0], found.o[0, 0]))


def test_shapes_of_a_state():
    state = state_of(torch.randn(2, 3, 5), torch.randn(2, 5, 4))
    assert state.m.shape == state.d.shape == lse(state).shape == (2, 3)
    assert state.o.shape == output(state).shape == (2, 3, 4)
    nothing = identity((2, 3), 4, like=state.m.double())
    assert nothing.m.dtype == torch.float64
    assert nothing.o.shape == (2, 3, 4)
    without = merge(state_of(torch.randn(2, 3, 5)), state)
    assert without.o is None


def test_lse_is_natural_in_both_bases():
    scores = torch.randn(3, 7, dtype=torch.float64)
    expected = torch.logsumexp(scores, -1)
    for base in (E, TWO):
        found = lse(state_of(base.scores(scores), base=base), base)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
