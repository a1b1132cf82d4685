"""The library in plain torch in place of the compiled one, for tests of what it is given."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flash_attn_backend import FORMS, functions
from flash_attn_backend.loading import Library

from . import library_in_torch


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Library]:
    """``load``, of modules that are written in torch; what they are given is kept from here on."""
    library_in_torch.CALLS.clear()
    libraries = {
        name: Library(FORMS[name], "0", module(name))
        for name, module in library_in_torch.MODULES.items()
    }
    monkeypatch.setattr(functions, "load", libraries.__getitem__)
    return libraries.__getitem__
