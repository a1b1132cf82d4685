"""Rates over the sequence length, a panel for each head_dim, mask and direction."""

from __future__ import annotations

from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from .run import Run
from .suites import SUITES, Cell
from .table import ceiling, good, rate, unit

FORMATS = (".svg", ".png", ".pdf")


def plot(path: Path, run: Run) -> None:
    """Draw a run; the suffix names the format."""
    cells = SUITES[run.suite](run.dtype)
    panels: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        key = (cell.problem.head_dim, cell.problem.causal, cell.direction)
        panels.setdefault(key, []).append(cell)
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((dim, causal, direction), group) in zip(axes.flat, panels.items(), strict=False):
        across = [max(c.problem.seqlen_q, c.problem.keys) for c in group]
        if len(set(across)) == 1:
            across = [c.problem.batch for c in group]
            axis.set_xlabel("batch")
        for name, _ in run.peers:
            points = [
                (x, rate(cell, one))
                for x, cell in zip(across, group, strict=True)
                if (one := good(run, cell, name)) is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name)
        most = ceiling(group[0], run)
        if most:
            axis.axhline(most, color="gray", linewidth=0.8, linestyle=":")
        axis.set_title(f"d {dim}, {'full' if causal == 'none' else 'causal'}, {direction}", size=9)
        axis.set_xscale("log", base=2)
        axis.set_ylabel(unit(group[0]), size=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles: dict[str, Artist] = {}
    for axis in axes.flat:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center",
            ncols=min(5, len(handles)), frameon=False, fontsize="small",
        )  # fmt: skip
    gpus = run.environment.get("gpus") or [{}]
    figure.suptitle(f"{run.suite}, {run.dtype}, {gpus[0].get('name', 'CPU')}", size=10)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
