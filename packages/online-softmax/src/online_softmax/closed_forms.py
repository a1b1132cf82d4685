"""The traffic of every step in closed form; ``traffic.count``, which runs the step, must agree.

N queries, M keys and head_dim d, in tiles of B_q rows and B_k keys. Three sums over tiles say it
all: their scores (``area``), their rows (``rows``) and their keys (``keys``). Without causality
those are NM, N ⌈M / B_k⌉ and M ⌈N / B_q⌉.
"""

from __future__ import annotations

from dataclasses import dataclass

from .traffic import ROW, SPLITS, Count, Workload

BYTES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}
INPUTS = ("Q", "K", "V", "dO", "S", "P", "dP", "dS")  # these are in the dtype of the inputs
Operations = dict[str, int]


@dataclass(frozen=True)
class Tiles:
    """The tiles of a pass that are not skipped, summed up."""

    area: int
    rows: int
    keys: int


def tiles(load: Workload, block_q: int, block_k: int, skip: bool = False) -> Tiles:
    """All tiles, or with ``skip`` those in which causality leaves something to see.

    Row block i ends with row r = min((i + 1) B_q, N) - 1, which sees the keys up to r + M - N: it
    has ⌈(r + M - N + 1) / B_k⌉ tiles, none when that is negative and all of them at most.
    """
    n, m = load.seqlen_q, load.seqlen_k
    area = rows = keys = 0
    for start in range(0, n, block_q):
        height = min(block_q, n - start)
        width = m
        if skip and load.causal:
            visible = max(0, min(m, start + height + m - n))
            width = min(m, -(-visible // block_k) * block_k)
        area += height * width
        rows += height * -(-width // block_k)
        keys += width
    return Tiles(area, rows, keys)


def formula(name: str, load: Workload, backward: bool = False) -> Count:
    """What ``traffic.count`` gives, without running anything (and without ``lines``)."""
    loads, stores, matmul, other, narrow = (_BACKWARD if backward else _FORWARD)[name](load)
    size, wide = BYTES[load.dtype], max(4, BYTES[load.dtype])

    def in_bytes(accesses: dict[str, int]) -> int:
        return sum(n * (size if t in INPUTS or t in narrow else wide) for t, n in accesses.items())

    return Count(
        loads=_there(loads),
        stores=_there(stores),
        load_bytes=in_bytes(loads),
        store_bytes=in_bytes(stores),
        matmul=matmul,
        other=_there(other),
    )


def _there(numbers: dict[str, int]) -> dict[str, int]:
    return {name: number for name, number in numbers.items() if number}


Formula = tuple[dict[str, int], dict[str, int], int, Operations, tuple[str, ...]]


def _standard(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    loads = {"Q": n * d, "K": m * d, "S": n * m, "P": n * m, "V": m * d}
    stores = {"S": n * m, "P": n * m, "O": n * d}
    other = {
        "mul": n * m + n, "amax": n * m, "maximum": n, "sub": n * m + n, "exp": n * m + n,
        "sum": n * m, "add": 2 * n, "div": n * m, "log": n,
    }  # fmt: skip
    return loads, stores, 4 * n * m * d, other, ("O",)


def _two_pass(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    t = tiles(w, ROW, 1)
    loads = {"Q": n * d, "K": 2 * t.keys * d, "V": t.keys * d}
    other = {
        "mul": 3 * n * m, "amax": n * m, "maximum": n * m, "sub": 3 * n * m,
        "exp": 3 * n * m, "sum": n * m, "add": n * m + n * m * d + n, "div": n * m, "log": n,
    }  # fmt: skip
    return loads, {"O": n * d, "LSE": n}, 6 * n * m * d, other, ("O",)


def _one_pass(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    t = tiles(w, ROW, 1)
    loads = {"Q": n * d, "K": t.keys * d, "V": t.keys * d}
    other = {
        "mul": 2 * n * m + n * m * d, "amax": n * m, "maximum": n * m, "sub": 2 * n * m,
        "exp": 2 * n * m, "sum": n * m, "add": n * m + n * m * d + n, "div": n * d, "log": n,
    }  # fmt: skip
    return loads, {"O": n * d, "LSE": n}, 4 * n * m * d, other, ("O",)


def _tiled_v1(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    t = tiles(w, w.block_q, w.block_k)  # none is skipped
    loads = {
        "K": m * d, "V": m * d, "Q": t.rows * d, "O": t.rows * d, "l": t.rows, "m": t.rows,
    }  # fmt: skip
    stores = {"O": n * d + t.rows * d, "l": n + t.rows, "m": n + t.rows}
    other = {
        "mul": t.area + 2 * t.rows * (1 + d), "amax": t.area, "sub": t.area + 2 * t.rows,
        "exp": t.area + 2 * t.rows, "sum": t.area, "maximum": t.rows, "add": t.rows * (1 + d) + n,
        "div": t.rows * d, "log": n,
    }  # fmt: skip
    return loads, stores, 4 * t.area * d, other, ()


def _tiled_v2(w: Workload) -> Formula:
    n, d = w.seqlen_q, w.head_dim
    t = tiles(w, w.block_q, w.block_k, skip=True)
    loads = {"Q": n * d, "K": t.keys * d, "V": t.keys * d}
    other = {
        "mul": t.area + t.rows * (1 + d), "amax": t.area, "maximum": t.rows,
        "sub": t.area + t.rows, "exp": t.area + t.rows, "sum": t.area,
        "add": t.rows * (1 + d) + n, "div": n * d, "log": n,
    }  # fmt: skip
    return loads, {"O": n * d, "LSE": n}, 4 * t.area * d, other, ("O",)


def _split_kv(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    t = tiles(w, w.block_q, w.block_k, skip=True)
    share = max(1, -(-m // (SPLITS * w.block_k))) * w.block_k
    parts = max(1, -(-m // share))
    loads = {
        "Q": parts * n * d, "K": t.keys * d, "V": t.keys * d,
        "partial O": parts * n * d, "partial LSE": parts * n,
    }  # fmt: skip
    stores = {"partial O": parts * n * d, "partial LSE": parts * n, "O": n * d, "LSE": n}
    merges = (parts - 1) * n
    other = {
        "mul": 2 * t.area + t.rows * (1 + d) + n + 2 * merges * (1 + d), "amax": t.area,
        "maximum": t.rows + merges, "sub": t.area + t.rows + 2 * merges,
        "exp2": t.area + t.rows, "sum": t.area,
        "add": t.rows * (1 + d) + parts * n + merges * (1 + d) + n,
        "div": parts * n * (d + 1) + n * d, "log2": parts * n, "exp": 2 * merges, "log": n,
    }  # fmt: skip
    return loads, stores, 4 * t.area * d, other, ("O",)


def _standard_backward(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    loads = {
        "P": 2 * n * m, "dO": 2 * n * d, "V": m * d, "dP": n * m, "dS": 2 * n * m, "K": m * d,
        "Q": n * d,
    }  # fmt: skip
    stores = {"dV": m * d, "dP": n * m, "dS": n * m, "dQ": n * d, "dK": m * d}
    other = {
        "mul": 2 * n * m + n * d + m * d, "sum": n * m, "neg": n, "add": n * m,
    }  # fmt: skip
    return loads, stores, 8 * n * m * d, other, ()


def _tiled_v1_backward(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    t = tiles(w, w.block_q, w.block_k)
    across = m * -(-n // w.block_q)  # keys of all tiles
    loads = {
        "K": m * d, "V": m * d, "Q": t.rows * d, "O": t.rows * d, "dO": t.rows * d,
        "dQ": t.rows * d, "l": t.rows, "m": t.rows,
    }  # fmt: skip
    stores = {"dQ": n * d + t.rows * d, "dK": m * d, "dV": m * d}
    other = {
        "mul": 2 * t.area + 2 * t.rows * d + across * d, "sub": t.area, "exp": t.area,
        "div": t.area, "sum": t.rows * d, "neg": t.rows,
        "add": t.area + t.rows * d + 2 * across * d,
    }  # fmt: skip
    return loads, stores, 10 * t.area * d, other, ("O",)


def _tiled_v2_backward(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    t = tiles(w, w.block_q, w.block_k, skip=True)
    loads = {
        "dO": n * d + t.rows * d, "O": n * d, "K": m * d, "V": m * d, "Q": t.rows * d,
        "dQ": t.rows * d, "LSE": t.rows, "D": t.rows,
    }  # fmt: skip
    stores = {"D": n, "dQ": n * d + t.rows * d, "dK": m * d, "dV": m * d}
    other = {
        "mul": 2 * t.area + n * d + t.rows * d + t.keys * d, "sum": n * d, "neg": n,
        "sub": t.area, "exp": t.area, "add": t.area + t.rows * d + 2 * t.keys * d,
    }  # fmt: skip
    return loads, stores, 10 * t.area * d, other, ("O",)


_FORWARD = {
    "standard": _standard,
    "two-pass": _two_pass,
    "one-pass": _one_pass,
    "tiled-v1": _tiled_v1,
    "tiled-v2": _tiled_v2,
    "split-kv": _split_kv,
}
_BACKWARD = {
    "standard": _standard_backward,
    "tiled-v1": _tiled_v1_backward,
    "tiled-v2": _tiled_v2_backward,
}
