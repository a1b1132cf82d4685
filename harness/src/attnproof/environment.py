"""What a run ran on: interpreter, libraries, CPU, memory, GPUs, and the variables that matter."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .device import driver
from .options import environment as variables

# Distributions whose version bears on a verdict, those that are installed.
DISTRIBUTIONS = (
    "attnproof",
    "attnproof-reference",
    "attnproof-triton",
    "attnproof-flash-attn",
    "torch",
    "triton",
    "flash-attn",
    "flash-attn-4",
    "flashinfer-python",
    "xformers",
    "numpy",
    "safetensors",
    "pytest",
    "hypothesis",
)
GIB = 2**30
CGROUP_CPU = Path("/sys/fs/cgroup/cpu.max")
# The limit of a container, and what it uses of it, in versions 2 and 1.
CGROUP_MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
MEMINFO = Path("/proc/meminfo")


def environment() -> dict[str, Any]:
    """Plain values, for JSON and for people. Asks torch about GPUs, which loads the driver."""
    import torch

    found = without_torch()
    found["cpu"] |= {
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
    }
    # What is installed says less than what is loaded: 2.11.0, not 2.11.0+cu130.
    found["versions"]["torch"] = str(torch.__version__)
    return found | {"gpus": gpus()}


def without_torch() -> dict[str, Any]:
    """``environment()`` as far as torch need not be asked: what it would say is None, or empty."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "cpu": {
            "model": cpu_model(),
            "isa": None,
            "cores": cores(),
            "torch_threads": None,
        },
        "memory_gib": round(memory_bytes() / GIB, 1),
        "gpus": [],
        "variables": variables(),
    }


def commit() -> str | None:
    """The commit of the source, "+" after it when files differ; None where git knows of none.

    The variable ATTNPROOF_COMMIT says it where an installed package runs.
    """
    said = os.environ.get("ATTNPROOF_COMMIT")
    if said:
        return said
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=2,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def versions() -> dict[str, str]:
    """The installed version of each distribution that matters."""
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The name of the processor, as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def cores() -> int:
    """Cores that this process may use: those it may run on, or what its container is given."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    try:
        quota, period = CGROUP_CPU.read_text(encoding="ascii").split()
        return max(1, min(allowed, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such limit, or "max"
        return allowed


def memory_bytes() -> int:
    """Memory that this process may use: that of the machine, or of its container."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path, _ in CGROUP_MEMORY:
        try:
            limits.append(int(Path(path).read_text(encoding="ascii")))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(limits, default=0)


def free_memory_bytes() -> int:
    """Memory that this process may still take: of the machine, or of its container."""
    free = []
    with suppress(OSError):
        match = re.search(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text("ascii"), re.MULTILINE)
        free += [int(match[1]) * 1024] if match else []
    for limit, used in CGROUP_MEMORY:
        with suppress(OSError, ValueError):  # absent, or "max"
            free.append(int(Path(limit).read_text("ascii")) - int(Path(used).read_text("ascii")))
    return max(0, min(free, default=0))


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch sees, a record each; empty without any."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    version = driver() or _driver_by_its_tool()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / GIB, 1),
                "multiprocessors": properties.multi_processor_count,
                "cuda": torch.version.cuda or torch.version.hip,
                "driver": version,
            }
        )
    return found


def _driver_by_its_tool() -> str | None:
    """The version of the NVIDIA driver where /proc does not say it, as in WSL."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=3,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.splitlines()[0].strip() if found.stdout.strip() else None


def lines(found: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    """``environment()`` as pairs of a name and a text, for a terminal or a page."""
    found = environment() if found is None else found
    cpu = found["cpu"]
    gpu = [
        f"{g['name']} (sm {g['capability'].replace('.', '')}, {g['memory_gib']} GiB, "
        f"{g['multiprocessors']} SMs, CUDA {g['cuda']}, driver {g['driver']})"
        for g in found["gpus"]
    ]
    torch_says = f"{cpu['isa']}, {cpu['torch_threads']} threads in torch"
    if cpu["isa"] is None:
        torch_says = "torch has not answered"
    cores = "1 core" if cpu["cores"] == 1 else f"{cpu['cores']} cores"
    return [
        ("python", f"{found['python']} ({sys.executable})"),
        ("platform", found["platform"]),
        ("versions", ", ".join(f"{n} {v}" for n, v in found["versions"].items())),
        ("cpu", f"{cpu['model']}, {cores}, {torch_says}"),
        ("memory", f"{found['memory_gib']} GiB"),
        ("gpu", "; ".join(gpu) or "none that torch sees"),
        ("variables", " ".join(f"{n}={v}" for n, v in found["variables"].items()) or "none set"),
    ]
