"""The drop-ins, judged by ``attnproof check`` as anybody's are."""

import subprocess
import sys

import pytest

from triton_attention import interpreter

TORCH = ("triton_attention:scaled_dot_product_attention", "--signature", "sdpa")
LIBRARY = ("triton_attention.flash_attn", "--signature", "flash_attn")


@pytest.mark.slow
@pytest.mark.parametrize("words", [TORCH, LIBRARY], ids=["torch", "library"])
def test_nothing_is_wrong(words):
    device = ("--device", "cpu" if interpreter.enabled() else "cuda")
    command = [sys.executable, "-m", "attnproof", "check", *words, *device]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "conforms: " in run.stdout
