"""A backend that calls a library, where the library is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from ..signatures.common import FunctionBackend


@dataclass(kw_only=True)
class LibraryBackend(FunctionBackend):
    """A FunctionBackend whose function imports a library when it is called."""

    module: str
    install: str  # the command

    def availability(self, device: str) -> str | None:
        """None when the library and the device are here, else the reason."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed: {self.install}"
        return super().availability(device)
