"""The checked-in table of tiles, ``tiles.json``: read here, made by ``tools/tune.py`` on a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("tiles.json")
POINTERS, HOPPER = "pointers", "hopper"  # kernels: those in tl, those in Gluon
# Passes; keys: dK and dV, queries: dQ.
FORWARD, DELTA, KEYS, QUERIES, BIAS = "forward", "delta", "keys", "queries", "bias"


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows (block_m) and keys (block_n) of a tile, and what computes it."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """As options of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, kw_only=True)
class HopperTiles:
    """Of the kernels for Hopper."""

    consumers: int  # warpgroups, each of which owns 64 rows, or keys
    passing: int  # keys, or rows, of a tile that passes by
    stages: int  # of such tiles in shared memory


KINDS = {POINTERS: Tiles, HOPPER: HopperTiles}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tiles, and what they are for."""

    kernel: str
    direction: str
    itemsize: int  # bytes of an element
    width: int  # columns of the widest of q, k and v, at most
    tiles: Tiles | HopperTiles
    gpu: int | None = None  # compute capability; None: those that have no rows of their own
    rows: int | None = None  # that pass by or stay, at most; None: any number
    measured: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def order(self) -> tuple[object, ...]:
        """In the file. What fits best comes first."""
        most = 1 << 62
        return (
            self.kernel, self.direction, self.itemsize, self.gpu or most, self.width,
            self.rows or most,
        )  # fmt: skip


def read(path: Path = PATH) -> list[Row]:
    """The rows of a table, in their order."""
    found = []
    for line in json.loads(path.read_text("utf-8")):
        tiles = KINDS[line["kernel"]](**line.pop("tiles"))
        found.append(Row(**line, tiles=tiles))
    return sorted(found, key=lambda row: row.order)


def write(rows: Iterable[Row], path: Path = PATH) -> None:
    """Write a table, a row on a line."""
    lines = (json.dumps(_plain(row)) for row in sorted(rows, key=lambda row: row.order))
    path.write_text("[\n " + ",\n ".join(lines) + "\n]\n", "utf-8")


@lru_cache(4096)
def find(
    kernel: str, direction: str, capability: int, itemsize: int, width: int, rows: int
) -> Tiles | HopperTiles | None:
    """What the table says, None where it has nothing."""
    own = [row for row in _of(kernel, direction, itemsize) if row.gpu == capability]
    for row in own or (r for r in _of(kernel, direction, itemsize) if r.gpu is None):
        if row.width >= width and (row.rows is None or row.rows >= rows):
            return row.tiles
    return None


def _of(kernel: str, direction: str, itemsize: int) -> Iterator[Row]:
    wanted = (kernel, direction, itemsize)
    return (row for row in _table() if (row.kernel, row.direction, row.itemsize) == wanted)


@cache
def _table() -> tuple[Row, ...]:
    return tuple(read())


def _plain(row: Row) -> dict[str, Any]:
    """Without what is not set."""
    values = {f.name: getattr(row, f.name) for f in fields(row) if getattr(row, f.name)}
    return values | {"tiles": asdict(row.tiles)}
