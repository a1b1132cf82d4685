"""Bytes through the bus over the sequence length, as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .sources import Setting, Traffic

FORMATS = (".svg", ".png", ".pdf")


def plot(path: Path, settings: Sequence[Setting], found: Mapping[str, Sequence[Traffic]]) -> None:
    """One line per algorithm over the lengths of ``settings``; the suffix names the format."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = [setting.seqlen for setting in settings]
    for name, traffic in found.items():
        left.plot(lengths, [t.bytes / 2**20 for t in traffic], marker=".", label=name)
        right.plot(lengths, [t.weighted / t.matmul for t in traffic], marker=".", label=name)
    left.set(xlabel="sequence length N", ylabel="MiB through the bus", yscale="log")
    right.set(xlabel="sequence length N", ylabel="time, in that of its matmul alone")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize="small")
    first = settings[0]
    kind = "causal " * first.causal + ("backward" if first.backward else "forward")
    figure.suptitle(f"one head, d={first.head_dim}, M={first.on_chip}, {first.dtype}, {kind}")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata)
