"""The traffic of every step in closed form; ``traffic.count``, which runs the step, must agree.

N queries, L keys and head_dim d, in tiles of B_q rows and B_k keys. Three sums over tiles say it
all: their scores (``area``), their rows (``rows``) and their keys (``keys``). Without causality
those are NL, N ⌈L / B_k⌉ and L ⌈N / B_q⌉. ``accesses`` has the formulas of loads and stores, this
module those of operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from .accesses import LOADS, STORES, value
from .traffic import SPLITS, Count, Workload

BYTES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}
INPUTS = ("Q", "K", "V", "dO", "S", "P", "dP", "dS")  # these are in the dtype of the inputs
SKIPPING = ("tiled-v2", "split-kv")  # tiles that causality hides altogether
Operations = dict[str, int]


@dataclass(frozen=True)
class Tiles:
    """The tiles of a pass that are not skipped, summed up."""

    area: int
    rows: int
    keys: int


def tiles(load: Workload, block_q: int, block_k: int, skip: bool = False) -> Tiles:
    """All tiles, or with ``skip`` those in which causality leaves something to see.

    Row block i ends with row r = min((i + 1) B_q, N) - 1, which sees the keys up to r + L - N: it
    has ⌈(r + L - N + 1) / B_k⌉ tiles, none when that is negative and all of them at most.
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


def symbols(name: str, load: Workload) -> dict[str, int]:
    """The numbers that the formulas of a step are of."""
    t = tiles(load, load.block_q, load.block_k, skip=name in SKIPPING)
    return {
        "N": load.seqlen_q,
        "L": load.seqlen_k,
        "d": load.head_dim,
        "R": t.rows,
        "C": t.keys,
        "B": load.block_k,
        "p": _parts(load),
    }


def _parts(load: Workload) -> int:
    """How many parts split-KV makes of the keys: at most SPLITS, of whole tiles."""
    share = max(1, -(-load.seqlen_k // (SPLITS * load.block_k))) * load.block_k
    return max(1, -(-load.seqlen_k // share))


def formula(name: str, load: Workload, backward: bool = False) -> Count:
    """What ``traffic.count`` gives, without running anything (and without ``lines``)."""
    matmul, other, narrow = (_BACKWARD if backward else _FORWARD)[name](load)
    numbers = symbols(name, load)
    loads, stores = (
        {tensor: int(value(text, numbers)) for tensor, text in formulas[name, backward].items()}
        for formulas in (LOADS, STORES)
    )
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


# Operations of matmul, others, and the tensors beside INPUTS that are in the dtype of the inputs.
Formula = tuple[int, Operations, tuple[str, ...]]


def _standard(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    other = {
        "mul": n * m + n, "amax": n * m, "maximum": n, "sub": n * m + n, "exp": n * m + n,
        "sum": n * m, "add": 2 * n, "div": n * m, "log": n,
    }  # fmt: skip
    return 4 * n * m * d, other, ("O",)


def _two_pass(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    other = {
        "mul": 3 * n * m, "amax": n * m, "maximum": n * m, "sub": 3 * n * m,
        "exp": 3 * n * m, "sum": n * m, "add": n * m + n * m * d + n, "div": n * m, "log": n,
    }  # fmt: skip
    return 6 * n * m * d, other, ("O",)


def _one_pass(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    other = {
        "mul": 2 * n * m + n * m * d, "amax": n * m, "maximum": n * m, "sub": 2 * n * m,
        "exp": 2 * n * m, "sum": n * m, "add": n * m + n * m * d + n, "div": n * d, "log": n,
    }  # fmt: skip
    return 4 * n * m * d, other, ("O",)


def _tiled_v1(w: Workload) -> Formula:
    n, d = w.seqlen_q, w.head_dim
    t = tiles(w, w.block_q, w.block_k)  # none is skipped
    other = {
        "mul": t.area + 2 * t.rows * (1 + d), "amax": t.area, "sub": t.area + 2 * t.rows,
        "exp": t.area + 2 * t.rows, "sum": t.area, "maximum": t.rows, "add": t.rows * (1 + d) + n,
        "div": t.rows * d, "log": n,
    }  # fmt: skip
    return 4 * t.area * d, other, ()


def _tiled_v2(w: Workload) -> Formula:
    n, d = w.seqlen_q, w.head_dim
    t = tiles(w, w.block_q, w.block_k, skip=True)
    other = {
        "mul": t.area + t.rows * (1 + d), "amax": t.area, "maximum": t.rows,
        "sub": t.area + t.rows, "exp": t.area + t.rows, "sum": t.area,
        "add": t.rows * (1 + d) + n, "div": n * d, "log": n,
    }  # fmt: skip
    return 4 * t.area * d, other, ("O",)


def _split_kv(w: Workload) -> Formula:
    n, d = w.seqlen_q, w.head_dim
    t = tiles(w, w.block_q, w.block_k, skip=True)
    parts = _parts(w)
    merges = (parts - 1) * n
    other = {
        "mul": 2 * t.area + t.rows * (1 + d) + n + 2 * merges * (1 + d), "amax": t.area,
        "maximum": t.rows + merges, "sub": t.area + t.rows + 2 * merges,
        "exp2": t.area + t.rows, "sum": t.area,
        "add": t.rows * (1 + d) + parts * n + merges * (1 + d) + n,
        "div": parts * n * (d + 1) + n * d, "log2": parts * n, "exp": 2 * merges, "log": n,
    }  # fmt: skip
    return 4 * t.area * d, other, ("O",)


def _standard_backward(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    other = {
        "mul": 2 * n * m + n * d + m * d, "sum": n * m, "neg": n, "add": n * m,
    }  # fmt: skip
    return 8 * n * m * d, other, ()


def _tiled_v1_backward(w: Workload) -> Formula:
    n, m, d = w.seqlen_q, w.seqlen_k, w.head_dim
    t = tiles(w, w.block_q, w.block_k)
    across = m * -(-n // w.block_q)  # keys of all tiles
    other = {
        "mul": 2 * t.area + 2 * t.rows * d + across * d, "sub": t.area, "exp": t.area,
        "div": t.area, "sum": t.rows * d, "neg": t.rows,
        "add": t.area + t.rows * d + 2 * across * d,
    }  # fmt: skip
    return 10 * t.area * d, other, ("O",)


def _tiled_v2_backward(w: Workload) -> Formula:
    n, d = w.seqlen_q, w.head_dim
    t = tiles(w, w.block_q, w.block_k, skip=True)
    other = {
        "mul": 2 * t.area + n * d + t.rows * d + t.keys * d, "sum": n * d, "neg": n,
        "sub": t.area, "exp": t.area, "add": t.area + t.rows * d + 2 * t.keys * d,
    }  # fmt: skip
    return 10 * t.area * d, other, ("O",)


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
