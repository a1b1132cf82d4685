"""A run as tables: cells down, peers across, and how each compares with a baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from .rounds import Measured
from .run import Run
from .suites import SUITES, Cell
from .work import flops, moved_bytes

HARDLY = 16  # queries up to which a cell is bound by what it reads


def rate(cell: Cell, one: Measured) -> float:
    """What is shown of a measurement: TFLOP/s, GB/s where there are few queries, or microseconds of
    the host."""
    seconds = statistics.median(one.seconds)
    if cell.wall:
        return seconds * 1e6
    if cell.problem.seqlen_q <= HARDLY:
        return moved_bytes(cell) / seconds / 1e9
    return flops(cell) / seconds / 1e12


def unit(cell: Cell) -> str:
    """Of that rate."""
    if cell.wall:
        return "µs a call"
    return "GB/s" if cell.problem.seqlen_q <= HARDLY else "TFLOP/s"


def ceiling(cell: Cell, run: Run) -> float | None:
    """The rate that the device reaches."""
    if cell.wall:
        return None
    if cell.problem.seqlen_q <= HARDLY:
        return run.ceilings["bytes"] / 1e9
    return run.ceilings["flops"] / 1e12


def label(cell: Cell) -> str:
    """A cell in a word or two."""
    p = cell.problem
    mask = "full" if p.causal == "none" else "causal"
    heads = f"{p.heads_q}" if p.group == 1 else f"{p.heads_q}/{p.heads_kv}"
    return f"d {p.head_dim}, {p.batch} x {heads} x {p.seqlen_q}/{p.keys}, {mask}, {cell.direction}"


def speedup(cell: Cell, one: Measured, baseline: Measured) -> float:
    """How many times as fast as the baseline."""
    return statistics.median(baseline.seconds) / statistics.median(one.seconds)


def good(run: Run, cell: Cell, peer: str) -> Measured | None:
    """A measurement that stands."""
    one = run.measured.get((cell.id, peer))
    return one if one is not None and one.seconds and one.failed is None else None


def shown(run: Run) -> list[str]:
    """The peers of which there is something to show."""
    measured = {one.peer for one in run.measured.values() if one.seconds or one.failed}
    return [name for name, _ in run.peers if name in measured]


def rates(run: Run, width: int) -> Table:
    """Medians, with the share of the ceiling."""
    names = shown(run)
    table = Table(box=None, pad_edge=False, width=None)
    table.add_column("cell", overflow="fold", min_width=min(30, width))
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for cell in SUITES[run.suite](run.dtype):
        most = ceiling(cell, run) if run.ceilings else None
        row: list[Text | str] = [label(cell), unit(cell)]
        for name in names:
            one = run.measured.get((cell.id, name))
            if one is None or one.skipped:
                row.append("–")
            elif one.failed or not one.seconds:
                row.append(Text("failed", "red"))
            else:
                value = rate(cell, one)
                share = f" {100 * value / most:3.0f} %" if most else ""
                row.append(f"{value:.3g}{share}" if value < 100 else f"{value:.0f}{share}")
        table.add_row(*row)
    return table


def against(run: Run, baseline: str) -> Iterator[str]:
    """A sentence for each peer: its speed as multiples of the baseline\'s, by direction."""
    cells = SUITES[run.suite](run.dtype)
    for name in (n for n, _ in run.peers if n != baseline):
        for direction in dict.fromkeys(cell.direction for cell in cells):
            pairs = [
                (cell, speedup(cell, one, base))
                for cell in cells
                if cell.direction == direction
                and (one := good(run, cell, name))
                and (base := good(run, cell, baseline))
            ]
            if pairs:
                cell, least = min(pairs, key=lambda pair: pair[1])
                mean = geometric_mean([ratio for _, ratio in pairs])
                yield (
                    f"{name} is {mean:.2f} times as fast as {baseline}, {direction}, geometric "
                    f"mean of {len(pairs)}; least {least:.2f} ({label(cell)})"
                )


def geometric_mean(values: Sequence[float]) -> float:
    """exp(mean(log))."""
    return math.exp(statistics.fmean(map(math.log, values)))


def reasons(run: Run) -> Iterator[str]:
    """What is not shown, and why: each reason once."""
    counts: dict[tuple[str, str], int] = {}
    for one in run.measured.values():
        why = f"failed: {one.failed}" if one.failed else one.skipped
        if why:
            counts[one.peer, why] = counts.get((one.peer, why), 0) + 1
    for name, reason in run.unloadable.items():
        yield f"{name}: {reason}"
    for (name, why), count in counts.items():
        yield f"{name}, {count} of {len(SUITES[run.suite](run.dtype))} cells: {why}"
    for name, seconds in run.first_results.items():
        said = "none" if seconds is None else f"{seconds:.1f} s"
        yield f"{name}, from import to first result: {said}"
