"""The traffic of the kernels in closed form; ``traffic.count``, which runs them, must agree.

N rows and as many keys of d columns, in tiles of B rows and B keys. Accesses end at row N and
column d. Arithmetic does not: a tile has B rows, B keys and W columns, the power of two that d is
padded to. Masks cost no arithmetic on floats, so that tiles with and without one cost the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tiles import padded
from .traffic import V1, V2, Count, Workload

Numbers = dict[str, int]
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# What is fp32 whatever the dtype of the inputs.
WIDE = {V1: ("O", "l", "m", "dQ"), V2: ("LSE", "D")}


@dataclass(frozen=True)
class Sums:
    """Sums over the tiles that are computed, and what is outside of tiles."""

    once: int  # N, rows or keys
    columns: int  # d
    tiles: int
    rows: int  # of all tiles, that there are
    keys: int
    scores: int  # of all tiles, as computed: B B each
    padded_rows: int  # B each
    padded_once: int  # of all blocks of rows, or of keys: B each
    width: int  # W


def sums(load: Workload, skip: bool) -> Sums:
    """Over all T² tiles, or with ``skip`` over those that causality leaves something to see in.

    Block i of rows then has i + 1 tiles, with (i + 1) B keys, but for N in the last one; block j of
    keys has T - j tiles, with N - j B rows.
    """
    n, block, blocks = load.seqlen, load.block, load.blocks
    before = blocks * (blocks - 1) // 2  # tiles below the diagonal: 0 + 1 + ... + T - 1
    tiles, rows, keys = blocks**2, blocks * n, blocks * n
    if skip:
        tiles, rows, keys = before + blocks, blocks * n - before * block, before * block + n
    return Sums(
        once=n,
        columns=load.head_dim,
        tiles=tiles,
        rows=rows,
        keys=keys,
        scores=tiles * block**2,
        padded_rows=tiles * block,
        padded_once=blocks * block,
        width=padded(load.head_dim),
    )


Formula = tuple[Numbers, Numbers, int, Numbers, tuple[str, ...]]


def formula(name: str, load: Workload, backward: bool = False) -> Count:
    """What ``traffic.count`` gives, without running anything."""
    skip = load.causal and name == V2  # as in its paper, V1 computes every tile
    s = sums(load, skip)
    loads, stores, products, other, lines = _FORMULAS[name, backward](s)

    def in_bytes(accesses: Numbers) -> int:
        sizes = dict.fromkeys(WIDE[name], 4)
        return sum(n * sizes.get(tensor, BYTES[load.dtype]) for tensor, n in accesses.items())

    return Count(
        loads=loads,
        stores=stores,
        load_bytes=in_bytes(loads),
        store_bytes=in_bytes(stores),
        matmul=products * 2 * load.block**2 * s.width,
        other=other,
        lines=lines,
    )


def _v1_forward(s: Sums) -> Formula:
    n, d, w = s.once, s.columns, s.width
    # K and V once. For every block of keys all rows, which begin as 0, 0 and -inf.
    loads = {
        "K": n * d, "V": n * d, "Q": s.rows * d, "O": s.rows * d, "l": s.rows, "m": s.rows,
    }  # fmt: skip
    stores = {"O": n * d + s.rows * d, "l": n + s.rows, "m": n + s.rows}
    other = {
        "mul": s.scores + s.padded_rows * (2 + 2 * w),  # scale; both terms of l and of O
        "amax": s.scores,
        "sub": s.scores + 2 * s.padded_rows,  # in every exponent
        "exp": s.scores + 2 * s.padded_rows,  # P; the factors of both terms
        "sum": s.scores,
        "maximum": s.padded_rows,
        "add": s.padded_rows * (1 + w),  # the terms of l and of O
        "div": s.padded_rows * w,  # O, every time
    }
    lines = (
        "store O", "store l", "store m", "load K", "load V", "load Q", "load O", "load l", "load m",
    )  # fmt: skip
    return loads, stores, 2 * s.tiles, other, lines  # QKᵀ, PV


def _v1_backward(s: Sums) -> Formula:
    n, d, w = s.once, s.columns, s.width
    # As in forward; dQ begins as 0, and comes and goes with every block of keys.
    loads = {
        "K": n * d, "V": n * d, "Q": s.rows * d, "O": s.rows * d, "dO": s.rows * d,
        "dQ": s.rows * d, "l": s.rows, "m": s.rows,
    }  # fmt: skip
    stores = {"dQ": n * d + s.rows * d, "dK": n * d, "dV": n * d}
    other = {
        # scale, P ∘ (dP - D); dO ∘ O, scale of the terms of dQ and dK
        "mul": 2 * s.scores + 3 * s.padded_rows * w,
        "sub": 2 * s.scores,  # S - m, dP - D
        "exp": s.scores,
        "div": s.scores,  # P, by l
        "sum": s.padded_rows * w,  # D, for every tile
        "add": 3 * s.padded_rows * w,  # the terms of dQ, dK and dV
    }
    lines = (
        "store dQ", "load K", "load V", "load Q", "load O", "load dO", "load dQ", "load l",
        "load m", "store dK", "store dV",
    )  # fmt: skip
    return loads, stores, 5 * s.tiles, other, lines  # QKᵀ, PᵀdO, dOVᵀ, dS K, dSᵀQ


def _v2_forward(s: Sums) -> Formula:
    n, d, w = s.once, s.columns, s.width
    # Q once, and for every block of rows the keys that it sees.
    loads = {"Q": n * d, "K": s.keys * d, "V": s.keys * d}
    stores = {"O": n * d, "LSE": n}
    other = {
        # scores and their maximum to powers of two; l, O; LSE from powers of two, once
        "mul": s.scores + s.padded_rows * (2 + w) + s.padded_once,
        "amax": s.scores,
        "maximum": s.padded_rows,
        "sub": s.scores + s.padded_rows,  # in every exponent
        "exp2": s.scores + s.padded_rows,  # P; the factor of l and of O
        "sum": s.scores,
        "add": s.padded_rows + s.padded_once,  # l (O: by the product); m + log l, once
        "div": s.padded_once * w,  # O, once
        "log2": s.padded_once,
    }
    lines = ("load Q", "load K", "load V", "store O", "store LSE")
    return loads, stores, 2 * s.tiles, other, lines  # QKᵀ, PV


def _v2_backward(s: Sums) -> Formula:
    n, d, w = s.once, s.columns, s.width
    loads = {
        "O": n * d,  # for D
        "dO": n * d + s.rows * d + n * d,  # for D; for dK and dV, by block of keys; for dQ
        "Q": s.rows * d + n * d,  # for dK and dV, by block of keys; for dQ
        "LSE": s.rows + n,
        "D": s.rows + n,
        "K": n * d + s.keys * d,  # for dK and dV; for dQ, by block of rows
        "V": n * d + s.keys * d,
    }
    stores = {"D": n, "dK": n * d, "dV": n * d, "dQ": n * d}
    other = {
        # For dK and dV, and again for dQ: scores to powers of two, P ∘ (dP - D). LSE to powers of
        # two: by tile, and again once. Once: dO ∘ O, scale of dK and of dQ.
        "mul": 2 * 2 * s.scores + s.padded_rows + s.padded_once * (1 + 3 * w),
        "sub": 2 * 2 * s.scores,  # S - LSE, dP - D, in both
        "exp2": 2 * s.scores,
        "sum": s.padded_once * w,  # D, once
    }
    lines = (
        "load O", "load dO", "store D",
        "load K", "load V", "load Q", "load LSE", "load D", "store dK", "store dV",
        "store dQ",
    )  # fmt: skip
    return loads, stores, (4 + 3) * s.tiles, other, lines  # QKᵀ, PᵀdO, dOVᵀ, dSᵀQ; QKᵀ, dOVᵀ, dS K


_FORMULAS = {
    (V1, False): _v1_forward,
    (V1, True): _v1_backward,
    (V2, False): _v2_forward,
    (V2, True): _v2_backward,
}
