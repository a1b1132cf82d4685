"""The environment report: what is said, what is odd, and that nothing holds it up."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attnproof.device import current_device
from attnproof.doctor import examine, probing
from attnproof.doctor.findings import findings
from attnproof.doctor.hardware import CudaDriver, theoretical_bandwidth
from attnproof.doctor.text import remedies, sections
from attnproof.doctor.toolchain import TOOLS, tools
from attnproof.environment import (
    cores,
    cpu_model,
    environment,
    free_memory_bytes,
    lines,
    memory_bytes,
    versions,
    without_torch,
)
from attnproof.listing import catalogue
from attnproof.registry import registered

TEN_SECONDS = 10.0
HANG = "import time\ntime.sleep(1000)\n"


def test_the_environment_is_json_and_names_what_a_verdict_depends_on() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["isa"] == torch.backends.cpu.get_cpu_capability()
    assert found["cpu"]["cores"] == cores() >= 1
    assert found["memory_gib"] > 0.1
    assert memory_bytes() > 2**27
    assert 0 < free_memory_bytes() <= memory_bytes()
    assert cpu_model()
    assert "attnproof" in versions()


def test_without_torch_the_environment_has_the_same_fields() -> None:
    found, less = environment(), without_torch()
    assert list(found) == list(less)
    assert list(found["cpu"]) == list(less["cpu"])
    assert "torch has not answered" in dict(lines(less))["cpu"]


def test_the_environment_shows_variables_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNPROOF_TYPPO", "1")
    monkeypatch.setenv("UNRELATED", "1")
    shown = dict(lines())
    assert "ATTNPROOF_TYPPO=1" in shown["variables"]
    assert "UNRELATED" not in shown["variables"]


GPU = {
    "name": "NVIDIA H100",
    "capability": "9.0",
    "sm": "sm_90",
    "architecture": "Hopper",
    "multiprocessors": 132,
    "l2_mib": 50.0,
    "shared_memory_per_multiprocessor_kib": 228,
    "shared_memory_per_block_kib": 227,
    "memory_gib": 79.2,
    "memory_clock_mhz": 2619,
    "memory_bus_bits": 5120,
    "theoretical_bandwidth_gb_per_s": 3352,
}
TORCH = {
    "version": "2.11.0+cu130",
    "cuda": "13.0",
    "hip": None,
    "cxx11_abi": True,
    "archs": ["sm_80", "sm_90"],
}


def usual(**other: Any) -> dict[str, Any]:
    """A report in which nothing is odd."""
    report = {
        "environment": {
            "memory_gib": 16.0,
            "gpus": [{"name": "NVIDIA H100"}],
            "variables": {},
            "cpu": {"cores": 4, "torch_threads": 4},
        },
        "hardware": {"driver": "580.1", "driver_cuda": "13.0", "problem": None, "gpus": [GPU]},
        "torch": TORCH,
        "triton": {"version": "3.6.0", "problem": None},
        "tools": {name: {"path": None, "version": None, "problem": None} for name in TOOLS},
        "backends": [{"name": "a", "available": True, "reason": None}],
        "problems": {},
    }
    for name, value in other.items():
        report[name] = report[name] | value if isinstance(value, dict) else value
    return report


def test_nothing_odd() -> None:
    assert findings(usual()) == []


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"environment": {"memory_gib": 1.5}}, "1.5 GiB of memory"),
        ({"environment": {"gpus": []}}, "torch sees no GPU"),
        (
            {"environment": {"variables": {"ATEN_CPU_CAPABILITY": "default"}}},
            "ATEN_CPU_CAPABILITY=default",
        ),
        (
            {"environment": {"cpu": {"cores": 2, "torch_threads": 64}}},
            "64 threads on 2 cores: set OMP_NUM_THREADS",
        ),
        ({"torch": {"cuda": None}}, "the driver has NVIDIA H100, and torch"),
        ({"torch": {"archs": ["sm_80"]}}, "no machine code for NVIDIA H100, sm_90: it has sm_80"),
        ({"torch": {"archs": ["sm_100"]}}, "no machine code for NVIDIA H100"),
        ({"hardware": {"driver_cuda": "12.4"}}, "driver 580.1 runs up to 12.4"),
        ({"tools": {"nvcc": {"version": "12.8"}}}, "nvcc is of CUDA 12.8, and torch was built"),
        (
            {"triton": {"version": "3.6.0", "problem": "ImportError: x"}},
            "triton 3.6.0 cannot be imported: ImportError: x",
        ),
        (
            {"problems": {"libraries": "no answer within 8 s"}},
            "the probe of libraries failed: no answer within 8 s",
        ),
        ({"backends": [{"available": False}]}, "no backend can run here"),
    ],
)
def test_what_is_odd_is_said(odd: dict[str, Any], words: str) -> None:
    said = findings(usual(**odd))
    assert len(said) == 1, said
    assert words in said[0]


def test_code_for_an_older_gpu_of_the_same_major_version_runs() -> None:
    ada = GPU | {"capability": "8.9", "sm": "sm_89"}
    report = usual(hardware={"gpus": [ada]}, torch={"archs": ["sm_80", "sm_90"]})
    assert findings(report) == []


def test_the_report_of_this_machine() -> None:
    report = examine("cpu")
    assert json.loads(json.dumps(report)) == report
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert report["torch"]["version"] == torch.__version__
    assert report["torch"]["cxx11_abi"] == torch._C._GLIBCXX_USE_CXX11_ABI
    assert report["problems"] == {}
    told = {one["name"]: one for one in report["backends"]}
    assert list(told) == list(registered())
    assert told["eager"]["available"]
    assert told["eager"]["capabilities"]["returns_lse"] is True
    assert not told["sdpa-cudnn"]["available"]
    assert told["sdpa-cudnn"]["reason"] == "does not run on cpu: it declares cuda"
    assert "remedy" not in told["sdpa-cudnn"]
    shown = [pair for section in sections(report) for pair in section]
    assert ("eager", "can run here") in shown
    assert dict(shown)["torch"].startswith(f"{torch.__version__}, built with ")


def test_remedies_are_told_with_the_time_that_they_take() -> None:
    built = {"command": "MAX_JOBS=3 pip install a", "jobs": 3, "minutes": 130}
    plain = {"command": "pip install b", "jobs": None, "minutes": None}
    report = usual(backends=[{"name": "a", "remedy": built}, {"name": "b", "remedy": plain}, {}])
    assert list(remedies(report)) == [
        ("a (compiles with 3 jobs, about 130 minutes)", "MAX_JOBS=3 pip install a"),
        ("b", "pip install b"),
    ]


def test_bandwidth_in_theory() -> None:
    assert theoretical_bandwidth(2_619_000, 5120) == 3352  # H100 SXM: 3.35 TB/s on its data sheet
    assert theoretical_bandwidth(5_001_000, 256) == 320  # T4: 320 GB/s
    assert theoretical_bandwidth(0, 5120) is None


@pytest.mark.requires_arch(min="sm_60")
def test_the_gpu_as_the_driver_and_as_torch_see_it() -> None:
    device = current_device()
    assert device is not None
    driver = CudaDriver()
    found = driver.gpu(0)
    properties = torch.cuda.get_device_properties(0)
    assert driver.count() == torch.cuda.device_count()
    assert found["name"] == device.name
    assert found["capability"] == ".".join(map(str, device.capability))
    assert found["multiprocessors"] == properties.multi_processor_count
    assert found["l2_mib"] == round(properties.L2_cache_size / 2**20, 1)
    shared = properties.shared_memory_per_multiprocessor // 2**10
    assert found["shared_memory_per_multiprocessor_kib"] == shared
    assert found["theoretical_bandwidth_gb_per_s"] > 100


# Nothing holds it up: programs, imports and drivers that hang, crash or talk too much.


def script(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run(*arguments: str, **variables: str) -> tuple[dict[str, Any], float]:
    """The report of the program, and its seconds."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "attnproof", "doctor", "--json", *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout), time.monotonic() - start


