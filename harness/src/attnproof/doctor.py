"""Is this machine fit to judge on, and which backends run here: a report for people and bugs."""

from __future__ import annotations

from typing import Any

from .environment import environment
from .listing import Listed, backends

MEMORY_GIB = 2.0  # what a quick run takes


def examine(device: str) -> dict[str, Any]:
    """Environment, backends and findings as plain values, for JSON."""
    found = environment()
    listed = backends(device)
    return {
        "environment": found,
        "device": device,
        "backends": [_backend(backend) for backend in listed],
        "findings": findings(found, listed),
    }


def findings(found: dict[str, Any], listed: list[Listed]) -> list[str]:
    """What is odd here, a sentence each."""
    said = []
    if found["memory_gib"] < MEMORY_GIB:
        said.append(f"{found['memory_gib']} GiB of memory: a run takes up to {MEMORY_GIB:g} GiB")
    if not found["gpus"]:
        said.append("torch sees no GPU: only CPU backends can be judged here")
    if "ATEN_CPU_CAPABILITY" in found["variables"]:
        value = found["variables"]["ATEN_CPU_CAPABILITY"]
        said.append(f"ATEN_CPU_CAPABILITY={value}: torch may use other CPU kernels than usual")
    if found["cpu"]["torch_threads"] > found["cpu"]["cores"]:
        said.append(
            f"torch uses {found['cpu']['torch_threads']} threads on {found['cpu']['cores']} cores: "
            "set OMP_NUM_THREADS"
        )
    if not any(backend.problem is None for backend in listed):
        said.append("no backend can run here")
    return said


def _backend(listed: Listed) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": listed.name,
        "source": listed.source,
        "available": listed.problem is None,
        "reason": listed.problem,
    }
    if listed.description is not None:
        values["precision"] = listed.description.precision.as_dict()
        values["capabilities"] = listed.description.capabilities.as_dict()
    return values
