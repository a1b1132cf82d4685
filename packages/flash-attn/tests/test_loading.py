"""Every way in which the library is absent or broken is one line with a remedy.

Modules are planted on the path, with metadata as pip leaves it, and raise what the real ones raise.
They are imported in a process of their own, as only there a broken import leaves nothing behind.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import flash_attn_backend as library
from flash_attn_backend import FORMS

TWO, THREE, FOUR = FORMS.values()
FUNCTIONS = {
    form.name: "\n".join(f"{name} = print" for name in form.functions) for form in FORMS.values()
}
UNDEFINED = (
    "/site-packages/flash_attn_2_cuda.cpython-312-x86_64-linux-gnu.so: undefined symbol: "
    "_ZN3c105ErrorC2ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
)
CUDART = "libcudart.so.12: cannot open shared object file: No such file or directory"
GLIBC = (
    "/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.32' not found (required by "
    "/site-packages/flash_attn_2_cuda.cpython-312-x86_64-linux-gnu.so)"
)
BUILD_TWO = "pip install flash-attn --no-build-isolation --no-cache-dir --force-reinstall --no-deps"


# What setuptools leaves of an editable install: nothing on the path, and a finder that knows where.
EDITABLE = """
import sys
from importlib.util import spec_from_file_location

class Finder:
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname == "flash_attn":
            return spec_from_file_location(fullname, {file!r})

