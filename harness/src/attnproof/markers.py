"""The markers ``requires_arch`` and ``requires_memory``: a test says what it needs of a GPU.

They read the same data as the requirement of a backend, and say the same sentences.
"""

from __future__ import annotations

import pytest

from .device import current_device
from .requirement import Requirement, bytes_of

ARCH = "requires_arch"
MEMORY = "requires_memory"
DECLARED = (
    f'{ARCH}(*archs, min=None): needs a GPU of one of these architectures ("sm_90"), or of min '
    "or newer; skipped elsewhere",
    f'{MEMORY}(size): needs a GPU with that much memory in all ("20GB"); skipped elsewhere',
)
WHO = "this test"


def unmet(item: pytest.Item) -> str | None:
    """What the GPU that is here lacks of what the markers of a test ask for, in one line; None when
    it lacks nothing, or nothing is asked for. ValueError for a marker of another form."""
    required = [_required(mark) for name in (ARCH, MEMORY) for mark in item.iter_markers(name)]
    if not required:
        return None
    device = current_device()
    return "; ".join(lack for one in required for lack in one.unmet(device)) or None


def _required(mark: pytest.Mark) -> Requirement:
    """The marker as data."""
    try:
        if mark.name == MEMORY:
            if len(mark.args) != 1 or mark.kwargs:
                raise ValueError("accepted is one size")
            memory = bytes_of(mark.args[0])
            if not memory:  # would be met everywhere, without a GPU too
                raise ValueError(f"{mark.args[0]!r} asks for nothing; accepted is a size above 0")
            return Requirement(who=WHO, memory=memory)
        if set(mark.kwargs) - {"min"} or not (mark.args or mark.kwargs):
            raise ValueError("accepted are architectures, and min")
        if mark.kwargs.get("min", "") is None:
            raise ValueError("min=None asks for nothing; accepted is the form sm_80, sm_90, sm_120")
        return Requirement(who=WHO, archs=mark.args, arch_min=mark.kwargs.get("min"))
    except ValueError as error:
        raise ValueError(f"marker {mark.name}: {error}") from None
