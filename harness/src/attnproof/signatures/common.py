"""What the signatures share: parameters, declarations of a function, the backend they make."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from torch.nn import Module

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import FLASH, PROFILES, Precision
from attn_reference.problem import DTYPES, GRADIENT_NAMES, Problem

from ..backend import Capabilities
from ..backends.availability import unavailable
from ..requirement import Requirement

# Every name that Problem.features can hold.
FEATURES = frozenset(
    {
        "causal top-left",
        "causal bottom-right",
        "window",
        "softcap",
        "alibi",
        "boolean mask",
        "bias",
        "sinks",
        "scale",
        "gqa",
        "head_dim_v",
        "key lengths",
        "packed",
        "paged",
        "dropout",
        "gradients",
        "lse gradient",
    }
)


class SignatureMismatch(ValueError):
    """A function cannot be called as the signature asks; the message says why, in one line."""


@dataclass(frozen=True)
class Parameters:
    """The parameters of a function: ``leading`` may be passed by position, ``named`` by keyword."""

    leading: tuple[str, ...]
    named: tuple[str, ...]
    defaults: Mapping[str, Any]
    required: tuple[str, ...]

    def __contains__(self, name: str) -> bool:
        return name in self.named

    def __str__(self) -> str:
        names = dict.fromkeys(self.leading + self.named)
        return f"({', '.join(names)})"

    @classmethod
    def promised(cls, required: str, optional: str) -> Parameters:
        """Those that a named signature promises for a function that shows none."""
        first, rest = tuple(required.split()), tuple(optional.split())
        return cls(leading=first, named=first + rest, defaults={}, required=first)


def parameters_of(function: Callable[..., Any]) -> Parameters | None:
    """The parameters of a function; None when it shows none (builtins, ``*args, **kwargs``).

    Those of a module of torch are its ``forward``'s.
    """
    if isinstance(function, Module):
        function = function.forward
    try:
        found = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return None
    shown = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not shown and found:
        return None
    empty = inspect.Parameter.empty
    return Parameters(
        leading=tuple(p.name for p in shown if p.kind is not p.KEYWORD_ONLY),
        named=tuple(p.name for p in shown if p.kind is not p.POSITIONAL_ONLY),
        defaults={p.name: p.default for p in shown if p.default is not empty},
        required=tuple(p.name for p in shown if p.default is empty),
    )


def require_callable_with(parameters: Parameters, passed: tuple[str, ...]) -> None:
    """Check that the first three parameters take q, k and v, and ``passed`` fills the rest."""
    operands = parameters.leading[:3]
    if len(operands) < 3 or set(operands) & set(passed):
        raise SignatureMismatch(
            f"its parameters {parameters} do not begin with three that can be passed by "
            "position, for the queries, keys and values"
        )
    for name in parameters.required:
        if name not in operands and (name not in passed or name not in parameters):
            raise SignatureMismatch(
                f"its parameter {name!r} has no default, and the signature does not pass it; "
                f"passed are {', '.join(passed)}"
            )


def scale_argument(name: str, parameters: Parameters, problem: Problem) -> float | None:
    """The scale to pass: None for a default of None, so that the function's own is judged."""
    has_default = name not in parameters.required and parameters.defaults.get(name) is None
    return problem.scale if has_default else problem.softmax_scale


def declared_capabilities(target: object, derived: Capabilities) -> Capabilities:
    """``derived`` with what the attribute ``attnproof_capabilities`` of the target replaces."""
    declared = getattr(target, "attnproof_capabilities", None)
    if declared is None:
        return derived
    if isinstance(declared, Capabilities):
        result = declared
    elif isinstance(declared, Mapping):
        known = [f.name for f in fields(Capabilities)]
        for name in declared:
            if name not in known:
                raise SignatureMismatch(
                    f"attnproof_capabilities: unknown field {name!r}; known are {', '.join(known)}"
                )
        _check_values(declared)
        try:
            read = Capabilities.from_dict(declared)
        except (TypeError, ValueError) as error:
            raise SignatureMismatch(f"attnproof_capabilities: {error}") from None
        result = replace(derived, **{name: getattr(read, name) for name in declared})
    else:
        raise SignatureMismatch(
            f"attnproof_capabilities is a {type(declared).__name__}; accepted are a dict of "
            "fields of Capabilities, or a Capabilities"
        )
    if strange := sorted(result.features - FEATURES):
        raise SignatureMismatch(
            f"attnproof_capabilities: unknown feature {strange[0]!r}; "
            f"known are {', '.join(sorted(FEATURES))}"
        )
    return result


