"""What an implementation is, and what it can do: Backend, Capabilities, Description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import FLASH, Precision
from attn_reference.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend declares to support; plain values, so that they travel as JSON.

    Every field that restricts says so in ``unsupported_reasons``, hence no skip is without
    its reason. ``features`` holds names from ``Problem.features``.
    """

    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    features: frozenset[str] = frozenset()
    gradients: tuple[str, ...] = ("q", "k", "v")
    head_dim_max: int | None = None
    head_dim_multiple: int = 1
    page_size_multiple: int = 1
    returns_lse: bool = False
    lse_base: str = "e"  # "e" or "2"
    lse_layout: str = "bhs"  # order of the LSE's dimensions: "bhs" or "bsh"
    empty_row_out: float = 0.0  # what a query without a visible key gets
    empty_row_lse: float = float("-inf")
    empty_inputs: bool = True  # batch, seqlen_q or seqlen_k of 0
    keep_mask: bool = False  # returns what dropout kept
    # Pairs of features that do not go together: ("causal top-left", "boolean mask").
    excludes: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Why this backend does not take this problem, a sentence each; empty when it does."""
        reasons: list[str] = []
        if problem.dtype not in self.dtypes:
            reasons.append(f"dtype {problem.dtype} is not one of {', '.join(self.dtypes)}")
        implied = {"gradients"} if self.gradients else set()
        for feature in problem.features:
            if feature not in self.features | implied:
                reasons.append(f"{feature} is not supported")
        for name in problem.gradients:
            if self.gradients and name not in self.gradients:
                reasons.append(f"the gradient of {name} is not supported")
        for one, other in self.excludes:
            if {one, other} <= set(problem.features):
                reasons.append(f"{one} together with {other} is not supported")
        if self.head_dim_max and max(problem.head_dim, problem.value_dim) > self.head_dim_max:
            reasons.append(f"head_dim above {self.head_dim_max} is not supported")
        for dim in {problem.head_dim, problem.value_dim}:
            if dim % self.head_dim_multiple:
                reasons.append(f"head_dim {dim} is not a multiple of {self.head_dim_multiple}")
        if problem.page_size and problem.page_size % self.page_size_multiple:
            reasons.append(
                f"page_size {problem.page_size} is not a multiple of {self.page_size_multiple}"
            )
        if not self.empty_inputs and 0 in (problem.batch, problem.seqlen_q, problem.keys):
            reasons.append("an empty batch or sequence is not supported")
        return reasons

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; infinities as text."""
        values = asdict(self)
        values["features"] = sorted(self.features)
        for name in ("empty_row_out", "empty_row_lse"):
            values[name] = repr(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``as_dict``; a field that does not exist is a TypeError naming it."""
        read = dict(values)
        read["features"] = frozenset(read.get("features", ()))
        for name in ("dtypes", "devices", "gradients", "notes"):
            if name in read:
                read[name] = tuple(read[name])
        if "excludes" in read:
            read["excludes"] = tuple((a, b) for a, b in read["excludes"])
        for name in ("empty_row_out", "empty_row_lse"):
            if name in read:
                read[name] = float(read[name])
        return cls(**read)


@runtime_checkable
class Backend(Protocol):
    """An implementation of attention that the harness can judge.

    What it needs of a GPU it says in a further attribute, ``requirement`` (``Requiring``).
    """

    name: str
    capabilities: Capabilities

    def precision(self, device: str) -> Precision:
        """What it does to numbers inside on that device ('cpu' or 'cuda')."""
        ...

    def availability(self, device: str) -> str | None:
        """None when it can run on that device here, else the reason, a sentence."""
        ...

    def attention(self, inputs: Inputs, problem: Problem) -> Attention:
        """Compute; differentiable through autograd where gradients are declared.

        Raises NotImplementedError, with a sentence, for a problem that it does not support.
        """
        ...


@runtime_checkable
class DeviceDependent(Protocol):
    """A backend that declares, and perhaps is, something else on each device."""

    def on_device(self, device: str) -> Backend:
        """What it is on 'cpu' or 'cuda'."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """A backend whose ``attention`` does more than its users' calls do, or does it every time."""

    def prepare(self, inputs: Inputs, problem: Problem) -> Callable[[], Attention]:
        """The call that a benchmark times, on these tensors, whose values may change between calls.

        What users make once (block masks, lengths) is made here, and what the judge alone wants
        (an LSE by a second kernel) is left out.
        """
        ...


def prepared(backend: Backend, inputs: Inputs, problem: Problem) -> Callable[[], Attention]:
    """What to time of a backend: what it prepares, or else its ``attention``."""
    if isinstance(backend, Preparing):
        return backend.prepare(inputs, problem)
    return partial(backend.attention, inputs, problem)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a target says of itself, as it arrives from the process that it runs in."""

    name: str
    capabilities: Capabilities
    precision: Precision = FLASH
    unavailable: str | None = None
    refused_dtypes: Mapping[str, str] = field(default_factory=dict)  # on this GPU; the reasons

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "capabilities": self.capabilities.as_dict(),
            "precision": self.precision.as_dict(),
            "unavailable": self.unavailable,
            "refused_dtypes": dict(self.refused_dtypes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``as_dict``."""
        return cls(
            name=str(values["name"]),
            capabilities=Capabilities.from_dict(values["capabilities"]),
            precision=Precision.from_dict(values["precision"]),
            unavailable=values["unavailable"],
            refused_dtypes={str(k): str(v) for k, v in values["refused_dtypes"].items()},
        )
