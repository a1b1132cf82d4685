"""The table by feature."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table
from rich.text import Text

from .summary import FeatureRow, Summary


def count_columns(summary: Summary) -> list[str]:
    """The counts that are worth a column: fields of ``FeatureRow`` that are not zero throughout."""
    always = ("cases", "conforms")
    sometimes = ("deviates", "crashed", "known", "unsupported", "vacuous")
    return [*always, *(name for name in sometimes if getattr(summary.total, name))]


def feature_table(summary: Summary) -> Table:
    """A row per feature and, below, the sum. Empty cells and missing columns are zeros."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    total = summary.total
    columns = count_columns(summary)
    table.add_column("feature", footer="", no_wrap=True)
    for name in columns:
        table.add_column(name, footer=str(getattr(total, name)), justify="right")
    table.add_column("worst/budget", footer=number(total.worst), justify="right")
    table.add_column("seconds", footer=f"{total.seconds:.1f}", justify="right")
    # What the target does not support at all comes last.
    for row in sorted(summary.rows, key=lambda row: (not row.judged + row.vacuous, row.feature)):
        counts = [_count(row, name) for name in columns]
        table.add_row(_name(row), *counts, number(row.worst), f"{row.seconds:.1f}")
    return table


def number(value: float | None) -> str:
    """An error over budget in few characters."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "inf"
    return f"{value:.2f}" if value < 100 else f"{value:.3g}"


def _name(row: FeatureRow) -> Text:
    if row.failed:
        return Text(row.feature, style="bold red")
    if row.not_shown:
        return Text(f"{row.feature} (not shown)", style="yellow")
    return Text(row.feature, style="" if row.judged else "dim")


def _count(row: FeatureRow, column: str) -> Text:
    value = getattr(row, column)
    style = {"deviates": "red", "crashed": "red", "vacuous": "yellow", "unsupported": "dim"}
    return Text(str(value) if value else "", style=style.get(column, ""))
