"""Traffic as tables for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .sources import MATMUL_SPEED, Setting, Traffic

BAR = 10  # characters
PAIRS = (("tiled-v1", "tiled-v2"), ("triton-v1", "triton-v2"))


def overview(setting: Setting, found: Mapping[str, Traffic], console: Console) -> Table:
    """A row per algorithm: bytes through the bus and operations, beside the first one's.

    Bars show the bytes where the console is wide enough.
    """
    table = _of_algorithms(setting, found, bars=True)
    if _width(table, console) <= console.width:
        return table
    return _of_algorithms(setting, found, bars=False)


def _of_algorithms(setting: Setting, found: Mapping[str, Traffic], *, bars: bool) -> Table:
    table = Table(title=f"one head, {setting}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("algorithm", no_wrap=True)
    for head in ("loads", "stores", "MiB", "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    if bars:
        table.add_column("", no_wrap=True, min_width=BAR)
    for head in ("matmul", "other", "weighted"):
        table.add_column(head, justify="right", no_wrap=True)
    most = max((t.bytes for t in found.values()), default=1)
    first = next(iter(found.values()), None)
    for name, traffic in found.items():
        assert first is not None
        bar = Text("█" * max(1, round(BAR * traffic.bytes / most)))
        table.add_row(
            name if traffic.ran else f"{name} *",
            short(sum(traffic.loads.values())),
            short(sum(traffic.stores.values())),
            f"{traffic.bytes / 2**20:.2f}",
            f"{traffic.bytes / first.bytes:.2f}x",
            *([bar] if bars else []),
            short(traffic.matmul),
            short(traffic.others),
            short(traffic.weighted),
        )
    table.caption = f"ratio: to the first row; weighted: matmul + {MATMUL_SPEED} x other operations"
    if not all(t.ran for t in found.values()):
        table.caption += "\n* by its closed form, not by running it"
    table.caption_justify = "left"
    return table


def by_tensor(found: Mapping[str, Traffic], console: Console) -> list[Table]:
    """A row per tensor: how many elements each algorithm loads / stores of it.

    Where the console is too narrow for all algorithms, the others follow in a further table.
    """
    tensors = dict.fromkeys(t for each in found.values() for t in (*each.loads, *each.stores))
    shown: dict[str, Traffic] = {}
    tables: list[Table] = []
    for name, traffic in found.items():
        wider = _of_tensors(tensors, {**shown, name: traffic})
        if shown and _width(wider, console) <= console.width:
            shown[name], tables[-1] = traffic, wider
        else:
            shown = {name: traffic}
            tables.append(_of_tensors(tensors, shown))
    return tables


def _of_tensors(tensors: Iterable[str], found: Mapping[str, Traffic]) -> Table:
    """Those ``tensors`` that the algorithms found have, in their order."""
    table = Table(title="elements, loads / stores", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("tensor", no_wrap=True)
    for name in found:
        table.add_column(name, justify="right", no_wrap=True)
    for tensor in tensors:
        cells = []
        for traffic in found.values():
            both = traffic.loads.get(tensor, 0), traffic.stores.get(tensor, 0)
            cells.append(" / ".join(map(short, both)) if any(both) else "")
        if any(cells):
            table.add_row(tensor, *cells)
    return table


def _width(table: Table, console: Console) -> int:
    """Columns of a table that nothing is cut off from."""
    return console.measure(table, options=console.options.update(max_width=sys.maxsize)).maximum


def saved(found: Mapping[str, Traffic]) -> list[str]:
    """What V2 saves over V1 in operations other than matmul, a sentence for each pair of them."""
    sentences = []
    for v1, v2 in PAIRS:
        if not {v1, v2} <= found.keys():
            continue
        one, two = found[v1], found[v2]
        others, time = two.others - one.others, two.weighted / one.weighted - 1
        sentences.append(
            f"{v2} computes {short(abs(others))} ({abs(others) / one.others:.1%}) "
            f"{'more' if others > 0 else 'fewer'} operations that are no matmul than the "
            f"{short(one.others)} of {v1}, and takes {abs(time):.1%} "
            f"{'more' if time > 0 else 'less'} time if those take {MATMUL_SPEED} times as long as "
            "matmul's."
        )
    return sentences


def short(number: int) -> str:
    """A count with at most four digits and a letter: 65,536 is 65.5k."""
    if number < 10_000:
        return f"{number:,}"
    thousands = min(4, (len(str(number)) - 1) // 3)
    return f"{number / 1000**thousands:.3g}{'_kMGT'[thousands]}"
