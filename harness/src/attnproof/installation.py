"""How a library that is not here, or does not work, gets here: the exact command for a machine."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self, runtime_checkable

# What a build without isolation finds nowhere else: the module, and the name of the distribution.
BUILD_TOOLS = ("packaging", "psutil", "setuptools", "wheel")


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """What compiling a library on installation takes, as it was measured once."""

    archs_variable: str | None = None  # the variable that cuts it to some architectures
    minutes: float | None = None  # for one architecture
    jobs: int = 1  # with that many compilers at a time
    memory_per_job: int = 8 * 2**30  # bytes: a compiler of CUDA templates needs several GB


@runtime_checkable
class Installable(Protocol):
    """A backend that says how its library is installed."""

    @property
    def install(self) -> str:
        """A command, in which ``pip install`` stands for whatever installs here."""
        ...

    @property
    def installed(self) -> bool:
        """Whether it is there, usable or not."""
        ...

    @property
    def compilation(self) -> Compilation | None:
        """What compiling it takes; None where nothing is compiled."""
        ...


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides how something is compiled here."""

    cores: int
    free_memory: int  # bytes
    capabilities: tuple[tuple[int, int], ...]  # of the GPUs
    installer: str  # a command, to which names of distributions are appended
    missing_tools: tuple[str, ...] = ()  # distributions that a build needs and that are not here


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What to type, and how long it takes."""

    command: str
    jobs: int | None = None  # compilers at a time
    minutes: float | None = None  # None: nothing is compiled, or nobody has measured it

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``as_dict``."""
        return cls(**values)


def remedy(backend: Installable, machine: Machine) -> Remedy:
    """The command that installs, or builds anew, the library of a backend on this machine."""
    command = backend.install
    if backend.installed:
        command += " --no-cache-dir --force-reinstall --no-deps"
    compilation = backend.compilation
    if compilation is None:
        return Remedy(command=command.replace("pip install", machine.installer))
    jobs = jobs_for(compilation, machine)
    archs = archs_of(machine)
    variables = f"MAX_JOBS={jobs} "
    if compilation.archs_variable is not None and archs:
        variables += f"{compilation.archs_variable}={shlex.quote(';'.join(archs))} "
    command = command.replace("pip install", variables + machine.installer)
    if machine.missing_tools:
        command = f"{machine.installer} {' '.join(machine.missing_tools)} && {command}"
    minutes = compilation.minutes
    if minutes is not None:
        minutes = round(minutes * compilation.jobs / jobs * max(1, len(archs)))
    return Remedy(command=command, jobs=jobs, minutes=minutes)


def jobs_for(compilation: Compilation, machine: Machine) -> int:
    """Compilers at a time: one per core but one, as far as the free memory goes."""
    return max(1, min(machine.cores - 1, machine.free_memory // compilation.memory_per_job))


def archs_of(machine: Machine) -> list[str]:
    """The architectures to compile for: code for sm_80 runs on sm_86 and sm_89, not on sm_90."""
    return [f"{major}0" for major in sorted({major for major, _ in machine.capabilities})]


def installer() -> str:
    """What installs into this interpreter's environment, with pip or without."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is not None:
        return f"{python} -m pip install"
    if shutil.which("uv"):
        return f"uv pip install --python {python}"
    return f"{python} -m ensurepip && {python} -m pip install"


def missing_tools() -> tuple[str, ...]:
    """The distributions that a build without isolation needs and that are not here."""
    missing = [name for name in BUILD_TOOLS if importlib.util.find_spec(name) is None]
    return (*missing, *(() if shutil.which("ninja") else ("ninja",)))
