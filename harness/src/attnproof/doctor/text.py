"""The report for a terminal: pairs of a name and a text, in sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..environment import lines as environment_lines

Pairs = list[tuple[str, str]]


def sections(report: dict[str, Any]) -> Iterator[Pairs]:
    """The environment, the GPUs, what is installed to build with, the backends."""
    yield environment_lines(report["environment"])
    yield [*_gpus(report["hardware"]), *_torch(report), *_tools(report["tools"])]
    yield [(one["name"], one["reason"] or "can run here") for one in report["backends"]]


def remedies(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What would bring the backends that are not here: the name, and what to type; how long it
    takes."""
    for backend in report["backends"]:
        if found := backend.get("remedy"):
            yield backend["name"] + duration(found), found["command"]


def duration(remedy: dict[str, Any]) -> str:
    """How long it takes, in parentheses, where something is compiled."""
    if remedy["jobs"] is None:
        return ""
    takes = "not measured" if remedy["minutes"] is None else f"about {remedy['minutes']:g} minutes"
    return f" (compiles with {remedy['jobs']} jobs, {takes})"


def _gpus(hardware: dict[str, Any]) -> Pairs:
    found = [("driver", hardware["driver"] or "none")]
    if hardware["driver_cuda"]:
        found = [("driver", f"{hardware['driver']}, runs CUDA up to {hardware['driver_cuda']}")]
    if hardware["problem"]:
        found.append(("driver says", hardware["problem"]))
    for index, gpu in enumerate(hardware["gpus"]):
        bandwidth = gpu["theoretical_bandwidth_gb_per_s"]
        dram = f"{gpu['memory_gib']} GiB"
        if bandwidth is not None:
            dram += (
                f", {bandwidth} GB/s in theory (2 x {gpu['memory_clock_mhz']} MHz x "
                f"{gpu['memory_bus_bits']} bits)"
            )
        found += [
            (f"gpu {index}", f"{gpu['name']}, {gpu['sm']} ({gpu['architecture']})"),
            ("  SMs", str(gpu["multiprocessors"])),
            ("  L2", f"{gpu['l2_mib']:g} MiB"),
            (
                "  shared memory",
                f"{gpu['shared_memory_per_multiprocessor_kib']} KiB per SM, "
                f"{gpu['shared_memory_per_block_kib']} KiB per block",
            ),
            ("  DRAM", dram),
        ]
    return found


def _torch(report: dict[str, Any]) -> Pairs:
    torch, triton = report["torch"], report["triton"]
    found = [("torch", "has not answered"), ("triton", "has not answered")]
    if torch is not None:
        built = f"CUDA {torch['cuda']}" if torch["cuda"] else "no CUDA"
        if torch["hip"]:
            built = f"ROCm {torch['hip']}"
        abi = f"_GLIBCXX_USE_CXX11_ABI={int(torch['cxx11_abi'])}"
        archs = f", code for {' '.join(torch['archs'])}" if torch["archs"] else ""
        found[0] = ("torch", f"{torch['version']}, built with {built}, {abi}{archs}")
    if triton is not None:
        found[1] = ("triton", " ".join(filter(None, (triton["version"], triton["problem"]))))
    return found


def _tools(tools: dict[str, Any]) -> Pairs:
    return [
        (name, f"{tool['version']} ({tool['path']})" if tool["version"] else tool["problem"])
        for name, tool in tools.items()
    ]
