"""From the text of a TARGET to a Backend, or to one clear line that says why not.

A target is a registered backend (entry-point group ``attnproof.backends``),
``module:function``, ``file.py:function``, or, under ``--signature flash_attn``, a module or
file that offers ``flash_attn_func`` and its siblings. Only the process in which the target
runs calls ``load``: importing a target executes it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .backend import Backend, Description, DeviceDependent
from .registry import points_named
from .registry import registered as registered
from .requirement import refused_dtypes_here, unmet_here
from .signatures import SIGNATURES, SignatureMismatch, adapt

FORMS = "a registered backend, module:function or file.py:function"


class LoadError(Exception):
    """A target cannot be loaded; the message is one line that says why."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class TargetSpec:
    """What the user named: the text of TARGET, and the signature if one was given."""

    text: str
    signature: str | None = None


def load(spec: TargetSpec, device: str | None = None) -> Backend:
    """Import the target and make it a Backend, with a device ('cpu' or 'cuda') the one that it is
    there; LoadError when that cannot be done."""
    found = _load(spec)
    return found.on_device(device) if device and isinstance(found, DeviceDependent) else found


def _load(spec: TargetSpec) -> Backend:
    text = spec.text.strip()
    if spec.signature is not None and spec.signature not in SIGNATURES:
        raise LoadError(f"--signature {spec.signature}: unknown; known are {', '.join(SIGNATURES)}")
    if text in registered():
        if spec.signature is not None:
            raise LoadError(
                f"{text}: is a registered backend, which says itself how it is called; "
                f"--signature {spec.signature} is for functions"
            )
        return _registered(text)
    place, colon, attribute = text.rpartition(":")
    if not text:
        raise LoadError(f"'': is not a target; a target is {FORMS}")
    if not colon:
        if spec.signature != "flash_attn":
            raise LoadError(_unknown(text))
        place, attribute = text, ""
    if not place or (colon and not attribute):
        raise LoadError(f"{spec.text!r}: is not a target; a target is {FORMS}")
    module = _import(text, place)
    found = _attribute(text, module, attribute) if attribute else module
    if isinstance(found, type):
        raise LoadError(f"{text}: is a class; a target is a function, or a Backend object")
    if isinstance(found, Backend):
        if spec.signature is not None:
            raise LoadError(f"{text}: is a Backend; --signature {spec.signature} is for functions")
        return found
    if attribute and not callable(found):
        raise LoadError(
            f"{text}: is of type {type(found).__name__}, neither callable nor a Backend; "
            "a target is a function that computes attention"
        )
    try:
        return adapt(found, text, spec.signature)
    except SignatureMismatch as error:
        raise LoadError(f"{text}: {error}") from None


def describe(backend: Backend, device: str) -> Description:
    """What the backend says of itself on that device ('cpu' or 'cuda')."""
    return Description(
        name=backend.name,
        capabilities=backend.capabilities,
        precision=backend.precision(device),
        unavailable=unmet_here(backend, device) or backend.availability(device),
        refused_dtypes=refused_dtypes_here(backend, device),
    )


def _registered(name: str) -> Backend:
    points = points_named(name)
    values = sorted({point.value for point in points})
    if len(values) > 1:
        raise LoadError(f"{name}: is registered more than once: {' and '.join(values)}")
    backend = _executing(name, f"backend {name!r} ({values[0]})", points[0].load)
    if not isinstance(backend, Backend):
        raise LoadError(f"{name}: {values[0]} is of type {type(backend).__name__}, not a Backend")
    return backend


def _unknown(text: str) -> str:
    known = ", ".join(registered())
    if Path(text).is_dir():
        return f"{text}: is a folder; a target is {FORMS}"
    if Path(text).suffix == ".py":
        return (
            f"{text}: names no function; write {text}:FUNCTION, or add --signature flash_attn "
            "if the file offers flash_attn_func"
        )
    near = difflib.get_close_matches(text, registered(), n=2)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return (
        f"{text}: unknown backend; {hint}registered are {known or 'none'}; "
        "a function is named as module:function or file.py:function"
    )


def _import(text: str, place: str) -> ModuleType:
    if place.endswith(".py"):
        return _import_file(text, Path(place))
    if "/" in place or not all(part.isidentifier() for part in place.split(".")):
        raise LoadError(f"{text}: {place!r} is neither the name of a module nor a .py file")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    module: ModuleType = _executing(
        text, f"module {place!r}", lambda: importlib.import_module(place), place
    )
    return module


def _import_file(text: str, path: Path) -> ModuleType:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise LoadError(f"{text}: file {path} {what}")
    path = path.resolve()
    if (folder := str(path.parent)) not in sys.path:
        sys.path.insert(0, folder)  # as `python file.py` does: siblings can be imported
    name = f"attnproof_target_{path.stem}"
    description = importlib.util.spec_from_file_location(name, path)
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module  # dataclasses and pickling look their module up by name
    loader = description.loader
    _executing(text, f"file {path}", lambda: loader.exec_module(module))
    return module


def _executing(text: str, what: str, run: Any, module: str | None = None) -> Any:
    """Run code of the target; whatever it raises becomes one line."""
    try:
        return run()
    except ModuleNotFoundError as error:
        if module is not None and error.name and f"{module}.".startswith(f"{error.name}."):
            raise LoadError(f"{text}: module {error.name!r} is not found") from None
        raise LoadError(f"{text}: {what} needs module {error.name!r}: not found") from None
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        raise LoadError(f"{text}: {what} cannot be imported: {said}") from None


def _attribute(text: str, module: ModuleType, path: str) -> Any:
    """The attribute, dotted or not."""
    found: Any = module
    place = text.rpartition(":")[0]
    where = f"{'file' if place.endswith('.py') else 'module'} {place!r}"
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            near = _similar(found, part)
            hint = f"; did you mean {near}?" if near else ""
            raise LoadError(f"{text}: {where} has no attribute {part!r}{hint}") from None
        where = repr(part)
    return found


def _similar(thing: object, name: str) -> str:
    return ", ".join(difflib.get_close_matches(name, dir(thing), n=2))
