"""What is measured: cells, each a problem and a direction, in suites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from attn_reference.problem import Problem

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
TOKENS, HIDDEN = 16384, 2048  # of FlashAttention's papers: in all, and heads * head_dim
GRADIENTS = ("q", "k", "v")


@dataclass(frozen=True)
class Cell:
    """One measurement of every peer. ``wall``: by the clock of the host, per call, and not by that
    of the device: what a call costs beside its kernels."""

    problem: Problem
    direction: str
    wall: bool = False

    @property
    def id(self) -> str:
        """Stable and readable."""
        return f"{self.problem.id}:{self.direction}"

    @property
    def judged(self) -> Problem:
        """The problem as it is judged, with the gradients that are measured."""
        return (
            self.problem
            if self.direction == FORWARD
            else replace(self.problem, gradients=GRADIENTS)
        )


def papers(dtype: str) -> list[Cell]:
    """The grid of FlashAttention 2 and 3 (Dao 2023, section 4.1): 16,384 tokens, hidden size 2048,
    head_dim 64, 128 and 256, sequences of 512 to 16,384, full and causal."""
    return _grid(dtype, (64, 128, 256), (512, 1024, 2048, 4096, 8192, 16384), TOKENS, HIDDEN)


def core(dtype: str) -> list[Cell]:
    """Of that grid what is compared most: head_dim 64 and 128, sequences of 2048 to 16,384."""
    return _grid(dtype, (64, 128), (2048, 4096, 8192, 16384), TOKENS, HIDDEN)


def small(dtype: str) -> list[Cell]:
    """The same grid, small enough for a CPU."""
    return _grid(dtype, (64,), (128, 256), 512, 256)


def decoding(dtype: str) -> list[Cell]:
    """One query for each of 32 heads, 8 heads of keys, 65,536 keys, batches of 1, 8 and 32."""
    return [
        Cell(
            Problem(
                batch=batch, seqlen_q=1, seqlen_k=65536, heads_q=32, heads_kv=8, head_dim=128,
                dtype=dtype,
            ),
            FORWARD,
        )
        for batch in (1, 8, 32)
    ]  # fmt: skip


def overhead(dtype: str) -> list[Cell]:
    """Tiny inputs, by the clock of the host: what Python and the launch cost."""
    tiny = Problem(
        batch=1, seqlen_q=64, seqlen_k=64, heads_q=2, heads_kv=2, head_dim=64, dtype=dtype
    )
    return [Cell(tiny, direction, wall=True) for direction in (FORWARD, BOTH)]


SUITES: dict[str, Callable[[str], list[Cell]]] = {
    "papers": papers,
    "core": core,
    "decoding": decoding,
    "overhead": overhead,
    "small": small,
}


def _grid(
    dtype: str, dims: tuple[int, ...], lengths: tuple[int, ...], tokens: int, hidden: int
) -> list[Cell]:
    return [
        Cell(
            Problem(
                batch=tokens // seqlen, seqlen_q=seqlen, seqlen_k=seqlen, heads_q=hidden // dim,
                heads_kv=hidden // dim, head_dim=dim, dtype=dtype, causal=causal,
            ),
            direction,
        )
        for dim in dims
        for causal in ("none", "bottom-right")
        for seqlen in lengths
        for direction in (FORWARD, BACKWARD)
    ]  # fmt: skip
