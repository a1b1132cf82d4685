"""The command that installs a library on a machine, and how long it takes."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass, replace

import pytest

from attnproof.installation import Compilation, Installable, Machine, Remedy, installer, remedy

GIB = 2**30


MEASURED = Compilation(archs_variable="FLASH_ATTN_CUDA_ARCHS", minutes=26, jobs=15)


@dataclass(frozen=True)
class Library:
    install: str = "pip install flash-attn --no-build-isolation"
    installed: bool = False
    compilation: Compilation | None = MEASURED


H100 = Machine(
    cores=16, free_memory=125 * GIB, capabilities=((9, 0),), installer="/opt/python -m pip install"
)


def test_the_machine_that_was_measured() -> None:
    assert isinstance(Library(), Installable)
    found = remedy(Library(), H100)
    assert found.command == (
        "MAX_JOBS=15 FLASH_ATTN_CUDA_ARCHS=90 "
        "/opt/python -m pip install flash-attn --no-build-isolation"
    )
    assert (found.jobs, found.minutes) == (15, 26)
    assert Remedy.from_dict(found.as_dict()) == found


@pytest.mark.parametrize(
    ("cores", "free", "jobs"),
    [
        (16, 125, 15),  # a core is left
        (16, 64, 8),  # memory decides
        (64, 256, 32),
        (8, 4, 1),  # too little for one, and one there must be
        (1, 64, 1),
    ],
)
def test_jobs_follow_from_cores_and_free_memory(cores: int, free: int, jobs: int) -> None:
    machine = replace(H100, cores=cores, free_memory=free * GIB)
    found = remedy(Library(), machine)
    assert found.jobs == jobs
    assert f"MAX_JOBS={jobs} " in found.command
    assert found.minutes == pytest.approx(26 * 15 / jobs, abs=0.5)


@pytest.mark.parametrize(
    ("capabilities", "archs", "times"),
    [
        (((8, 6),), "80", 1),
        (((8, 9), (8, 0)), "80", 1),
        (((8, 0), (9, 0)), "'80;90'", 2),
        (((10, 3),), "100", 1),
        (((12, 0), (9, 0)), "'90;120'", 2),
    ],
)
def test_it_is_compiled_for_the_gpus_that_are_here(
    capabilities: tuple[tuple[int, int], ...], archs: str, times: int
) -> None:
    found = remedy(Library(), replace(H100, capabilities=capabilities))
    assert f" FLASH_ATTN_CUDA_ARCHS={archs} " in found.command
    assert found.minutes == 26 * times


def test_what_a_build_lacks_is_installed_before_it() -> None:
    found = remedy(Library(), replace(H100, missing_tools=("wheel", "ninja")))
    assert found.command.startswith("/opt/python -m pip install wheel ninja && MAX_JOBS=15 ")


def test_what_is_there_and_does_not_work_is_built_anew() -> None:
    found = remedy(Library(installed=True), H100)
    assert found.command.endswith(" --no-cache-dir --force-reinstall --no-deps")


def test_the_variables_stand_where_they_are_read() -> None:
    cloned = Library(install="git clone it && cd it && pip install .", compilation=Compilation())
    found = remedy(cloned, H100)
    assert found.command == ("git clone it && cd it && MAX_JOBS=15 /opt/python -m pip install .")
    assert found.minutes is None


def test_nothing_is_compiled() -> None:
    found = remedy(Library(install="pip install --pre flash-attn-4", compilation=None), H100)
    assert found == Remedy(command="/opt/python -m pip install --pre flash-attn-4")


def test_what_installs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    python = shlex.quote(sys.executable)
    here = {"pip": True, "uv": False}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: here["pip"] or None)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/uv" if here["uv"] else None)
    assert installer() == f"{python} -m pip install"
    here |= {"pip": False, "uv": True}
    assert installer() == f"uv pip install --python {python}"
    here["uv"] = False
    assert installer() == f"{python} -m ensurepip && {python} -m pip install"
