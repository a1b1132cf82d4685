"""What is measured, as data: suites of cells, a cell being a problem and a direction through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from attn_reference.problem import Problem

DIRECTIONS = ("forward", "backward", "both")
HIDDEN = 2048  # heads times head_dim, in the grid of the FlashAttention papers
TOKENS = 16384  # batch times seqlen, there
QKV = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing to time. ``backward`` is timed alone, its forward done before."""

    suite: str
    direction: str  # one of DIRECTIONS
    problem: Problem
    clock: str = "device"  # "device": the time of its kernels; "wall": that of its callers

    @property
    def name(self) -> str:
        """Unique within a suite and stable: the direction and the id of the problem."""
        return f"{self.direction}-{self.problem.id}"

    @property
    def unit(self) -> str:
        """In what the table shows it: memory limits a single query, arithmetic the others."""
        if self.clock == "wall":
            return "µs"
        return "GB/s" if self.problem.seqlen_q == 1 else "TFLOP/s"

    @property
    def label(self) -> str:
        """A short name for a row of the table."""
        p = self.problem
        seqlens = f"S{p.keys}" if p.seqlen_q == p.keys else f"Sq{p.seqlen_q} S{p.keys}"
        causal = "full" if p.causal == "none" else "causal"
        return f"b{p.batch} d{p.head_dim} {seqlens} {causal}"

    def as_dict(self) -> dict[str, str]:
        """Plain values, for JSON."""
        return {
            "suite": self.suite,
            "direction": self.direction,
            "problem": self.problem.id,
            "clock": self.clock,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``as_dict``."""
        return cls(**{**values, "problem": Problem.from_id(values["problem"])})


def papers(dtype: str) -> Iterator[Cell]:
    """The grid of the FlashAttention papers: 16k tokens, hidden size 2048, full and causal.

    Source: Dao 2023 (arXiv 2307.08691), section 4.1; Shah et al. 2024 (arXiv 2407.08608).
    """
    for direction in ("forward", "backward"):
        for head_dim in (64, 128, 256):
            for seqlen in (512, 1024, 2048, 4096, 8192, 16384):
                for causal in ("none", "top-left"):
                    yield Cell(
                        suite="papers",
                        direction=direction,
                        problem=Problem(
                            batch=TOKENS // seqlen,
                            heads_q=HIDDEN // head_dim,
                            seqlen_q=seqlen,
                            head_dim=head_dim,
                            dtype=dtype,
                            causal=causal,
                            gradients=QKV if direction == "backward" else (),
                        ),
                    )


def decoding(dtype: str) -> Iterator[Cell]:
    """One query against 64k keys: 32 query and 8 key heads of 128."""
    for batch in (1, 8, 32):
        yield _decoding("decoding", dtype, batch, heads=(32, 8), keys=65536, head_dim=128)


def overhead(dtype: str) -> Iterator[Cell]:
    """What a call costs its caller: inputs so small that the device has next to nothing to do,
    which require gradients, so that what autograd records is part of it."""
    for direction in ("forward", "both"):
        yield Cell(
            suite="overhead",
            direction=direction,
            problem=Problem(heads_q=2, seqlen_q=64, head_dim=64, dtype=dtype, gradients=QKV),
            clock="wall",
        )


def small(dtype: str) -> Iterator[Cell]:
    """A few problems that a CPU gets through, of each kind."""
    for direction in ("forward", "backward"):
        for seqlen in (128, 256):
            for causal in ("none", "top-left"):
                yield Cell(
                    suite="small",
                    direction=direction,
                    problem=Problem(
                        heads_q=4,
                        seqlen_q=seqlen,
                        head_dim=64,
                        dtype=dtype,
                        causal=causal,
                        gradients=QKV if direction == "backward" else (),
                    ),
                )
    yield _decoding("small", dtype, batch=1, heads=(4, 2), keys=4096, head_dim=64)


def _decoding(
    suite: str, dtype: str, batch: int, heads: tuple[int, int], keys: int, head_dim: int
) -> Cell:
    problem = Problem(
        batch=batch,
        heads_q=heads[0],
        heads_kv=heads[1],
        seqlen_q=1,
        seqlen_k=keys,
        head_dim=head_dim,
        dtype=dtype,
    )
    return Cell(suite=suite, direction="forward", problem=problem)


SUITES: Mapping[str, Callable[[str], Iterator[Cell]]] = {
    "papers": papers,
    "decoding": decoding,
    "overhead": overhead,
    "small": small,
}
DEFAULT_SUITES = {"cuda": ("papers", "decoding", "overhead"), "cpu": ("small", "overhead")}
