"""What every step loads from HBM and stores there, as formulas, in elements by tensor.

``closed_forms`` computes with them, and docs/online-softmax.md shows them:
``python -m online_softmax.accesses STEP... [--backward]`` prints its tables. A formula is a sum of
products: N queries, L keys, head_dim d, and over all tiles that are not skipped the sum of their
rows R and of their keys C; p parts of the keys, B rows and keys of a tile, M elements on the chip.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

Pass = tuple[str, bool]  # a step, and whether it is its backward pass

LOADS: dict[Pass, dict[str, str]] = {
    ("standard", False): {"Q": "Nd", "K": "Ld", "S": "NL", "P": "NL", "V": "Ld"},
    ("two-pass", False): {"Q": "Nd", "K": "2NLd", "V": "NLd"},
    ("one-pass", False): {"Q": "Nd", "K": "NLd", "V": "NLd"},
    ("tiled-v1", False): {"Q": "Rd", "K": "Ld", "V": "Ld", "O": "Rd", "l": "R", "m": "R"},
    ("tiled-v2", False): {"Q": "Nd", "K": "Cd", "V": "Cd"},
    ("split-kv", False): {
        "Q": "pNd", "K": "Cd", "V": "Cd", "partial O": "pNd", "partial LSE": "pN",
    },
    ("standard", True): {
        "Q": "Nd", "K": "Ld", "P": "2NL", "V": "Ld", "dO": "2Nd", "dP": "NL", "dS": "2NL",
    },
    ("tiled-v1", True): {
        "Q": "Rd", "K": "Ld", "V": "Ld", "O": "Rd", "l": "R", "m": "R", "dO": "Rd", "dQ": "Rd",
    },
    ("tiled-v2", True): {
        "Q": "Rd", "K": "Ld", "V": "Ld", "O": "Nd", "LSE": "R", "dO": "Nd + Rd", "D": "R",
        "dQ": "Rd",
    },
}  # fmt: skip
STORES: dict[Pass, dict[str, str]] = {
    ("standard", False): {"S": "NL", "P": "NL", "O": "Nd"},
    ("two-pass", False): {"O": "Nd", "LSE": "N"},
    ("one-pass", False): {"O": "Nd", "LSE": "N"},
    ("tiled-v1", False): {"O": "Nd + Rd", "l": "N + R", "m": "N + R"},
    ("tiled-v2", False): {"O": "Nd", "LSE": "N"},
    ("split-kv", False): {"partial O": "pNd", "partial LSE": "pN", "O": "Nd", "LSE": "N"},
    ("standard", True): {"dP": "NL", "dS": "NL", "dQ": "Nd", "dK": "Ld", "dV": "Ld"},
    ("tiled-v1", True): {"dQ": "Nd + Rd", "dK": "Ld", "dV": "Ld"},
    ("tiled-v2", True): {"D": "N", "dQ": "Nd + Rd", "dK": "Ld", "dV": "Ld"},
}
# All loads and stores for L = N, without causality, where B = M / 4d divides N: R = C = 4N²d / M.
TOTALS: dict[Pass, str] = {
    ("standard", False): "4N² + 4Nd",
    ("two-pass", False): "3N²d + 2Nd + N",
    ("one-pass", False): "2N²d + 2Nd + N",
    ("tiled-v1", False): "12N²d²/M + 16N²d/M + 3Nd + 2N",
    ("tiled-v2", False): "8N²d²/M + 2Nd + N",
    ("split-kv", False): "8N²d²/M + 3pNd + 2pN + Nd + N",
    ("standard", True): "7N² + 8Nd",
    ("tiled-v1", True): "20N²d²/M + 8N²d/M + 5Nd",
    ("tiled-v2", True): "16N²d²/M + 8N²d/M + 7Nd + N",
}
# Operations other than matmul that V2 saves over V1 there, forward.
SAVED = "2N²d/B + 3N²/B - Nd"

_SIGN = re.compile(r" ([+-]) ")
_TERM = re.compile(r"(\d*)((?:[A-Za-z]²?)*)((?:/[A-Za-z])?)")


def value(formula: str, numbers: Mapping[str, int]) -> Fraction:
    """What a formula is for these numbers. Raises KeyError for a symbol that they lack, and
    ValueError for what is no formula."""
    total = Fraction(0)
    first, *others = _SIGN.split(formula)
    for sign, term in zip(("+", *others[::2]), (first, *others[1::2]), strict=True):
        found = _TERM.fullmatch(term)
        if found is None or not term:
            raise ValueError(f"{formula!r}: no formula, at {term!r}")
        factors = [
            numbers[symbol] ** (2 if square else 1)
            for symbol, square in re.findall(r"([A-Za-z])(²?)", found[2])
        ]
        product = Fraction(int(found[1] or 1) * math.prod(factors))
        if found[3]:
            product /= numbers[found[3][1:]]
        total += product if sign == "+" else -product
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of the formulas of some steps."""
    parser = argparse.ArgumentParser(
        prog="python -m online_softmax.accesses", description="Formulas of what steps access."
    )
    parser.add_argument("steps", nargs="+", metavar="STEP", choices=[name for name, _ in TOTALS])
    parser.add_argument("--backward", action="store_true", help="of the backward pass")
    options = parser.parse_args(arguments)
    passes = [(name, options.backward) for name in options.steps]
    if missing := [name for name, _ in passes if (name, options.backward) not in TOTALS]:
        parser.error(f"no backward pass: {', '.join(missing)}")
    print(table(passes))


def table(passes: Sequence[Pass]) -> str:
    """Markdown: a row per tensor, a column per pass, loads / stores."""
    tensors = dict.fromkeys(t for one in passes for t in (*LOADS[one], *STORES[one]))
    rows = [["loads / stores", *(name for name, _ in passes)], ["---"] * (1 + len(passes))]
    for tensor in tensors:
        both = [(LOADS[one].get(tensor), STORES[one].get(tensor)) for one in passes]
        rows.append([tensor, *(f"{a or '–'} / {b or '–'}" if a or b else "" for a, b in both)])
    rows.append(["all, L = N, B = M/4d", *(TOTALS[one] for one in passes)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
