"""Rates over the sequence length, as a figure: a panel per kind of problem, a line per target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .measurement import Ended, Measurement

FORMATS = (".svg", ".png", ".pdf")
COLUMNS = 3


def plot(path: Path, measurements: Sequence[Measurement]) -> None:
    """Draw what was measured by the device's clock; the suffix names the format.

    Decoding is drawn over the batch, all else over the number of keys. The line on top is the
    measured ceiling.
    """
    panels: dict[str, list[Measurement]] = {}
    for one in measurements:
        if one.ended is Ended.MEASURED and one.cell.clock == "device":
            panels.setdefault(_panel(one), []).append(one)
    rows = max(1, -(-len(panels) // COLUMNS))
    figure = Figure(figsize=(4 * COLUMNS, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    targets = list(dict.fromkeys(one.target for found in panels.values() for one in found))
    handles = {}
    for axis, (title, found) in zip(axes, panels.items(), strict=False):
        for number, target in enumerate(targets):
            points = sorted((_position(one), one.value) for one in found if one.target == target)
            if points:
                x, y = zip(*points, strict=True)
                (handles[target],) = axis.plot(x, y, marker=".", color=f"C{number % 10}")
        if (top := found[0].ceiling) is not None:
            axis.axhline(top, color="0.6", linestyle="--", linewidth=1)
        over = "batch" if found[0].cell.problem.seqlen_q == 1 else "keys"
        axis.set(title=title, xlabel=over, ylabel=found[0].cell.unit)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize("small")
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=6,
            frameon=False,
            fontsize="small",
        )
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(one: Measurement) -> str:
    p = one.cell.problem
    if p.seqlen_q == 1:
        return f"decoding, d {p.head_dim}, {p.dtype}"
    mask = "full" if p.causal == "none" else "causal"
    return f"{one.cell.direction}, d {p.head_dim}, {mask}, {p.dtype}"


def _position(one: Measurement) -> int:
    p = one.cell.problem
    return p.batch if p.seqlen_q == 1 else p.keys
