"""What the steps access and compute, counted by running them, is what the closed forms say."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from online_softmax.accesses import LOADS, SAVED, STORES, TOTALS, main, value
from online_softmax.closed_forms import formula, symbols, tiles
from online_softmax.matmul import tiled_matmul
from online_softmax.memory import Memory
from online_softmax.traffic import (
    BACKWARD,
    FORWARD,
    PER_ROW,
    Workload,
    block_for,
    count,
)

PASSES = [(name, False) for name in FORWARD] + [(name, True) for name in BACKWARD]
# N and M that tiles divide and do not divide, and ones smaller than a tile.
LENGTHS = [(128, 128), (96, 128), (100, 77), (1, 200), (33, 1), (7, 5)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "x".join(map(str, lengths)))
@pytest.mark.parametrize(("name", "backward"), PASSES)
def test_counts_are_the_closed_forms(
    name: str, backward: bool, lengths: tuple[int, int], causal: bool
) -> None:
    n, m = (min(length, 40) for length in lengths) if name in PER_ROW else lengths
    for head_dim, on_chip, dtype, shape in (
        (16, 2048, "fp16", 1), (8, 300, "fp32", 2), (20, 10000, "bf16", 3),
    ):  # fmt: skip
        block = block_for(head_dim, on_chip)
        load = Workload(
            seqlen_q=n, seqlen_k=m, head_dim=head_dim, dtype=dtype, causal=causal,
            block_q=block // shape + 1, block_k=block,
        )  # fmt: skip
        if name in PER_ROW:
            load = replace(load, seqlen_q=n // 4 + 1)
        counted = count(name, load, backward)
        assert replace(counted, lines=()) == formula(name, load, backward)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_sums_over_tiles_without_causality(lengths: tuple[int, int]) -> None:
    n, m = lengths
    load = Workload(seqlen_q=n, seqlen_k=m, head_dim=8, block_q=12, block_k=20)
    numbers = symbols("tiled-v2", load)
    assert (numbers["R"], numbers["C"]) == (n * math.ceil(m / 20), m * math.ceil(n / 12))
    assert numbers["p"] == math.ceil(m / (math.ceil(m / (4 * 20)) * 20))


def test_formulas_are_evaluated() -> None:
    numbers = {"N": 2, "d": 3, "M": 8}
    assert value("N²d²/M + 4Nd - 5", numbers) == Fraction(36, 8) + 24 - 5
    assert value("12N²d", numbers) == 144
    with pytest.raises(KeyError, match="L"):
        value("NL", numbers)
    for wrong in ("N(d + 1)", "N + ", "Nd + Σ"):
        with pytest.raises(ValueError, match="no formula"):
            value(wrong, numbers)


# N a multiple of a block of B = M / 4d rows and keys, M at most 16 d².
@pytest.mark.parametrize(
    ("n", "d", "block"), [(96, 16, 16), (128, 16, 64), (64, 8, 8), (24, 8, 24)]
)
@pytest.mark.parametrize(("name", "backward"), PASSES)
def test_totals_in_terms_of_the_size_of_the_chip(
    name: str, backward: bool, n: int, d: int, block: int
) -> None:
    on_chip = 4 * d * block
    assert block_for(d, on_chip) == block
    load = Workload(seqlen_q=n, seqlen_k=n, head_dim=d, block_q=block, block_k=block)
    if name in PER_ROW:
        load = replace(load, seqlen_q=n // 4, seqlen_k=n // 4)
    counted = count(name, load, backward, "cpu" if name in PER_ROW else "meta")
    numbers = symbols(name, load) | {"M": on_chip}
    elements = sum(counted.loads.values()) + sum(counted.stores.values())
    assert value(TOTALS[name, backward], numbers) == elements


@pytest.mark.parametrize(("n", "d", "block"), [(96, 16, 16), (128, 16, 64), (256, 64, 32)])
def test_what_v2_saves(n: int, d: int, block: int) -> None:
    load = Workload(seqlen_q=n, seqlen_k=n, head_dim=d, block_q=block, block_k=block)
    v1, v2 = count("tiled-v1", load, device="meta"), count("tiled-v2", load, device="meta")
    saved = sum(v1.other.values()) - sum(v2.other.values())
    assert value(SAVED, symbols("tiled-v2", load)) == saved


def test_every_pass_has_its_formulas() -> None:
    assert LOADS.keys() == STORES.keys() == TOTALS.keys() == set(PASSES)


PAGE = Path(__file__).parents[3] / "docs" / "online-softmax.md"
SHOWN = re.compile(
    r"<!-- output of: python -m online_softmax.accesses (.+?) -->\n\n(.+?)\n\n<!--", re.DOTALL
)


def test_the_page_shows_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text("utf-8")
    shown = []
    for arguments, table in SHOWN.findall(page):
        main(arguments.split())
        assert capsys.readouterr().out.strip() == table
        names = [word for word in arguments.split() if word != "--backward"]
        shown += [(name, "--backward" in arguments) for name in names]
    assert sorted(shown) == sorted(PASSES)
    assert f"{SAVED} operations" in page


@pytest.mark.parametrize("words", [[], ["tiled-v3"], ["one-pass", "--backward"]])
def test_no_formulas_is_bad_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)


@pytest.mark.parametrize(("name", "backward"), [p for p in PASSES if p[0] not in PER_ROW])
def test_numbers_do_not_matter(name: str, backward: bool) -> None:
    load = Workload(seqlen_q=33, seqlen_k=65, head_dim=8, block_q=16, block_k=32, causal=True)
    assert count(name, load, backward, "meta") == count(name, load, backward)


def test_standard_attention_has_eight_accesses() -> None:
    load = Workload(seqlen_q=32, seqlen_k=32, head_dim=8)
    assert count("standard", load).lines == (
        "load Q", "load K", "store S",
        "load S", "store P",
        "load P", "load V", "store O",
    )  # fmt: skip


def test_32_by_32_matmul() -> None:
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    for block, accesses in ((1, 65_536), (16, 4_096)):
        memory = Memory()
        placed = (memory.place(name, t, t.dtype, vector=True) for name, t in (("A", a), ("B", b)))
        product = tiled_matmul(*placed, block)
        assert memory.loads.total() == accesses
        torch.testing.assert_close(product, a @ b)


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_v1_reads_and_writes_o_once_per_block_of_keys_and_v2_once(blocks: int) -> None:
    load = Workload(seqlen_q=48, seqlen_k=16 * blocks, head_dim=8, block_q=16, block_k=16)
    o = 48 * 8
    v1, v2 = count("tiled-v1", load), count("tiled-v2", load)
    assert (v1.loads["O"], v1.stores["O"]) == (blocks * o, (1 + blocks) * o)  # and zeros first
    assert (v2.loads.get("O", 0), v2.stores["O"]) == (0, o)


@pytest.mark.parametrize("on_chip", [2**12, 2**14, 2**16])
def test_traffic_falls_as_the_chip_grows(on_chip: int) -> None:
    """Θ(N² d² / M) (Dao et al. 2022, theorem 2) against Θ(N d + N²) for standard attention."""
    n, d = 4096, 64
    block = block_for(d, on_chip)
    load = Workload(seqlen_q=n, seqlen_k=n, head_dim=d, block_q=block, block_k=block)
    found = formula("tiled-v1", load)
    accesses = sum(found.loads.values()) + sum(found.stores.values())
    asymptotic = n * n * d * d / on_chip
    # For each of the 4 N d / M blocks of keys Q comes in, and O, l and m come in and go out; once,
    # K and V come in, and O, l and m go out.
    assert accesses == 4 * asymptotic * (3 + 4 / d) + 3 * n * d + 2 * n
    standard = formula("standard", load)
    assert sum(standard.loads.values()) + sum(standard.stores.values()) == 4 * n * n + 4 * n * d


def test_causality_halves_the_tiles() -> None:
    load = Workload(seqlen_q=640, seqlen_k=640, head_dim=8, causal=True)
    t = 640 // 64
    assert tiles(load, 64, 64, skip=True).area == t * (t + 1) // 2 * 64 * 64
    assert tiles(load, 64, 64).area == 640 * 640


def test_a_chip_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="on_chip=255: accepted is 256"):
        block_for(64, 255)
