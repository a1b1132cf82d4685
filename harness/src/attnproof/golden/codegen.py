"""golden/codegen: what the kernels of every registered source compile to, pinned.

One file holds them all, a line for each kernel, under its source and the versions of the tools
that the pins hold for. With other tools nothing is compared: they make other code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..codegen.compiling import CannotCompile, Found, compile_all
from ..codegen.gate import Change, compare
from ..codegen.measure import Measured
from ..codegen.sources import GROUP, sources
from ..codegen.text import summary, table
from ..writing import replace_file
from .comparison import Comparison, Progress, Update, no_progress
from .vectors import MANIFEST

DIRECTORY = Path("golden/codegen")
PINS = "kernels.json"


@dataclass(frozen=True, kw_only=True)
class Pins:
    """The kernels of one source, and the versions by tool that they are pinned for."""

    toolchain: Mapping[str, str]
    kernels: Mapping[str, Measured]


def verify(directory: Path = DIRECTORY, progress: Progress = no_progress) -> Comparison:
    """Compile every kernel and compare. Pins for other tools are not compared, for that reason."""
    stored, wrong = _read(directory)
    if wrong:
        return Comparison.of(wrong)
    registered, changes, reasons = sources(), list[Change](), list[str]()
    for name in sorted(stored.keys() - registered.keys()):
        reasons.append(f"{name}: no package here registers it under {GROUP}")
    for name, source in registered.items():
        pins = stored.get(name)
        wanted = pins.toolchain if pins else None
        try:
            found = compile_all(source, wanted, progress)
        except CannotCompile as error:
            reasons.append(str(error))
            continue
        if pins and found.toolchain != pins.toolchain:
            reasons.append(
                f"{name}: pinned for {_said(pins.toolchain)}, here is {_said(found.toolchain)}: "
                "other tools make other code"
            )
            continue
        changes += compare(pins.kernels if pins else {}, found.kernels)
    return Comparison(
        fails=any(change.fails for change in changes),
        summary=summary(changes),
        table=table(changes) if changes else None,
        reasons=reasons,
        compared=len(reasons) < len(stored.keys() | registered.keys()),
    )


def update(directory: Path = DIRECTORY, progress: Progress = no_progress) -> Update:
    """Pin what is compiled here where it differs; what does not compile keeps its pin, and so does
    a source that cannot be compiled here."""
    directory.mkdir(parents=True, exist_ok=True)
    stored, notes = _read(directory)
    made, changes = dict(stored), list[Change]()
    for name, source in sources().items():
        try:
            found = compile_all(source, None, progress)
        except CannotCompile as error:
            notes.append(str(error))
            continue
        pins = stored.get(name)
        if pins and pins.toolchain != found.toolchain:
            notes.append(f"{name}: {_said(pins.toolchain)}, now {_said(found.toolchain)}")
        changes += compare(pins.kernels if pins else {}, found.kernels)
        made[name] = _pins(pins, found)
    changed = _write(directory, made) if made != stored or notes else []
    return Update(changed=changed, notes=notes, table=table(changes) if changes else None)


def files() -> list[str]:
    """The names of the files that ``update`` may write."""
    return [PINS, MANIFEST]


def _pins(before: Pins | None, found: Found) -> Pins:
    """What is measured, and the old pins of what does not compile."""
    pinned = {}
    for name, outcome in found.kernels.items():
        if measured := outcome.measured or (before and before.kernels.get(name)):
            pinned[name] = measured
    return Pins(toolchain=dict(found.toolchain), kernels=pinned)


def _said(toolchain: Mapping[str, str]) -> str:
    return ", ".join(f"{tool} {number}" for tool, number in toolchain.items())


def _read(directory: Path) -> tuple[dict[str, Pins], list[str]]:
    """The pins by source, and what is wrong with the files."""
    try:
        text = (directory / PINS).read_bytes()
        entry = json.loads((directory / MANIFEST).read_text("utf-8"))["files"][PINS]
        if hashlib.sha256(text).hexdigest() != entry["sha256"]:
            return {}, [f"{directory}: the SHA-256 of {PINS} is not that of the manifest"]
        pins = {
            name: Pins(
                toolchain=dict(each["toolchain"]),
                kernels={k: Measured.from_dict(v) for k, v in each["kernels"].items()},
            )
            for name, each in json.loads(text).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{directory}: not readable ({error})"]
    return pins, []


def _write(directory: Path, pins: dict[str, Pins]) -> list[str]:
    """Write both files; a sentence for each that is not as it was."""
    text = "\n".join(_lines(pins)).encode()
    entry = {"sha256": hashlib.sha256(text).hexdigest(), "attnproof": version("attnproof")}
    manifest = json.dumps({"files": {PINS: entry}}, indent=1) + "\n"
    changed = []
    for name, content in ((PINS, text), (MANIFEST, manifest.encode())):
        path = directory / name
        if not (path.is_file() and path.read_bytes() == content):
            replace_file(path, content)
            changed.append(f"{name}: written")
    return changed


def _lines(pins: dict[str, Pins]) -> Iterator[str]:
    """JSON with a line for each kernel, so that a diff of the file names what changed."""
    yield "{"
    for n, (source, each) in enumerate(sorted(pins.items()), 1):
        yield f' {_json(source)}: {{\n  "toolchain": {_json(each.toolchain)},\n  "kernels": {{'
        for m, (kernel, pin) in enumerate(sorted(each.kernels.items()), 1):
            yield f"   {_json(kernel)}: {_json(pin.as_dict())}" + "," * (m < len(each.kernels))
        yield "  }\n }" + "," * (n < len(pins))
    yield "}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
