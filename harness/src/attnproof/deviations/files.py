"""Reading deviations files. What is malformed is said in one line, with the file and entry."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

from ..verdict import Status
from .known import Deviation, Deviations

REQUIRED = ("cases", "reason", "proof")
OPTIONAL = ("except", "verdict", "torch", "device", "always")
VERDICTS = (Status.DEVIATES, Status.CRASHED, Status.TIMED_OUT)
DEVICES = ("cpu", "cuda")
COMPARE: Mapping[str, Callable[[TorchVersion, str], bool]] = {
    ">=": lambda a, b: bool(a >= b),
    "<=": lambda a, b: bool(a <= b),
    "==": lambda a, b: bool(a == b),
    "!=": lambda a, b: bool(a != b),
    ">": lambda a, b: bool(a > b),
    "<": lambda a, b: bool(a < b),
}
BOUND = re.compile(r"(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d+)*)")


class DeviationsError(ValueError):
    """A deviations file cannot be read; the message is one line."""


def load_deviations(target: str, option: str | None = None, *, device: str = "cpu") -> Deviations:
    """The deviations of a target that apply to this torch and device.

    ``option`` is that of --deviations: None for the files that ship with the harness, 'none'
    for no deviations, else a file, whose targets must include this one.
    """
    if option == "none":
        return Deviations()
    if option is None:
        found: list[Deviation] = []
        for path in sorted(Path(__file__).parent.glob("*.toml")):
            targets, entries = read_deviations(path, device=device)
            if target in targets:
                found += entries
        return Deviations(entries=tuple(found))
    targets, entries = read_deviations(Path(option), device=device)
    if target not in targets:
        raise DeviationsError(
            f"--deviations {option}: is about {', '.join(targets)}; nothing about {target}"
        )
    return Deviations(entries=tuple(entries))


def read_deviations(path: Path, *, device: str = "cpu") -> tuple[list[str], list[Deviation]]:
    """The targets a file belongs to, and its entries for this torch and device."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise DeviationsError(f"deviations file {path}: {why}") from None
    except tomllib.TOMLDecodeError as error:
        raise DeviationsError(f"deviations file {path}: is not TOML: {error}") from None
    _known(content, ("targets", "deviation"), f"{path}")
    targets = _texts(content, "targets", f"{path}")
    listed = content.get("deviation", [])
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise DeviationsError(f"{path}: deviation: accepted are tables [[deviation]]")
    entries = [
        _entry(entry, f"{path.name}, deviation {number}") for number, entry in enumerate(listed, 1)
    ]
    return targets, [
        e for e, values in zip(entries, listed, strict=True) if _applies(values, device)
    ]


def _entry(values: dict[str, Any], where: str) -> Deviation:
    """One entry, checked whole, whether it applies here or not."""
    _known(values, REQUIRED + OPTIONAL, where)
    verdict = _choice(values, "verdict", VERDICTS, where) or Status.DEVIATES
    _choice(values, "device", DEVICES, where)
    if not isinstance(always := values.get("always", True), bool):
        raise DeviationsError(f"{where}: always={always!r}: accepted are true, false")
    for bound in _bounds(values):
        if not BOUND.fullmatch(bound):
            raise DeviationsError(
                f"{where}: torch={values['torch']!r}: accepted are bounds such as '>=2.5,<2.14'"
            )
    return Deviation(
        cases=tuple(_texts(values, "cases", where)),
        excepted=tuple(_texts(values, "except", where)) if "except" in values else (),
        reason=_text(values, "reason", where),
        proof=_text(values, "proof", where),
        verdict=Status(verdict),
        always=always,
        source=where,
    )


def _applies(values: dict[str, Any], device: str) -> bool:
    if values.get("device", device) != device:
        return False
    # The build (+cpu, +cu130) is not part of the comparison.
    version = TorchVersion(torch.__version__.partition("+")[0])
    matches = (BOUND.fullmatch(bound) for bound in _bounds(values))
    return all(COMPARE[m[1]](version, m[2]) for m in matches if m)


def _bounds(values: dict[str, Any]) -> list[str]:
    text = values.get("torch")
    return [] if text is None else [bound.strip() for bound in str(text).split(",")]


def _known(values: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    for name in values:
        if name not in names:
            raise DeviationsError(f"{where}: unknown key {name!r}; accepted are {', '.join(names)}")


def _text(values: dict[str, Any], name: str, where: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "is missing" if value is None else f"is {value!r}"
        raise DeviationsError(f"{where}: {name} {found}; accepted is a text that is not empty")
    return value


def _texts(values: dict[str, Any], name: str, where: str) -> list[str]:
    """A text or a list of texts."""
    value = values.get(name)
    if isinstance(value, list) and value:
        return [_text({name: item}, name, where) for item in value]
    return [_text(values, name, where)]


def _choice(values: dict[str, Any], name: str, accepted: tuple[str, ...], where: str) -> str | None:
    value = values.get(name)
    if value is not None and value not in accepted:
        raise DeviationsError(f"{where}: {name}={value!r}: accepted are {', '.join(accepted)}")
    return value
