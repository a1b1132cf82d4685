"""Changes as a table for the terminal: a row per kernel, what fails above what does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.table import Table
from rich.text import Text

from ..report.summary import plural
from .gate import Change


def table(changes: Sequence[Change]) -> Table:
    """A row for each kernel and severity, in which every change is "what before → after"."""
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    drawn.add_column("kernel", overflow="fold", ratio=2)
    drawn.add_column("", no_wrap=True)
    drawn.add_column("pinned → compiled here", overflow="fold", ratio=3)
    for fails in (True, False):
        rows = [change for change in changes if change.fails is fails]
        for kernel, each in groupby(rows, key=lambda change: change.kernel):
            word = Text("fails", style="red") if fails else Text("warns", style="yellow")
            drawn.add_row(Text(kernel), word, Text("; ".join(map(str, each))))
    return drawn


def summary(changes: Iterable[Change]) -> str:
    """How many kernels fail and how many differ, in words; empty where none does."""
    fail = {change.kernel for change in changes if change.fails}
    differ = {change.kernel for change in changes} - fail
    words = [f"{plural(len(fail), 'kernel')} {'fails' if len(fail) == 1 else 'fail'}"] * bool(fail)
    words += [f"{plural(len(differ), 'kernel')} with warnings alone"] * bool(differ)
    return ", ".join(words)
