"""The drop-ins, judged by ``attnproof check`` as anybody's are."""

import subprocess
import sys

import pytest

from triton_attention import interpreter

TORCH = ("triton_attention:scaled_dot_product_attention", "--signature", "sdpa")
LIBRARY = ("triton_attention.flash_attn", "--signature", "flash_attn")
# Of chapters, those that a drop-in can be wrong in where V2 is right: what means what.
FEW = ("--dtype", "bf16", "--chapter", "masks", "--chapter", "heads")
PLACES = ("--chapter", "varlen", "--chapter", "paged", "--chapter", "lse")


@pytest.mark.parametrize(
    "words",
    [
        (*TORCH, *FEW),
        (*LIBRARY, *FEW, *PLACES),
        pytest.param(TORCH, marks=pytest.mark.slow),
        pytest.param(LIBRARY, marks=pytest.mark.slow),
    ],
    ids=["torch", "library", "torch-all", "library-all"],
)
def test_nothing_is_wrong(words):
    device = ("--device", "cpu" if interpreter.enabled() else "cuda")
    command = [sys.executable, "-m", "attnproof", "check", *words, *device]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "conforms: " in run.stdout
