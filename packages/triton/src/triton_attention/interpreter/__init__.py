"""Kernels on a CPU: enable() before Triton is imported, run() them, counting() what they do.

Nothing here imports Triton before a kernel is run: functions of its language, such as tl.sum, are
compiled or interpreted as was asked for when it was imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from .accesses import Accesses, OutOfBounds, counting

__all__ = ["Accesses", "OutOfBounds", "counting", "enable", "enabled", "run"]

VARIABLE = "TRITON_INTERPRET"
TRUE = ("1", "true", "on", "yes", "y")  # as Triton reads it


def enable() -> None:
    """Have the kernels of this process interpreted. RuntimeError where it is too late."""
    if "triton.language.standard" in sys.modules:
        if not enabled():
            raise RuntimeError(
                "Triton was imported to compile its kernels, and cannot interpret them any more: "
                f"set {VARIABLE}=1 before Triton is imported"
            )
        sys.modules["triton"].knobs.runtime.interpret = True
    os.environ[VARIABLE] = "1"


def enabled() -> bool:
    """Whether kernels of this process are interpreted."""
    standard = sys.modules.get("triton.language.standard")
    if standard is None:
        return os.environ.get(VARIABLE, "").lower() in TRUE
    return not isinstance(standard.sum, sys.modules["triton.runtime.jit"].JITFunction)


def run(kernel: object, grid: tuple[int, ...], arguments: Mapping[str, object]) -> None:
    """Run a kernel over its grid with arguments by name, without num_warps and the like.

    Arguments are tensors, numbers, None, constants, device functions, and NamedTuples of these. No
    byte is read or written but those that the kernel addresses. What it raises is raised as it is,
    with a note that names the program; OutOfBounds where it addresses what is no element of the
    tensor that the pointer came from.
    """
    if not enabled():
        raise RuntimeError(f"kernels are compiled: set {VARIABLE}=1 before Triton is imported")
    from .launch import launch

    launch(kernel, grid, arguments)
