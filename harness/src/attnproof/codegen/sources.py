"""What can be compiled without a GPU, and the packages that compile it (``attnproof.codegen``).

A package registers a ``CodegenSource`` under the entry-point group ``attnproof.codegen``. It is
handed to other processes: it must be picklable, and import no compiler before it is asked to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol

GROUP = "attnproof.codegen"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a compiler made of one kernel for one architecture."""

    sass: str  # as nvdisasm or cuobjdump print it
    log: str  # of ptxas -v
    ttgir: str = ""  # Triton's intermediate representation for GPUs, where that is the compiler
    shared: int = 0  # bytes of shared memory of a block of threads
    tensor_memory: int = 0  # columns of tensor memory of a block of threads (sm_100)


class Kernel(Protocol):
    """One kernel as it is compiled for one architecture."""

    @property
    def name(self) -> str:
        """What it is pinned as; it begins with the architecture: "sm_90 ..."."""
        ...

    @property
    def limits(self) -> Mapping[str, int]:
        """What a block of threads may use: "shared" in bytes, "tensor_memory" in columns."""
        ...

    def key(self) -> str:
        """A digest of all that decides what is compiled: sources, options, compiler."""
        ...

    def compile(self) -> Compiled:
        """Compile it. Whatever is raised says that it does not compile."""
        ...


class CodegenSource(Protocol):
    """Kernels of one package."""

    @property
    def name(self) -> str:
        """What its pins are stored under."""
        ...

    def calls(self) -> Sequence[str]:
        """Names of what is compiled together, in the order in which to begin."""
        ...

    def kernels(self, call: str) -> Sequence[Kernel]:
        """The kernels of a call."""
        ...

    def toolchain(self) -> Mapping[str, str]:
        """Versions by tool. Pins hold for these alone. ImportError where there is no compiler."""
        ...


def sources() -> dict[str, CodegenSource]:
    """Every registered source by name."""
    loaded = [point.load() for point in sorted(entry_points(group=GROUP))]
    return {source.name: source for source in loaded}
