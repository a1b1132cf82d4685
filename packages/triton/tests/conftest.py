"""Where torch finds no GPU, kernels are interpreted: to be said before anything imports Triton.

On a GPU machine they are compiled; with TRITON_INTERPRET=1 they are interpreted there too.
"""

import pytest
import torch

from triton_attention import interpreter

if not torch.cuda.is_available():
    interpreter.enable()


@pytest.fixture
def device() -> str:
    """Where kernels run in this process."""
    return "cpu" if interpreter.enabled() else "cuda"


@pytest.fixture
def gpu() -> None:
    """For what only a GPU has."""
    if interpreter.enabled():
        pytest.skip("no GPU, or TRITON_INTERPRET is set")
