"""A GPU as plain values, and the names of NVIDIA's architectures by compute capability."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Compute capability -> architecture, oldest first.
# Source: https://developer.nvidia.com/cuda-gpus and the CUDA C++ programming guide.
ARCHITECTURES = {
    (6, 0): "Pascal",
    (6, 1): "Pascal",
    (6, 2): "Pascal",
    (7, 0): "Volta",
    (7, 2): "Volta",
    (7, 5): "Turing",
    (8, 0): "Ampere",
    (8, 6): "Ampere",
    (8, 7): "Ampere",
    (8, 9): "Ada",
    (9, 0): "Hopper",
    (10, 0): "Blackwell",
    (10, 3): "Blackwell",
    (11, 0): "Blackwell",
    (12, 0): "Blackwell",
    (12, 1): "Blackwell",
}
DRIVER_FILE = Path("/proc/driver/nvidia/version")
_DRIVER = re.compile(r"(?:Module for \S+|Kernel Module)\s+(\d+(?:\.\d+)+)")
_SM = re.compile(r"sm_(\d+)(\d)")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU and what drives it. A version is None where nothing here says it."""

    name: str
    capability: tuple[int, int]  # compute capability
    memory: int  # bytes
    driver: str | None = None  # NVIDIA's, such as "580.82.07"
    cuda: str | None = None  # the toolkit that torch was built with, such as "13.0"
    torch: str | None = None

    @property
    def sm(self) -> str:
        """The compute capability as compilers write it, such as "sm_90"."""
        return sm(self.capability)

    @property
    def architecture(self) -> str:
        """Its name, such as "Hopper"; of one that is not in the table the capability."""
        return ARCHITECTURES.get(self.capability, f"compute capability {self.sm}")

    def __str__(self) -> str:
        return f"{self.name}, {self.sm}"


def sm(capability: tuple[int, int]) -> str:
    """(9, 0) as "sm_90"."""
    return f"sm_{capability[0]}{capability[1]}"


def capability_of(text: str) -> tuple[int, int]:
    """ "sm_90" as (9, 0); ValueError for anything else."""
    match = _SM.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"{text!r} is no architecture; accepted is the form sm_80, sm_90, sm_120")
    return int(match[1]), int(match[2])


def current_device(index: int = 0) -> Device | None:
    """The GPU that torch has at ``index``; None where it finds none."""
    import torch

    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    properties = torch.cuda.get_device_properties(index)
    return Device(
        name=properties.name,
        capability=(properties.major, properties.minor),
        memory=properties.total_memory,
        driver=driver(),
        cuda=torch.version.cuda,
        torch=torch.__version__,
    )


def current_devices() -> list[Device]:
    """Every GPU that torch has."""
    import torch

    found = [current_device(index) for index in range(torch.cuda.device_count())]
    return [device for device in found if device is not None]


def driver() -> str | None:
    """The version of the NVIDIA driver, as its kernel module says it; None without one."""
    try:
        text = DRIVER_FILE.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    match = _DRIVER.search(text)
    return match[1] if match else None
