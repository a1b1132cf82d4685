"""What is read of a compiled kernel: registers, spills, advisories, instructions, warp layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .sources import Compiled

# Instructions that are counted, by what they are for; others count in the total alone.
MATRIX = ("HMMA", "HGMMA", "UTCMMA")  # mma, wgmma and tcgen05
COPIES = ("LDGSTS", "UTMALDG", "UTMASTG", "UTMAREDG", "LDG", "STG", "ATOM", "LDL", "STL")
ON_CHIP = ("LDS", "STS", "LDSM", "STSM", "LDTM", "STTM")
BARRIERS = ("BAR", "SYNCS")
ARITHMETIC = ("FFMA", "FMUL", "FADD", "MUFU", "SHFL")
COUNTED = (*MATRIX, *COPIES, *ON_CHIP, *BARRIERS, *ARITHMETIC)
TOTAL = "all"
# Those that are counted under the name of another: for other formats, or for two numbers at once.
ALIASES = {
    "UTCHMMA": "UTCMMA",
    "UTCQMMA": "UTCMMA",
    "UTCIMMA": "UTCMMA",
    "FFMA2": "FFMA",
    "FMUL2": "FMUL",
    "FADD2": "FADD",
    "ATOMG": "ATOM",
    "RED": "ATOM",
}
NOT_COUNTED = ("NOP",)

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.M)
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
ADVISORY = re.compile(r"\((C\d+)\)")
WARP_SPECIALIZE = re.compile(r"\bttg\.warp_specialize\(")
LAYOUT = re.compile(r"#ttg\.nvidia_mma<\{.*?warpsPerCTA = \[([\d, ]+)\]")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One kernel: per thread where nothing else is said."""

    registers: int
    stack: int = 0  # bytes
    spill_stores: int = 0  # bytes
    spill_loads: int = 0
    shared: int = 0  # bytes of a block
    tensor_memory: int = 0  # columns of a block
    advisories: Mapping[str, int] = field(default_factory=dict)  # how often ptxas gives it, by code
    warp_specialized: int = 0  # loops or regions split over warps
    warps: tuple[str, ...] = ()  # how products are split over warps: "8x1" is 8 of rows
    instructions: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, without those that are 0 or empty."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def from_dict(cls, values: Any) -> Measured:
        """The same from plain values. Raises ValueError for what is none of its."""
        try:
            found = cls(**values | {"warps": tuple(values.get("warps", ()))})
            for number in (*found.numbers().values(), *found.counts().values()):
                if not isinstance(number, int) or number < 0:
                    raise TypeError(f"{number!r}: accepted is an int of 0 or more")
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not what is measured of a kernel: {error}") from error
        return found

    def numbers(self) -> dict[str, int]:
        """What is one number each, by name."""
        values = vars(self).items()
        return {n: v for n, v in values if n not in ("advisories", "warps", "instructions")}

    def counts(self) -> dict[str, int]:
        """Advisories and instructions, by code and name."""
        return {**self.advisories, **self.instructions}


def measure(compiled: Compiled) -> Measured:
    """Read a compiled kernel. Raises ValueError where the log or the SASS is none."""
    registers = [int(number) for number in REGISTERS.findall(compiled.log)]
    counts = count(compiled.sass)
    if not registers or not counts:
        missing = "log of ptxas -v" if not registers else "SASS"
        raise ValueError(f"the compiler gave no {missing}")
    frames = [tuple(map(int, frame)) for frame in STACK.findall(compiled.log)]
    stack, stores, loads = (sum(frame[i] for frame in frames) for i in range(3))
    layouts = {split.replace(", ", "x") for split in LAYOUT.findall(compiled.ttgir)}
    return Measured(
        registers=max(registers),
        stack=stack,
        spill_stores=stores,
        spill_loads=loads,
        shared=compiled.shared,
        tensor_memory=compiled.tensor_memory,
        advisories=dict(sorted(Counter(ADVISORY.findall(compiled.log)).items())),
        warp_specialized=len(WARP_SPECIALIZE.findall(compiled.ttgir)),
        warps=tuple(sorted(layouts)),
        instructions=counts,
    )


def count(sass: str) -> dict[str, int]:
    """Instructions of a listing by name, those that occur, and all together."""
    found = Counter(ALIASES.get(name, name) for name in INSTRUCTION.findall(sass))
    for name in NOT_COUNTED:
        del found[name]
    counts = {name: found[name] for name in COUNTED if found[name]}
    return counts | {TOTAL: found.total()} if found else {}
