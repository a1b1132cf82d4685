"""Signatures: how a plain function is called as attention. ``adapt`` makes a Backend of one.

To add a signature, write a module here with ``matches`` and ``adapt`` and name it in
``SIGNATURES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from . import attnproof, flash_attn, sdpa
from .common import FunctionBackend, SignatureMismatch, parameters_of

__all__ = ["SIGNATURES", "FunctionBackend", "SignatureMismatch", "adapt", "detect"]

# In the order in which parameters are tried: the first that matches decides.
SIGNATURES: Mapping[str, ModuleType] = {
    "sdpa": sdpa,
    "flash_attn": flash_attn,
    "attnproof": attnproof,
}


def detect(target: Any) -> str:
    """The name of the signature that the parameters of a function belong to."""
    parameters = parameters_of(target)
    if parameters is None:
        raise SignatureMismatch(
            "shows no parameters (a builtin, or *args and **kwargs): "
            f"say what it promises with --signature {'|'.join(SIGNATURES)}"
        )
    for name, signature in SIGNATURES.items():
        if signature.matches(parameters):
            return name
    accepted = "; ".join(f"{name}: {s.ACCEPTED}" for name, s in SIGNATURES.items())
    raise SignatureMismatch(
        f"its parameters {parameters} match no signature; accepted are {accepted} "
        "(or name one with --signature)"
    )


def adapt(target: Any, name: str, signature: str | None) -> FunctionBackend:
    """A Backend that calls ``target``, a function (or, for flash_attn, a module).

    Without a signature the parameters decide. SignatureMismatch says in one line what does
    not fit.
    """
    chosen = detect(target) if signature is None else signature
    backend: FunctionBackend = SIGNATURES[chosen].adapt(target, name)
    return backend