def planted(folder: Path, **modules: str) -> None:
    """A distribution whose backends are these modules."""
    information = folder / "planted-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    points = "\n".join(f"{name} = {name}:backend" for name in modules)
    (information / "entry_points.txt").write_text(f"[attnproof.backends]\n{points}\n")
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


def test_backends_that_hang_die_or_talk_hold_up_no_others(tmp_path: Path) -> None:
    planted(
        tmp_path,
        hangs=HANG,
        dies="import os\nos._exit(3)\n",
        talks="print('{\"backend\": 1}', flush=True)\nraise ValueError('not this one')\n",
        stays="import os, time\nif os.fork() == 0:\n    time.sleep(1000)\nraise ValueError('x')\n",
    )
    report, seconds = run("--device=cpu", PYTHONPATH=str(tmp_path))
    assert seconds < TEN_SECONDS
    told = {one["name"]: one for one in report["backends"]}
    assert told["hangs"]["reason"].startswith("no answer ")
    assert told["dies"]["reason"] == "its process ended while it was asked"
    assert "ValueError: not this one" in told["talks"]["reason"]
    assert told["eager"]["available"]
    assert {"hangs", "dies", "talks", "stays", *registered()} == set(told)


def test_a_torch_that_hangs_leaves_the_rest_of_the_report(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(HANG)
    report, seconds = run(PYTHONPATH=str(tmp_path))
    assert seconds < TEN_SECONDS
    assert report["torch"] is None
    assert report["environment"]["cpu"]["model"] == cpu_model()
    assert report["problems"]["libraries"] == "no answer within 8 s"
    assert {one["name"] for one in report["backends"]} == set(registered())
    assert all("it was not asked: no answer" in one["reason"] for one in report["backends"])
    assert any("the probe of libraries failed" in finding for finding in report["findings"])
    assert [pair for section in sections(report) for pair in section]


def test_compilers_that_hang_fail_or_say_nothing(tmp_path: Path) -> None:
    for name, text in (
        ("nvcc", "sleep 1000 & sleep 1000"),
        ("gcc", "echo no licence >&2; exit 7"),
        ("clang", "echo hello"),
        ("ninja", "echo 1.13.0"),
    ):
        script(tmp_path / "bin", name, text)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    report, seconds = run("--device=cpu", PATH=path, CUDA_HOME="", CUDA_PATH="")
    assert seconds < TEN_SECONDS
    found = report["tools"]
    assert found["nvcc"]["problem"] == "no answer within 8 s"
    assert found["gcc"]["problem"] == "exit status 7: no licence"
    assert found["clang"]["problem"] == "says no version"
    assert (found["ninja"]["version"], found["ninja"]["problem"]) == ("1.13.0", None)
    assert report["torch"]["version"] == torch.__version__


def test_an_environment_without_pip_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "pip.py").write_text("raise ImportError('there is no pip')\n")
    report, _ = run("--device=cpu", PYTHONPATH=str(tmp_path))
    assert report["problems"] == {}


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ("gcc (Debian 12.2.0-14+deb12u1) 12.2.0\nCopyright", "12.2.0"),
        ("gcc (GCC) 13.1.1 20230614 (Red Hat 13.1.1-4)", "13.1.1"),
    ],
)
def test_the_version_of_gcc_is_not_that_of_its_package(printed: str, version: str) -> None:
    answers = {name: probing.Answer(output=printed) for name in TOOLS}
    assert tools(answers)["gcc"]["version"] == version


