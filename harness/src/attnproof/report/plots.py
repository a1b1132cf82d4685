"""The plots of the HTML report, as SVG text."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ..record import CaseRecord
from .summary import Summary

TENSORS = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")
LOWEST, HIGHEST = 1e-3, 1e4  # error over budget; what is beyond is drawn at the edge
BINS = 42
OK, BAD, GREY = "#3a78a8", "#c2303b", "#9aa3ad"
INK = "#010203"  # stands for the colour of the text around the plot, light or dark


INKED = mpl.rc_context(
    {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
)


@INKED
def by_tensor(records: Sequence[CaseRecord]) -> str:
    """A histogram of the worst error over budget of each case, a panel for each tensor."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.verdict.get("worst", {}).items():
            number = float(value)
            found.setdefault(name, []).append(math.inf if math.isnan(number) else number)
    names = [name for name in TENSORS if found.get(name)]
    if not names:
        return ""
    figure = Figure(figsize=(9, 1.1 * len(names) + 0.9), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    edges = np.geomspace(LOWEST, HIGHEST, BINS + 1)
    for panel, name in zip(panels, names, strict=True):
        values = np.clip(np.nan_to_num(found[name], posinf=HIGHEST), LOWEST, HIGHEST)
        counts, _ = np.histogram(values, edges)
        colours = [OK if right <= 1.0001 else BAD for right in edges[1:]]
        panel.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours)
        panel.axvline(1.0, color=INK, linewidth=0.8)
        panel.set_xscale("log")
        panel.set_yscale("symlog", linthresh=1)
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_ylabel(name, rotation=0, ha="right", va="center")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("worst error over budget of a case (1 is the limit)")
    figure.suptitle("error over budget by tensor, cases per bin", fontsize=10)
    return _svg(figure)


@INKED
def features(summary: Summary) -> str:
    """How the cases of each feature ended, a bar each."""
    rows = [row for row in summary.rows if row.cases][::-1]
    if not rows:
        return ""
    figure = Figure(figsize=(9, 0.22 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for label, colour, counts in (
        ("conforms", OK, [row.conforms for row in rows]),
        ("does not", BAD, [row.failed for row in rows]),
        ("known deviation", "#e0a13c", [row.known for row in rows]),
        ("unsupported or vacuous", GREY, [row.unsupported + row.vacuous for row in rows]),
    ):
        if any(counts):
            axes.barh(range(len(rows)), counts, left=left, color=colour, label=label)
            left += np.array(counts)
    axes.set_yticks(range(len(rows)), [row.feature for row in rows], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("cases")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside upper center", ncols=4, frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """The <svg> element alone, the same for the same figure."""
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "attnproof", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