# What the fields hold: lists of these names, or one of these values.
_NAMES: Mapping[str, tuple[str, ...] | None] = {
    "dtypes": tuple(DTYPES),
    "devices": ("cpu", "cuda"),
    "gradients": tuple(GRADIENT_NAMES),
    "features": None,
    "notes": None,
}
_CHOICES = {"lse_base": ("e", "2"), "lse_layout": ("bhs", "bsh")}
_COUNTS = ("head_dim_max", "head_dim_multiple", "page_size_multiple")


def _check_values(declared: Mapping[str, Any]) -> None:
    """Refuse values of another kind: taken as they are, they would leave every case unsupported."""

    def refuse(name: str, accepted: str) -> None:
        raise SignatureMismatch(
            f"attnproof_capabilities: {name} is {declared[name]!r}; accepted is {accepted}"
        )

    for name, value in declared.items():
        if name in _NAMES:
            known = _NAMES[name]
            accepted = f"a list of {', '.join(known)}" if known else "a list of names"
            if not isinstance(value, list | tuple | set | frozenset):
                refuse(name, accepted)
            if known and not set(value) <= set(known):
                refuse(name, accepted)
        elif name in _CHOICES and value not in _CHOICES[name]:
            refuse(name, " or ".join(map(repr, _CHOICES[name])))
        elif name in _COUNTS:
            optional = name == "head_dim_max" and value is None
            if not optional and (type(value) is not int or value < 1):
                refuse(name, "a whole number above 0")


def declared_precision(target: object) -> Precision:
    """What the attribute ``attnproof_precision`` of the target says; a flash kernel's otherwise."""
    declared = getattr(target, "attnproof_precision", None)
    if declared is None:
        return FLASH
    if isinstance(declared, Precision):
        return declared
    if isinstance(declared, str):
        if declared not in PROFILES:
            raise SignatureMismatch(
                f"attnproof_precision: unknown profile {declared!r}; "
                f"known are {', '.join(PROFILES)}"
            )
        return PROFILES[declared]
    if isinstance(declared, Mapping):
        try:
            return Precision(**{"name": "declared", **declared})
        except (TypeError, ValueError) as error:
            raise SignatureMismatch(f"attnproof_precision: {error}") from None
    raise SignatureMismatch(
        f"attnproof_precision is a {type(declared).__name__}; accepted are the name of a profile, "
        "a dict of fields of Precision, or a Precision"
    )


@dataclass(kw_only=True)
class FunctionBackend:
    """A Backend made of a function: how to call it, and what it declares."""

    name: str
    capabilities: Capabilities
    call: Callable[[Inputs, Problem], Attention]
    declared: Precision | Callable[[str], Precision] = FLASH  # by device, where that matters
    requirement: Requirement | None = None  # of a GPU
    # What a benchmark times, where that is not ``call``; see ``backend.Preparing``.
    prepared: Callable[[Inputs, Problem], Callable[[], Attention]] | None = None

    def precision(self, device: str) -> Precision:
        """The declared precision."""
        return self.declared if isinstance(self.declared, Precision) else self.declared(device)

    def availability(self, device: str) -> str | None:
        """None when the device is declared and here, else the reason."""
        return unavailable(device, self.capabilities.devices)

    def attention(self, inputs: Inputs, problem: Problem) -> Attention:
        """Call the function."""
        return self.call(inputs, problem)

    def prepare(self, inputs: Inputs, problem: Problem) -> Callable[[], Attention]:
        """The call that a benchmark times."""
        if self.prepared is not None:
            return self.prepared(inputs, problem)
        return partial(self.call, inputs, problem)
