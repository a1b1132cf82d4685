"""What a kernel compiles to against what is pinned: what fails, and what is worth a look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .measure import ARITHMETIC, BARRIERS, COPIES, MATRIX, ON_CHIP, TOTAL, Measured

GRAVE = "C75"  # advisories of ptxas: wgmma is serialised
# An instruction, those that do the same better, and those that do it worse.
RANKS = (
    ("UTCMMA", (), ("HGMMA", "HMMA")),
    ("HGMMA", ("UTCMMA",), ("HMMA",)),
    ("HMMA", ("UTCMMA", "HGMMA"), ()),
    ("UTMALDG", (), ("LDG", "LDGSTS")),
    ("UTMASTG", (), ("STG",)),
)
UNITS = {
    "stack": "bytes of stack",
    "spill_stores": "bytes of spill stores",
    "spill_loads": "bytes of spill loads",
    "shared": "bytes of shared memory",
    "tensor_memory": "columns of tensor memory",
    "warp_specialized": "warp-specialised loops",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a kernel here: measured, or why it does not compile."""

    measured: Measured | None = None
    error: str | None = None
    limits: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that is not as pinned. ``fails``: in a way that a kernel must not be."""

    kernel: str
    what: str
    pinned: str = ""
    found: str = ""
    fails: bool = False

    def __str__(self) -> str:
        values = " → ".join(value for value in (self.pinned, self.found) if value)
        return f"{self.what} {values}" if values else self.what


def compare(pinned: Mapping[str, Measured], found: Mapping[str, Outcome]) -> list[Change]:
    """Everything that differs, kernel by kernel, what fails first."""
    changes = []
    for kernel in sorted(pinned.keys() | found.keys()):
        each = list(_compare(kernel, pinned.get(kernel), found.get(kernel)))
        changes += sorted(each, key=lambda change: not change.fails)
    return changes


def _compare(kernel: str, pinned: Measured | None, outcome: Outcome | None) -> Iterator[Change]:
    if outcome is None:
        yield Change(kernel=kernel, what="gone: pinned, and compiled no more", fails=True)
        return
    found = outcome.measured
    if found is None:
        yield Change(kernel=kernel, what=f"does not compile: {outcome.error}", fails=True)
        return
    beyond = set()
    for what, limit in outcome.limits.items():
        if (used := found.numbers()[what]) > limit:
            beyond.add(what)
            then = f"{pinned.numbers()[what]:,}" if pinned else ""
            over = f"{used:,}, the limit is {limit:,}"
            yield Change(kernel=kernel, what=UNITS[what], pinned=then, found=over, fails=True)
    if pinned is None:
        yield Change(kernel=kernel, what="new: not pinned", fails=True)
        return
    yield from _advisories(kernel, pinned.advisories, found.advisories)
    yield from _instructions(kernel, pinned.instructions, found.instructions)
    numbers = found.numbers()
    for what, before in pinned.numbers().items():
        after = numbers[what]
        if after != before and what not in beyond:
            spilled = what.startswith("spill") and after > before
            lost = what == "warp_specialized" and after < before
            yield _number(kernel, UNITS.get(what, what), before, after, spilled or lost)
    if found.warps != pinned.warps:
        then, now = (", ".join(warps) or "none" for warps in (pinned.warps, found.warps))
        yield Change(kernel=kernel, what="warps of products", pinned=then, found=now)


def _advisories(
    kernel: str, pinned: Mapping[str, int], found: Mapping[str, int]
) -> Iterator[Change]:
    for code in sorted(pinned.keys() | found.keys()):
        before, after = pinned.get(code, 0), found.get(code, 0)
        if before != after:
            worse = code.startswith(GRAVE) and after > before
            yield _number(kernel, f"advisory {code} of ptxas", before, after, worse)


def _instructions(
    kernel: str, pinned: Mapping[str, int], found: Mapping[str, int]
) -> Iterator[Change]:
    lost = {name for name, better, worse in RANKS if _lost(name, better, worse, pinned, found)}
    for name in (*MATRIX, *COPIES, *ON_CHIP, *BARRIERS, *ARITHMETIC, TOTAL):
        before, after = pinned.get(name, 0), found.get(name, 0)
        if before != after:
            what = "instructions" if name == TOTAL else name
            yield _number(kernel, what, before, after, name in lost)


def _lost(
    name: str,
    better: tuple[str, ...],
    worse: tuple[str, ...],
    pinned: Mapping[str, int],
    found: Mapping[str, int],
) -> bool:
    """Whether an instruction is there no more, or less often while worse ones took its place."""

    def more(names: tuple[str, ...]) -> bool:
        return sum(found.get(n, 0) for n in names) > sum(pinned.get(n, 0) for n in names)

    if found.get(name, 0) >= pinned.get(name, 0) or more(better):
        return False
    return not found.get(name, 0) or more(worse)


def _number(kernel: str, what: str, before: int, after: int, fails: bool) -> Change:
    pinned, found = f"{before:,}", f"{after:,}"
    return Change(kernel=kernel, what=what, pinned=pinned, found=found, fails=fails)
