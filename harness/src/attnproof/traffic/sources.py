"""What can be counted: a setting, the counts, and the packages that count (``attnproof.traffic``).

A package registers a tuple of ``TrafficSource`` under the entry-point group ``attnproof.traffic``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol

GROUP = "attnproof.traffic"
MATMUL_SPEED = 16  # a matmul operation is about 16 times as fast (Dao 2023, section 3.1: A100)
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One head of attention over as many keys as queries, and the chip that it runs on."""

    seqlen: int
    head_dim: int
    on_chip: int  # elements of on-chip memory, M
    dtype: str = "fp16"
    causal: bool = False
    backward: bool = False

    def __str__(self) -> str:
        words = [f"N={self.seqlen}", f"d={self.head_dim}", f"M={self.on_chip}", self.dtype]
        words += ["causal"] * self.causal + ["backward" if self.backward else "forward"]
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Accesses in elements by tensor and in bytes; operations, other than matmul by kind."""

    loads: Mapping[str, int]
    stores: Mapping[str, int]
    load_bytes: int
    store_bytes: int
    matmul: int
    other: Mapping[str, int]
    lines: tuple[str, ...] = ()  # kinds of accesses, in the order of their first
    ran: bool = field(default=True, compare=False)  # counted by running it; else by its formula

    @property
    def accesses(self) -> int:
        """Elements loaded and stored."""
        return sum(self.loads.values()) + sum(self.stores.values())

    @property
    def bytes(self) -> int:
        """Bytes loaded and stored."""
        return self.load_bytes + self.store_bytes

    @property
    def others(self) -> int:
        """Operations other than those of matmul."""
        return sum(self.other.values())

    @property
    def weighted(self) -> int:
        """Operations in the time of one of matmul: the others count 16 times."""
        return self.matmul + MATMUL_SPEED * self.others

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        values.pop("ran")
        values["lines"] = list(self.lines)
        return values


class TrafficSource(Protocol):
    """One algorithm whose traffic can be counted."""

    name: str
    title: str

    def unsupported(self, setting: Setting) -> str | None:
        """Why it has no such pass, a sentence, or None."""
        ...

    def count(self, setting: Setting) -> Traffic:
        """Its traffic for one head. Raises ValueError for a setting that makes no sense."""
        ...


def sources() -> dict[str, TrafficSource]:
    """Every registered source by name, in the order of the packages and then their own."""
    points = sorted(entry_points(group=GROUP))
    return {source.name: source for point in points for source in point.load()}
