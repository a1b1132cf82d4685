"""Rows split over warps, no exchange between warps in the softmax: read from what is compiled."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
DEFINITION = re.compile(r"^#(\w+) = (#ttg\..*)$", re.MULTILINE)
WARPS = re.compile(r"warpsPerCTA = \[([\d, ]+)\]")
REDUCTION = re.compile(r'"tt\.reduce"\(.*<\{axis = (\d) : i32\}>')
CONVERSION = re.compile(r"ttg\.convert_layout %\S+ : (tensor<.*>) -> (tensor<.*>) loc")
THROUGH_SHARED = re.compile(r"ttg\.local_(?:alloc %\S+|store %\S+, %\S+) : \(?(tensor<[^)]*>)")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels by name, compiled in a process that does not interpret, into an empty cache."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def exchanges(ttgir):
    """Where warps exchange what belongs to the softmax, a sentence each.

    Between warps go: a reduction along an axis that warps are split over; and, in a loop, a tile
    of products, P or a state of rows whose warps change, or that is put into shared memory.
    """
    layouts = {
        name: [int(n) for n in warps[1].split(",")]
        for name, text in DEFINITION.findall(ttgir)
        if (warps := WARPS.search(text))
    }
    products = {name for name, text in DEFINITION.findall(ttgir) if "nvidia_mma" in text}

    def layout(tensor):
        return next(n for n in reversed(re.findall(r"#(\w+)", tensor)) if n not in ("ttg", "smem"))

    def warps(tensor):
        return layouts.get(layout(tensor), "unknown")

    found, loop, axis = [], None, None
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if loop is None and "scf.for" in line:
            loop = indent
        elif loop is not None and indent == loop and line.lstrip().startswith("}"):
            loop = None
        if reduction := REDUCTION.search(line):
            axis = int(reduction[1])
        elif axis is not None and "}) : (" in line:
            split = warps(line.split("->")[0])
            if split == "unknown" or split[axis] != 1:
                found.append(f"reduction along axis {axis}, warps {split}")
            axis = None
        if loop is None:
            continue
        if conversion := CONVERSION.search(line):
            before, after = map(warps, conversion.groups())
            if before != after or before == "unknown" or before[1:] != [1]:
                found.append(f"conversion in a loop, warps {before} to {after}")
        if (stored := THROUGH_SHARED.search(line)) and layout(stored[1]) in products:
            found.append(f"{stored[1]} in a loop through shared memory")
    return found


def check_rows(ttgir, warps, loops, reductions):
    """That rows are split over so many warps, and nothing is exchanged in those loops."""
    assert exchanges(ttgir) == []
    split = [text for _, text in DEFINITION.findall(ttgir) if "nvidia_mma" in text]
    assert split
    assert all(f"warpsPerCTA = [{warps}, 1]" in text for text in split)
    assert ttgir.count("scf.for") == loops
    assert len(REDUCTION.findall(ttgir)) == reductions


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_rows_are_split_over_warps(compiled, capability, dim):
    # The two loops of a causal mask, each with its maximum and its sum.
    check_rows(compiled[f"forward-{capability}-{dim}"]["ttgir"], 8, loops=2, reductions=4)


@pytest.mark.parametrize(("dim", "consumers"), [(64, 3), (128, 2)])
def test_rows_are_split_over_warpgroups_on_hopper(compiled, dim, consumers):
    # Each has the first tile and those two loops; the loading warp has one loop.
    check_rows(compiled[f"hopper-forward-{dim}"]["ttgir"], 4, 2 * consumers + 1, 6 * consumers)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", ["forward", "keys", "queries"])
def test_hopper_has_a_loading_warp_and_products_in_flight(compiled, kernel, dim):
    ttgir = compiled[f"hopper-{kernel}-{dim}"]["ttgir"]
    assert "ttg.warp_specialize" in ttgir
    assert "ttng.async_tma_copy_global_to_local" in ttgir
    products = [line for line in ttgir.splitlines() if "ttng.warp_group_dot " in line]
    assert products
    assert all("isAsync = true" in line for line in products)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("planted-reduction-80", r"reduction along axis 1, warps \[1, 4\]"),
        ("planted-reduction-90", r"reduction along axis 1, warps \[1, 4\]"),
        ("planted-reduction-80", r"tensor<16x64xbf16, #mma> in a loop through shared memory"),
        ("planted-conversion-90", r"conversion in a loop, warps \[8, 1\] to \[4, 2\]"),
    ],
)
def test_the_check_finds_exchange(compiled, name, sentence):
    assert any(re.fullmatch(sentence, found) for found in exchanges(compiled[name]["ttgir"]))


def test_the_check_finds_a_reduction_over_rows(compiled):
    ttgir = compiled["forward-90-64"]["ttgir"].replace(
        "<{axis = 1 : i32}> ({", "<{axis = 0 : i32}> ({"
    )
    assert exchanges(ttgir) == ["reduction along axis 0, warps [8, 1]"] * 4


def test_shared_memory_is_within_the_limit(compiled):
    beyond = {
        name: (kernel["shared"], kernel["limit"])
        for name, kernel in compiled.items()
        if not 0 < kernel["shared"] <= kernel["limit"]
    }
    assert not beyond


def test_rules_of_one_name_are_compiled_apart(compiled):
    even, odd = (compiled[f"rule-{name}"]["ttgir"] for name in ("even", "odd"))
    assert even.count("tt.func") == odd.count("tt.func") == 1
    plain = [re.sub(r"loc\(.*|#loc.*", "", text) for text in (even, odd)]
    assert plain[0] != plain[1]
