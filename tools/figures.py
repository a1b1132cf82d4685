"""Draw the figures of docs/online-softmax.md from what the code computes: docs/figures/*.svg.

Usage: python tools/figures.py [FOLDER]
"""

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from attn_reference.problem import Problem
from attnproof.traffic.plot import plot
from attnproof.traffic.sources import Setting, sources
from online_softmax import identity, lse
from online_softmax.placement import contiguous, work, zigzag
from online_softmax.state import absorb

BLUE, RED, GREY = "#3a78a8", "#c2303b", "#9aa3ad"
KEYS = 48
LENGTHS = (256, 512, 1024, 2048)


def running_state() -> Figure:
    """One row: the scores as they come, the maximum so far, and the rescaling of the sum."""
    torch.manual_seed(3)
    scores = torch.randn(KEYS) + torch.linspace(-1, 1.5, KEYS)
    state = identity(())
    maxima, sums, factors = [], [], []
    for j in range(KEYS):
        before = state.m
        state = absorb(state, scores[j : j + 1])
        maxima.append(state.m.item())
        sums.append(lse(state).item())
        factors.append(torch.exp(before - state.m).item())
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot(scores, ".", color=GREY, label="score $x_j$")
    top.step(range(KEYS), maxima, where="post", color=RED, label="maximum so far, m")
    top.plot(sums, color=BLUE, label="m + log d: the LSE so far")
    top.legend(frameon=False, fontsize="small", loc="lower right")
    bottom.bar(range(KEYS), factors, color=[RED if f < 1 else GREY for f in factors])
    bottom.set(xlabel="keys seen", ylabel="factor of d, o", ylim=(0, 1.05))
    return figure


def order_of_tiles() -> Figure:
    """Which tile is computed when, under V1 and V2, causal: V2 skips what is hidden."""
    count = 6
    orders = {
        "V1: keys outside, rows inside": [(i, j) for j in range(count) for i in range(count)],
        "V2: rows outside, keys inside": [(i, j) for i in range(count) for j in range(i + 1)],
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for panel, (title, order) in zip(figure.subplots(1, 2), orders.items(), strict=True):
        for n, (i, j) in enumerate(order):
            hidden = j > i
            ink = "white" if n < len(order) / 2 and not hidden else "black"
            colour = mpl.colormaps["viridis"](n / len(order))
            panel.add_patch(
                mpl.patches.Rectangle((j, i), 1, 1, color=colour, alpha=0.25 if hidden else 0.85)
            )
            panel.text(
                j + 0.5, i + 0.5, str(n + 1), ha="center", va="center", fontsize=8, color=ink
            )
        panel.set(xlim=(0, count), ylim=(count, 0), aspect="equal", title=title)
        panel.set(xlabel="block of keys", ylabel="block of rows")
    return figure


def balance() -> Figure:
    """Visible scores that each of 4 ranks computes for causal attention."""
    problem, ranks = Problem(seqlen_q=4096, causal="top-left"), 4
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    panel = figure.subplots()
    for n, place in enumerate((contiguous, zigzag)):
        shares = work(problem, ranks, place).scores.sum(-1).tolist()
        bars = [r + (n - 0.5) * 0.35 for r in range(ranks)]
        panel.bar(bars, [s / 1e6 for s in shares], 0.33, label=place.__name__)
    panel.set(xticks=range(ranks), xlabel="rank", ylabel="million scores")
    panel.legend(frameon=False)
    return figure


def main(folder: Path) -> None:
    """Draw them all."""
    folder.mkdir(exist_ok=True)
    mpl.rcParams["svg.hashsalt"] = "attnproof"  # the same bytes every time
    for name, figure in (
        ("running-state", running_state()),
        ("order-of-tiles", order_of_tiles()),
        ("ring-balance", balance()),
    ):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    first = Setting(seqlen=LENGTHS[0], head_dim=64, on_chip=65536)
    settings = [replace(first, seqlen=n) for n in LENGTHS]
    drawn = {name: [source.count(s) for s in settings] for name, source in sources().items()}
    plot(folder / "traffic.svg", settings, drawn)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs/figures")
