"""What was measured before, by the digest of all that decides it: source, options, tools."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from ..writing import replace_file
from . import measure as measuring
from .measure import Measured


def default_folder() -> Path:
    """Where the user's caches are: $XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "attnproof" / "codegen"


class Cache:
    """Files of a folder, one for each kernel; what cannot be read or written is not cached."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # What is read of a kernel may change as well.
        self._reader = Path(measuring.__file__).read_bytes()

    def get(self, key: str) -> Measured | None:
        """What was measured under a key."""
        try:
            return Measured.from_dict(json.loads(self._path(key).read_text("utf-8")))
        except (OSError, ValueError):
            return None

    def put(self, key: str, measured: Measured) -> None:
        """Keep it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._path(key), json.dumps(measured.as_dict()).encode())
        except OSError:
            return

    def _path(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(self._reader + key.encode()).hexdigest()}.json"
