"""What is odd about a machine, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..requirement import numbers

MEMORY_GIB = 2.0  # what a quick run takes


def findings(report: dict[str, Any]) -> list[str]:
    """What is odd in a report of ``examine``."""
    return [*_of_environment(report["environment"]), *_of_gpus(report), *_of_the_rest(report)]


def _of_environment(found: dict[str, Any]) -> Iterator[str]:
    if found["memory_gib"] < MEMORY_GIB:
        yield f"{found['memory_gib']} GiB of memory: a run takes up to {MEMORY_GIB:g} GiB"
    if "ATEN_CPU_CAPABILITY" in found["variables"]:
        value = found["variables"]["ATEN_CPU_CAPABILITY"]
        yield f"ATEN_CPU_CAPABILITY={value}: torch may use other CPU kernels than usual"
    threads, cores = found["cpu"]["torch_threads"], found["cpu"]["cores"]
    if threads is not None and threads > cores:
        yield f"torch uses {threads} threads on {cores} cores: set OMP_NUM_THREADS"


def _of_gpus(report: dict[str, Any]) -> Iterator[str]:
    """Where driver, torch, compiler and GPU do not go together."""
    hardware, torch = report["hardware"], report["torch"]
    if not report["environment"]["gpus"]:
        yield "torch sees no GPU: only CPU backends can be judged here"
    if hardware["gpus"] and torch and torch["cuda"] is None:
        name = hardware["gpus"][0]["name"]
        yield f"the driver has {name}, and torch {torch['version']} was built without CUDA"
    if not (torch and torch["cuda"] and hardware["gpus"]):
        return
    if hardware["driver_cuda"] and _major(hardware["driver_cuda"]) < _major(torch["cuda"]):
        yield (
            f"torch was built with CUDA {torch['cuda']}, and driver {hardware['driver']} runs "
            f"up to {hardware['driver_cuda']}: install a newer driver or an older build of torch"
        )
    for gpu in hardware["gpus"]:
        if torch["archs"] and not any(_runs_on(arch, gpu["capability"]) for arch in torch["archs"]):
            yield (
                f"torch {torch['version']} has no machine code for {gpu['name']}, {gpu['sm']}: it "
                f"has {', '.join(torch['archs'])}"
            )
    nvcc = report["tools"]["nvcc"]["version"]
    if nvcc is not None and _major(nvcc) != _major(torch["cuda"]):
        yield (
            f"nvcc is of CUDA {nvcc}, and torch was built with {torch['cuda']}: its extensions are "
            "not compiled with another major version"
        )


def _of_the_rest(report: dict[str, Any]) -> Iterator[str]:
    for name, problem in report["problems"].items():
        yield f"the probe of {name} failed: {problem}"
    triton = report["triton"]
    if triton is not None and triton["problem"] and triton["version"]:
        yield f"triton {triton['version']} cannot be imported: {triton['problem']}"
    if not any(backend["available"] for backend in report["backends"]):
        yield "no backend can run here"


def _major(version: str) -> int:
    return numbers(version)[0]


def _runs_on(arch: str, capability: str) -> bool:
    """Whether machine code for sm_80 runs on a GPU of capability "8.6": the same major version,
    and none newer."""
    major, minor = map(int, capability.split("."))
    code = arch.removeprefix("sm_").rstrip("af")
    return int(code[:-1]) == major and int(code[-1]) <= minor