sys.meta_path.append(Finder)
"""


class Site:
    """A folder on the path, with what is installed in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, distribution: str, version: str, **modules: str) -> Site:
        """``modules``: source text by dotted name, with __ for the dot; packages for parents."""
        name = f"{distribution.replace('-', '_')}-{version}.dist-info"
        (self.folder / name).mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (self.folder / name / "METADATA").write_text(metadata)
        for module, source in modules.items():
            self.write(module, source)
        return self

    def write(self, module: str, source: str) -> None:
        folder = self.folder.joinpath(*module.split("__"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(textwrap.dedent(source))

    def why_not(self, name: str, startup: str = "") -> str:
        """What is said of the form in a new process that has this folder first on its path, and
        runs ``startup`` first, as Python does a .pth file."""
        code = f"{startup}\nimport flash_attn_backend as b; print(b.why_not(b.FORMS[{name!r}]))"
        found = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": str(self.folder), "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.count("\n") == 1
        return found.stdout.strip()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def raising(error: str, said: str, **arguments: str) -> str:
    return f"raise {error}({said!r}, **{arguments!r})"


@pytest.mark.parametrize("name", FORMS)
def test_absent(name: str, site: Site) -> None:
    form = FORMS[name]
    assert site.why_not(name) == f"{form.title} ({form.module}) is not installed: {form.install}"


@pytest.mark.parametrize(
    ("distribution", "modules"),
    [
        ("flash-attn", {"flash_attn": FUNCTIONS["flash-attn-2"]}),
        ("flash_attn_3", {"flash_attn_interface": FUNCTIONS["flash-attn-3"]}),
        ("flash-attn-4", {"flash_attn__cute": FUNCTIONS["flash-attn-4"]}),
    ],
)
def test_present(distribution: str, modules: dict[str, str], site: Site) -> None:
    site.install(distribution, "2.8.3", **modules)
    usable = [name for name in FORMS if site.why_not(name) == "None"]
    (module,) = modules
    assert [FORMS[name].module for name in usable] == [module.replace("__", ".")]


@pytest.mark.parametrize(
    ("source", "why", "remedy"),
    [
        (
            raising("ImportError", UNDEFINED),
            f"it was built for another torch than torch {torch.__version__} here ({UNDEFINED})",
            BUILD_TWO,
        ),
        (
            raising("ImportError", CUDART),
            f"it was built for CUDA 12, and torch {torch.__version__} here has",
            BUILD_TWO,
        ),
        (
            raising("ImportError", GLIBC),
            "it was built on a newer system: GLIBC_2.32 is not here",
            BUILD_TWO,
        ),
        (
            "import flash_attn_2_cuda",
            "its compiled part flash_attn_2_cuda is missing, as after a build without CUDA",
            BUILD_TWO,
        ),
        (
            "import einops_that_is_not_here",
            "it needs the module einops_that_is_not_here, which is not installed",
            "pip install flash-attn --no-build-isolation --upgrade",
        ),
        (
            "def flash_attn_func(): ...",
            "another version than expected (module 'flash_attn' has no attribute "
            "'flash_attn_kvpacked_func')",
            "pip install flash-attn --no-build-isolation --upgrade",
        ),
        (
            "from os import no_such_name",
            "another version than expected (cannot import name 'no_such_name' from 'os'",
            "pip install flash-attn --no-build-isolation --upgrade",
        ),
        (
            raising("RuntimeError", "something\nelse"),
            "RuntimeError: something else",
            BUILD_TWO,
        ),
    ],
    ids=[
        "undefined symbol",
        "CUDA runtime",
        "glibc",
        "no compiled part",
        "a dependency",
        "a function",
        "a name",
        "anything",
    ],
)
def test_broken(source: str, why: str, remedy: str, site: Site) -> None:
    said = site.install("flash-attn", "2.8.3", flash_attn=source).why_not("flash-attn-2")
    assert said.startswith(
        "FlashAttention-2 (flash_attn 2.8.3) is installed but cannot be imported: "
    )
    assert why in said
    assert said.endswith(remedy)


def test_one_that_aligns_from_the_top_left_is_too_old(site: Site) -> None:
    site.install("flash-attn", "2.0.9", flash_attn=FUNCTIONS["flash-attn-2"])
    assert site.why_not("flash-attn-2") == (
        f"flash_attn is version 2.0.9, 2.2 is needed: {TWO.install}"
    )


def test_flash_attention_4_alone_is_no_flash_attention_2(site: Site) -> None:
    """It leaves flash_attn a folder without a file to import."""
    site.install("flash-attn-4", "4.0.0b36", flash_attn__cute=FUNCTIONS["flash-attn-4"])
    assert "FlashAttention-2 (flash_attn) is not installed" in site.why_not("flash-attn-2")
    assert site.why_not("flash-attn-4") == "None"


def test_the_copy_that_flash_attention_2_ships_is_no_flash_attention_4(site: Site) -> None:
    """It is recognised without importing flash_attn, which may be broken itself."""
    site.install("flash-attn", "2.8.3", flash_attn=raising("ImportError", UNDEFINED))
    site.write("flash_attn__cute", FUNCTIONS["flash-attn-4"])
    said = site.why_not("flash-attn-4")
    assert "no distribution flash-attn-4 is installed (flash-attn 2 ships an old copy)" in said
    assert said.endswith(FOUR.install)


def test_a_broken_flash_attention_2_breaks_flash_attention_4(site: Site) -> None:
    site.install("flash-attn", "2.8.3", flash_attn=raising("ImportError", UNDEFINED))
    site.install("flash-attn-4", "4.0.0b36", flash_attn__cute=FUNCTIONS["flash-attn-4"])
    said = site.why_not("flash-attn-4")
    assert "because flash_attn of FlashAttention-2, whose folder it shares, cannot be" in said
    assert said.endswith(f"{BUILD_TWO}, or pip uninstall flash-attn")


def test_an_editable_install_is_installed(site: Site, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout" / "flash_attn"
    checkout.mkdir(parents=True)
    file = checkout / "__init__.py"
    file.write_text(FUNCTIONS["flash-attn-2"])
    startup = EDITABLE.format(file=str(file))
    site.install("flash-attn", "2.8.3")
    assert site.why_not("flash-attn-2", startup) == "None"
    # The finder tells where flash_attn.cute would lie, without flash_attn being imported.
    file.write_text(raising("ImportError", UNDEFINED))
    said = site.why_not("flash-attn-4", startup)
    assert said == f"FlashAttention-4 (flash_attn.cute) is not installed: {FOUR.install}"
    (checkout / "cute").mkdir()
    (checkout / "cute" / "__init__.py").write_text(FUNCTIONS["flash-attn-4"])
    assert "(flash-attn 2 ships an old copy)" in site.why_not("flash-attn-4", startup)


def test_an_editable_install_whose_folder_is_gone(site: Site) -> None:
    said = site.install("flash-attn", "2.8.3").why_not("flash-attn-2")
    assert said.startswith(
        "FlashAttention-2 (flash_attn 2.8.3) is installed but not found: the folder of an editable "
    )
    assert said.endswith(BUILD_TWO)


def test_an_unknown_form() -> None:
    with pytest.raises(ValueError, match="form='flash-attn-5': accepted are flash-attn-2, flash"):
        library.load("flash-attn-5")
