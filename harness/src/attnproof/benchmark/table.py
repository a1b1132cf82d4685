"""A run as tables for the terminal: a row per cell, a column per target."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table

from .measurement import FAILED, Ended, Measurement
from .ratios import ByCell, by_kind, ratios

SHORT = {
    Ended.UNSUPPORTED: "unsupp.",
    Ended.UNAVAILABLE: "unavail.",
    Ended.OUT_OF_MEMORY: "no memory",
}
REASON_LENGTH = 240  # characters of a reason below the tables


def tables(
    measurements: Sequence[Measurement], console: Console, baseline: str | None
) -> Iterator[Table]:
    """For every kind of cells the rates, and, with a baseline, the ratios to it."""
    for title, found in by_kind(measurements).items():
        targets = list(dict.fromkeys(target for row in found.values() for target in row))
        yield from _split(console, targets, partial(_rates, title, found))
        if baseline is not None and baseline in targets and len(targets) > 1:
            others = [target for target in targets if target != baseline]
            yield from _split(console, others, partial(_ratios, title, found, baseline))
    if started := _startup(measurements):
        yield started


def reasons(measurements: Iterable[Measurement]) -> list[str]:
    """Why targets have no times in some cells, and what else there is to say, a line each."""
    said: dict[str, list[Measurement]] = {}
    for one in measurements:
        if one.ended is not Ended.MEASURED:
            reason = " ".join(one.reason.split())
            if len(reason) > REASON_LENGTH:
                reason = f"{reason[:REASON_LENGTH]}…"
            said.setdefault(f"{_name(one.target)}: {one.ended}: {reason}", []).append(one)
        for note in one.notes:
            said.setdefault(f"{_name(one.target)}: {note}", []).append(one)
    lines = []
    for text, cells in said.items():
        more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        first = cells[0].cell
        lines.append(f"{text} ({first.direction} {first.label}{more})")
    return lines


def judged_line(measurements: Sequence[Measurement]) -> str:
    """How many calls were judged, and how many targets failed where."""
    calls = sum(one.judged for one in measurements)
    timed = sum(len(one.seconds) for one in measurements)
    failed = [one for one in measurements if one.ended in FAILED]
    measured = sum(one.ended is Ended.MEASURED for one in measurements)
    ended = f"{len(failed)} failed, " if failed else ""
    without = len(measurements) - measured - len(failed)
    aside = f", {without} not measured" if without else ""
    return f"{measured} measured ({ended}{timed} timed calls, {calls} of them judged){aside}"


def in_short(found: Iterable[Measurement]) -> str:
    """What came of a cell, in a line."""
    return ", ".join(f"{_name(one.target)} {_rate(one)}" for one in found)


def short(value: float) -> str:
    """Three digits: 1.23, 12.3, 123, 1,234."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _name(target: str) -> str:
    """A target without the folder that its file is in."""
    return target.rpartition("/")[2]


def _rates(title: str, found: ByCell, targets: Sequence[str]) -> Table:
    table = _table(title, targets)
    for row in found.values():
        table.add_row(
            next(iter(row.values())).cell.label,
            *(_rate(row[target]) if target in row else "" for target in targets),
        )
    table.caption = _caption([one for row in found.values() for one in row.values()])
    table.caption_justify = "left"
    return table


def _caption(found: Sequence[Measurement]) -> str:
    """What the numbers are; ceilings are measured anew when a run is gone on with."""
    ceilings = [ceiling for one in found if (ceiling := one.ceiling) is not None]
    if not ceilings:
        return "per call"
    least, most = short(min(ceilings)), short(max(ceilings))
    reached = most if least == most else f"{least} to {most}"
    return f"beside the rate its share of what this device reaches, {reached} {found[0].cell.unit}"


def _rate(one: Measurement) -> str:
    if one.ended is not Ended.MEASURED:
        return SHORT.get(one.ended, str(one.ended))
    mark = "*" if one.notes else ""
    if one.share is None:
        return short(one.value) + mark
    return f"{short(one.value)}{mark} {one.share:3.0%}"


def _ratios(title: str, found: ByCell, baseline: str, targets: Sequence[str]) -> Table:
    of = {target: ratios(found, target, baseline) for target in targets}
    table = _table(f"{title.rpartition(', ')[0]}, times as fast as {_name(baseline)}", targets)
    for name, row in found.items():
        cells = [of[target].by_cell.get(name) for target in targets]
        table.add_row(
            next(iter(row.values())).cell.label,
            *("" if ratio is None else f"{ratio:.2f}" for ratio in cells),
        )
    if len(found) == 1:
        return table
    table.add_section()
    means = [of[target].mean for target in targets]
    table.add_row("geometric mean", *("" if m is None else f"{m:.3f}" for m in means))
    smallest = [of[target].smallest for target in targets]
    worst = [
        "" if name is None else f"{of[target].by_cell[name]:.2f}"
        for target, name in zip(targets, smallest, strict=True)
    ]
    table.add_row("smallest", *worst)
    return table


def _startup(measurements: Iterable[Measurement]) -> Table | None:
    """Seconds from import to the first result."""
    found: dict[str, Mapping[str, float]] = {
        one.target: one.startup for one in measurements if one.startup
    }
    if not found:
        return None
    table = _table("seconds from import to the first result", ["import", "first call", "in all"])
    for target, seconds in found.items():
        table.add_row(_name(target), *(f"{seconds[n]:.2f}" for n in ("import", "first", "total")))
    return table


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(_name(column), justify="right", no_wrap=True)
    return table


def _split(
    console: Console, targets: Sequence[str], make: Callable[[Sequence[str]], Table]
) -> Iterator[Table]:
    """Tables no wider than the console, each with as many of the targets as it has room for."""
    options = console.options.update(max_width=sys.maxsize)
    some: list[str] = []
    for target in targets:
        wider = console.measure(make([*some, target]), options=options).maximum
        if some and wider > console.width:
            yield make(some)
            some = []
        some.append(target)
    if some:
        yield make(some)
