"""A backend that calls a library, where the library is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from ..installation import Compilation
from ..signatures.common import FunctionBackend


@dataclass(kw_only=True)
class LibraryBackend(FunctionBackend):
    """A FunctionBackend whose function imports a library when it is called."""

    module: str
    install: str  # the command
    compilation: Compilation | None = None  # what it takes

    @property
    def installed(self) -> bool:
        """Whether the library is there; it is not imported."""
        return importlib.util.find_spec(self.module) is not None

    def availability(self, device: str) -> str | None:
        """None when the library and the device are here, else the reason."""
        if not self.installed:
            return f"{self.module} is not installed: {self.install}"
        return super().availability(device)
