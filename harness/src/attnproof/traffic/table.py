"""Traffic as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from .sources import MATMUL_SPEED, Setting, Traffic

BAR = 10  # characters


def overview(setting: Setting, found: Mapping[str, Traffic]) -> Table:
    """A row per algorithm: bytes through the bus and operations, beside the first one's."""
    table = Table(title=f"one head, {setting}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("algorithm", no_wrap=True)
    for head in ("loads", "stores", "MiB", "ratio"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=BAR)
    for head in ("matmul", "other", "weighted"):
        table.add_column(head, justify="right", no_wrap=True)
    most = max((t.bytes for t in found.values()), default=1)
    first = next(iter(found.values()), None)
    for name, traffic in found.items():
        assert first is not None
        table.add_row(
            name if traffic.ran else f"{name} *",
            short(sum(traffic.loads.values())),
            short(sum(traffic.stores.values())),
            f"{traffic.bytes / 2**20:.2f}",
            f"{traffic.bytes / first.bytes:.2f}x",
            Text("█" * max(1, round(BAR * traffic.bytes / most))),
            short(traffic.matmul),
            short(traffic.others),
            short(traffic.weighted),
        )
    table.caption = f"ratio: to the first row; weighted: matmul + {MATMUL_SPEED} x other operations"
    if not all(t.ran for t in found.values()):
        table.caption += "\n* by its closed form: running it takes a step for every score"
    table.caption_justify = "left"
    return table


def by_tensor(found: Mapping[str, Traffic]) -> Table:
    """A row per tensor: how many elements each algorithm loads / stores of it."""
    table = Table(title="elements, loads / stores", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("tensor")
    names: dict[str, None] = {}
    for name, traffic in found.items():
        table.add_column(name, justify="right")
        names |= dict.fromkeys((*traffic.loads, *traffic.stores))
    for tensor in names:
        cells = []
        for traffic in found.values():
            both = traffic.loads.get(tensor, 0), traffic.stores.get(tensor, 0)
            cells.append(" / ".join(map(short, both)) if any(both) else "")
        table.add_row(tensor, *cells)
    return table


def saved(found: Mapping[str, Traffic]) -> str | None:
    """What V2 saves over V1 in operations other than matmul, a sentence."""
    if not {"tiled-v1", "tiled-v2"} <= found.keys():
        return None
    one, two = found["tiled-v1"], found["tiled-v2"]
    fewer, share = one.others - two.others, 1 - two.others / one.others
    in_time = 1 - two.weighted / one.weighted
    return (
        f"V2 saves {short(fewer)} of V1's {short(one.others)} operations that are no matmul "
        f"({share:.1%}), which is {in_time:.1%} of its time when those take {MATMUL_SPEED} times "
        "as long as matmul's."
    )


def short(number: int) -> str:
    """A count with at most four digits and a letter: 65,536 is 65.5k."""
    if number < 10_000:
        return f"{number:,}"
    thousands = min(4, (len(str(number)) - 1) // 3)
    return f"{number / 1000**thousands:.3g}{'_kMGT'[thousands]}"
