"""What a backend or a test needs of a GPU, as data, and what a device lacks of it, in sentences.

A backend says it in an attribute ``requirement``, which is consulted before its own
``availability``: a library that cannot run on this GPU is better not installed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .device import ARCHITECTURES, Device, capability_of, current_device, sm

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_VERSION = re.compile(r"\d+(?:\.\d+)*")


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """What ``who`` needs; a field that is not given asks for nothing.

    ValueError, naming the field and its value, for values of another form.
    """

    who: str  # the subject of the sentences: "flash_attn"
    arch_min: str | None = None  # "sm_80": that and every newer one
    archs: tuple[str, ...] = ()  # ("sm_90", "sm_100"): these and no other
    dtypes: tuple[tuple[str, str], ...] = ()  # (("bf16", "sm_80"),): a dtype, and since when
    memory: int = 0  # bytes of GPU memory, in all
    driver_min: str | None = None  # NVIDIA's: "525.60"
    cuda_min: str | None = None  # the toolkit that torch was built with: "12.3"
    torch_min: str | None = None

    def __post_init__(self) -> None:
        least = () if self.arch_min is None else (self.arch_min,)
        for arch in (*self.archs, *(arch for _, arch in self.dtypes), *least):
            capability_of(arch)
        for name in ("driver_min", "cuda_min", "torch_min"):
            version = getattr(self, name)
            if version is not None and not _VERSION.fullmatch(version):
                raise ValueError(f"{name}={version!r}: accepted are numbers between dots")
        if self.memory < 0:
            raise ValueError(f"memory={self.memory}: accepted are 0 bytes or more")

    def unmet(self, device: Device | None) -> list[str]:
        """What the device lacks, a sentence each that names what is needed and what is there;
        empty when it lacks nothing. None is no GPU. A version that nobody says counts as met."""
        there = "torch finds no CUDA device here" if device is None else f"this is {device}"
        lacks = []
        if self.arch_min is not None and (
            device is None or device.capability < capability_of(self.arch_min)
        ):
            lacks.append(f"{self.arch_min} or newer ({_names_since(self.arch_min)}); {there}")
        if self.archs and (device is None or device.sm not in self.archs):
            named = f"one of {', '.join(self.archs)}" if len(self.archs) > 1 else self.archs[0]
            lacks.append(f"{named} ({_names(map(capability_of, self.archs))}); {there}")
        if self.memory and (device is None or device.memory < self.memory):
            with_memory = "" if device is None else f", with {size(device.memory)}"
            lacks.append(f"{size(self.memory)} of GPU memory; {there}{with_memory}")
        for what, needed, found in (
            ("NVIDIA driver", self.driver_min, device and device.driver),
            ("torch built with CUDA", self.cuda_min, device and device.cuda),
            ("torch", self.torch_min, device and device.torch),
        ):
            if needed and found and numbers(found) < numbers(needed):
                lacks.append(f"{what} {needed} or newer; here is {found}")
        return [f"{self.who} needs {lack}" for lack in lacks]

    def refused_dtypes(self, device: Device) -> dict[str, str]:
        """The dtypes that it takes on newer architectures only, each with the sentence."""
        return {
            dtype: f"{self.who} needs {arch} or newer ({_names_since(arch)}) for {dtype}; "
            f"this is {device}"
            for dtype, arch in self.dtypes
            if device.capability < capability_of(arch)
        }


@runtime_checkable
class Requiring(Protocol):
    """A backend that says what it needs of a GPU."""

    requirement: Requirement | None


def requirement_of(backend: object) -> Requirement | None:
    """What the backend says that it needs of a GPU, if it does."""
    return backend.requirement if isinstance(backend, Requiring) else None


def unmet_here(backend: object, device: str) -> str | None:
    """Why the GPU that is here is not one for the backend, in one line; None when it is, when
    there is no GPU, which ``availability`` says, and on the CPU."""
    requirement, here = requirement_of(backend), _gpu(device)
    if requirement is None or here is None:
        return None
    return "; ".join(requirement.unmet(here)) or None


def refused_dtypes_here(backend: object, device: str) -> dict[str, str]:
    """The dtypes that the backend does not take on the GPU that is here, with the reasons."""
    requirement, here = requirement_of(backend), _gpu(device)
    return {} if requirement is None or here is None else requirement.refused_dtypes(here)


def _gpu(device: str) -> Device | None:
    return current_device() if device == "cuda" else None


def size(nbytes: int) -> str:
    """Bytes in words, in the unit of data sheets: 20 GB."""
    return f"{nbytes / UNITS['GB']:.3g} GB"


def bytes_of(text: str) -> int:
    """ "20GB" or "16 GiB" in bytes; ValueError for anything else."""
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{text!r} is no size; accepted is a number and one of {', '.join(UNITS)}")
    return int(float(match[1]) * UNITS[match[2]])


def _names(capabilities: Iterable[tuple[int, int]]) -> str:
    """Architectures by name, each once."""
    found = (ARCHITECTURES.get(capability, sm(capability)) for capability in capabilities)
    return ", ".join(dict.fromkeys(found))


def _names_since(arch: str) -> str:
    """The architectures of the table that are that new, by name."""
    least = capability_of(arch)
    return _names(known for known in ARCHITECTURES if known >= least) or arch


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (2, 11, 0) of 2.11.0+cu130, without zeros at the
    end, so that 13 and 13.0 are equal."""
    match = _VERSION.match(version)
    found = [int(number) for number in match[0].split(".")] if match else []
    while found and not found[-1]:
        found.pop()
    return tuple(found)
