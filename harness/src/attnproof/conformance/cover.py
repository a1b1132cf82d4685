"""Pairwise covers: few problems in which every two values of two dimensions meet.

A product of the input recipe would be millions of problems; most faults show with one value
or with two together (Kuhn, Wallace and Gallo 2004, doi 10.1109/TSE.2004.24).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attn_reference.problem import Problem

Choice = tuple[str, int]  # a dimension, and the place of one of its values
Pair = tuple[Choice, Choice]


def cover(
    dimensions: Mapping[str, Sequence[Any]], valid: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Rows, each a value per dimension, in which all pairs meet that can meet in a valid row.

    Greedy and without chance: the same rows on every machine. ValueError for a dimension
    without values.
    """
    for name, values in dimensions.items():
        if not values:
            raise ValueError(f"dimension {name!r} has no values")
    pending = dict.fromkeys(_pairs(dimensions))
    used: Counter[Choice] = Counter()
    rows: list[dict[str, Any]] = []
    while pending:
        pair = next(iter(pending))
        row = _complete(dict(pair), dimensions, pending, used, valid)
        if row is None:
            del pending[pair]
            continue
        for covered in _within(row, dimensions):
            pending.pop(covered, None)
        used.update(row.items())
        rows.append(_values(row, dimensions))
    return rows


def problems(
    dimensions: Mapping[str, Sequence[Any]],
    *,
    accept: Callable[[Problem], bool] = lambda problem: True,
    **base: Any,
) -> tuple[Problem, ...]:
    """A pairwise cover as problems; ``base`` are the fields that all of them share.

    A dimension is named for a field of ``Problem``; a value that is a mapping stands for
    several fields at once. Only problems that ``Problem`` and ``accept`` accept count as valid.
    """

    def build(row: dict[str, Any]) -> Problem:
        fields = dict(base)
        for name, value in row.items():
            fields.update(value if isinstance(value, Mapping) else {name: value})
        return Problem(**fields)

    def valid(row: dict[str, Any]) -> bool:
        try:
            return accept(build(row))
        except ValueError:
            return False

    return tuple(dict.fromkeys(build(row) for row in cover(dimensions, valid)))


def _pairs(dimensions: Mapping[str, Sequence[Any]]) -> Iterator[Pair]:
    """All pairs of choices; with one dimension each choice pairs with itself."""
    if len(dimensions) == 1:
        ((name, values),) = dimensions.items()
        yield from (((name, n), (name, n)) for n in range(len(values)))
    for one, other in itertools.combinations(dimensions, 2):
        places = itertools.product(range(len(dimensions[one])), range(len(dimensions[other])))
        yield from (((one, m), (other, n)) for m, n in places)


def _within(row: Mapping[str, int], dimensions: Mapping[str, Sequence[Any]]) -> Iterator[Pair]:
    """The pairs that meet in a row."""
    choices = [(name, row[name]) for name in dimensions if name in row]
    if len(dimensions) == 1:
        yield choices[0], choices[0]
    yield from itertools.combinations(choices, 2)


def _complete(
    row: dict[str, int],
    dimensions: Mapping[str, Sequence[Any]],
    pending: Mapping[Pair, None],
    used: Counter[Choice],
    valid: Callable[[dict[str, Any]], bool],
) -> dict[str, int] | None:
    """The row filled up, first with values that meet most that have not met; None if none is
    valid."""
    missing = [name for name in dimensions if name not in row]
    if not missing:
        return row if valid(_values(row, dimensions)) else None
    name = missing[0]

    def rank(place: int) -> tuple[int, int]:
        met = sum(pair in pending for pair in _within({**row, name: place}, dimensions))
        return (-met, used[name, place])

    for place in sorted(range(len(dimensions[name])), key=rank):
        full = _complete({**row, name: place}, dimensions, pending, used, valid)
        if full is not None:
            return full
    return None


def _values(row: Mapping[str, int], dimensions: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    return {name: values[row[name]] for name, values in dimensions.items()}