def test_the_version_of_nvcc_is_that_of_its_toolkit() -> None:
    printed = (
        "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 12.8, V12.8.93"
    )
    answers = {name: probing.Answer(output=printed) for name in TOOLS}
    assert tools(answers)["nvcc"]["version"] == "12.8"


def test_a_probe_that_prints_and_then_hangs_is_heard() -> None:
    start = time.monotonic()
    text = "import sys, time; print('{\"a\": 1}', flush=True); print('x{'); time.sleep(1000)"
    found = probing.run({"a": [sys.executable, "-c", text], "b": ["no-such-program"]}, 1.5)
    assert time.monotonic() - start < 3
    assert found["a"].values() == [{"a": 1}]
    assert found["a"].problem == "no answer within 1.5 s"
    assert found["b"].problem == "no-such-program: is not here"


FAKE_DRIVER = """
#include <unistd.h>
int cuInit(unsigned flags) {{ {body} }}
int cuGetErrorString(int error, const char **text) {{ *text = "no CUDA-capable device"; return 0; }}
"""


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("sleep(1000); return 0;", "no answer within 8 s"),
        ("return 100;", "cuInit: no CUDA-capable device (CUDA error 100)"),
        ("return *(volatile int *)0;", "killed by signal 11"),
    ],
)
def test_a_driver_that_hangs_refuses_or_crashes(tmp_path: Path, body: str, problem: str) -> None:
    source = tmp_path / "driver.c"
    source.write_text(FAKE_DRIVER.format(body=body))
    library = tmp_path / "libcuda.so.1"
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    except FileNotFoundError:
        pytest.skip("no gcc to build a driver with")
    report, seconds = run("--device=cpu", LD_LIBRARY_PATH=str(tmp_path))
    assert seconds < TEN_SECONDS
    assert report["hardware"]["problem"] == problem
    assert report["hardware"]["gpus"] == []


# What the driver of an H100 SXM answers; the names of the attributes are the header's.
H100_DRIVER = """
#include <cuda.h>
#include <string.h>
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 2; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
  strncpy(name, "NVIDIA H100 80GB HBM3", length);
  return CUDA_SUCCESS;
}
#undef cuDeviceTotalMem
CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
  *bytes = 85045346304ull;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 52428800; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2619000; break;
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 5120; break;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
"""


def test_what_a_driver_answers_is_read_by_the_numbers_of_its_header(tmp_path: Path) -> None:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("no triton, which brings cuda.h")
    (tmp_path / "driver.c").write_text(H100_DRIVER)
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", "-o", "libcuda.so.1", "driver.c"]
    try:
        subprocess.run(command, cwd=tmp_path, check=True)
    except FileNotFoundError:
        pytest.skip("no gcc to build a driver with")
    report, _ = run("--device=cpu", LD_LIBRARY_PATH=str(tmp_path))
    assert report["hardware"]["driver_cuda"] == "13.0"
    one, other = report["hardware"]["gpus"]
    assert one == other == GPU | {"name": "NVIDIA H100 80GB HBM3"}
    shown = [pair for section in sections(report) for pair in section]
    dram = "79.2 GiB, 3352 GB/s in theory (2 x 2619 MHz x 5120 bits)"
    assert ("gpu 0", "NVIDIA H100 80GB HBM3, sm_90 (Hopper)") in shown
    assert ("  shared memory", "228 KiB per SM, 227 KiB per block") in shown
    assert ("  DRAM", dram) in shown


def test_the_catalogue_counts_cases_by_level() -> None:
    found = catalogue()
    assert {"masks", "numerics", "gradients"} <= set(found)
    window = next(check for check in found["masks"] if check.name == "window")
    assert 0 < window.cases["quick"] < window.cases["full"]
    assert window.about
