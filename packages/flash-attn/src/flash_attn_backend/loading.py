"""Finding and importing a form of the library; what goes wrong becomes a sentence and a remedy.

Nothing is imported where it is absent: it is looked for without importing what it lies in.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch

from .forms import FLASH_ATTN_2, FLASH_ATTN_4, Form, form_of


class LibraryUnusable(ImportError):
    """A form of the library is absent or cannot be imported; one line: the reason, the remedy."""


@dataclass(frozen=True)
class Library:
    """A form that is installed, and imported."""

    form: Form
    version: str
    module: ModuleType

    def __str__(self) -> str:
        return f"{self.form.name} {self.version}"

    def function(self, name: str) -> Callable[..., Any]:
        """One of its functions; NotImplementedError where this form has none of that name."""
        if name not in self.form.functions:
            raise NotImplementedError(f"{self.form.title} has no {name}")
        found: Callable[..., Any] = getattr(self.module, name)
        return found


@cache
def parameters_of(function: Callable[..., Any]) -> Collection[str]:
    """The names of the parameters of a function."""
    return inspect.signature(function).parameters.keys()


@cache
def load(name: str) -> Library:
    """The form of that name, such as "flash-attn-2"; LibraryUnusable when it cannot be used."""
    form = form_of(name)
    installed = installed_version(form)
    if (reason := _absent(form, installed)) is not None:
        raise LibraryUnusable(reason)
    assert installed is not None
    try:
        module = importlib.import_module(form.module)
        for function in form.functions:
            getattr(module, function)
    except Exception as error:
        raise LibraryUnusable(explain(form, installed, error)) from error
    return Library(form, installed, module)


def why_not(form: Form) -> str | None:
    """Why the form cannot be used here, in one line with the remedy; None when it can."""
    try:
        load(form.name)
    except LibraryUnusable as error:
        return str(error)
    return None


def installed_version(form: Form) -> str | None:
    """The version that is installed, such as "2.8.3"; None where there is none."""
    for distribution in form.distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def numbers(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (2, 8, 3) of 2.8.3.post1."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def _absent(form: Form, installed: str | None) -> str | None:
    """Why it cannot be there or is too old, by what an import would find; None otherwise."""
    spec = _find(form.module)
    if spec is None and installed is None:
        return f"{form.title} ({form.module}) is not installed: {form.install}"
    if spec is None:
        return (
            f"{form.title} ({form.module} {installed}) is installed but not found: the folder of "
            f"an editable install is gone, or that of another form hides it; {_rebuild(form)}"
        )
    if installed is None:
        whose = " (flash-attn 2 ships an old copy)" if form is FLASH_ATTN_4 else ""
        return (
            f"{form.module} lies at {spec.origin}, but no distribution "
            f"{' or '.join(form.distributions)} is installed{whose}: {form.install}"
        )
    if numbers(installed) < form.oldest:
        needed = ".".join(map(str, form.oldest))
        return f"{form.module} is version {installed}, {needed} is needed: {form.install}"
    return None


def _find(module: str) -> ModuleSpec | None:
    """Where a module lies; its parents are not imported, as ``importlib.util.find_spec`` would.

    A folder without a file to import is none: FlashAttention-4 alone leaves ``flash_attn`` one.
    """
    path = None
    spec = None
    names = module.split(".")
    for depth in range(1, len(names) + 1):
        spec = _spec(".".join(names[:depth]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec if spec is not None and spec.origin is not None else None


def _spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """What an import of that name would find: editable installs have finders of their own."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and (spec := find(name, path, None)) is not None:
            found: ModuleSpec = spec
            return found
    return None


def explain(form: Form, installed: str, error: Exception) -> str:
    """An error of the import as one line: what is wrong, and what to do about it."""
    what = f"{form.title} ({form.module} {installed}) is installed but cannot be imported"
    said = " ".join(str(error).split())
    rebuild, remedy = _rebuild(form), ""
    if form is FLASH_ATTN_4 and "flash_attn_2_cuda" in said:
        # Its folder lies in that of FlashAttention-2, which is imported before it.
        what += ", because flash_attn of FlashAttention-2, whose folder it shares, cannot be"
        rebuild = f"{_rebuild(FLASH_ATTN_2)}, or pip uninstall flash-attn"
    torch_here = f"torch {torch.__version__}"
    if "undefined symbol" in said:
        why = f"it was built for another torch than {torch_here} here ({said})"
        remedy = rebuild
    elif match := re.search(r"lib(cudart|cublas|nvrtc)\w*\.so\.(\d+)", said):
        here = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        why = f"it was built for CUDA {match[2]}, and {torch_here} here has {here} ({said})"
        remedy = rebuild
    elif match := re.search(r"version [`'](GLIBC(?:XX)?_[\d.]+)'? not found", said):
        why = f"it was built on a newer system: {match[1]} is not here ({said})"
        remedy = rebuild
    elif isinstance(error, ModuleNotFoundError) and error.name in COMPILED:
        why = f"its compiled part {error.name} is missing, as after a build without CUDA"
        remedy = rebuild
    elif isinstance(error, ModuleNotFoundError):
        why = f"it needs the module {error.name}, which is not installed"
        remedy = f"install what it depends on: {form.install} --upgrade"
    elif isinstance(error, AttributeError) or "cannot import name" in said:
        why = f"it, or what it depends on, is another version than expected ({said})"
        remedy = f"install versions that belong together: {form.install} --upgrade"
    else:
        why = f"{type(error).__name__}: {said}"
        remedy = rebuild
    return f"{what}: {why}; {remedy}"


# The modules that a build of the library compiles.
COMPILED = ("flash_attn_2_cuda", "flash_attn_3._C", "flash_attn_3_cuda")


def _rebuild(form: Form) -> str:
    """The command that builds the form anew, for the torch that is here."""
    if form is FLASH_ATTN_4:
        return f"install it again: {form.install} --force-reinstall"
    return f"build it again: {form.install} --no-cache-dir --force-reinstall --no-deps"
