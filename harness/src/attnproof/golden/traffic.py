"""golden/traffic: the counts of every registered source, pinned for a few settings.

One file holds them all, by setting and algorithm. Counts are whole numbers: any difference is one.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..traffic.sources import Setting, sources
from ..writing import replace_file
from .comparison import Update
from .vectors import MANIFEST

DIRECTORY = Path("golden/traffic")
COUNTS = "counts.json"
SIZES = ((48, 16, 1024), (512, 64, 16384), (1000, 128, 65536))  # N, d, M


def settings() -> list[Setting]:
    """What is pinned: lengths that the tiles divide and do not divide, every pass."""
    return [
        Setting(seqlen=n, head_dim=d, on_chip=m, causal=causal, backward=backward)
        for (n, d, m), causal, backward in product(SIZES, (False, True), (False, True))
    ]


def counts() -> dict[str, dict[str, Any]]:
    """The counts made here, by setting and name."""
    found: dict[str, dict[str, Any]] = {}
    for setting in settings():
        chosen = {n: s for n, s in sources().items() if s.unsupported(setting) is None}
        found[str(setting)] = {n: s.count(setting).as_dict() for n, s in chosen.items()}
    return found


def verify(directory: Path = DIRECTORY) -> list[str]:
    """Count again and compare: what differs, a sentence each; empty when nothing does."""
    path = directory / COUNTS
    try:
        text = path.read_bytes()
        stored = json.loads(text)
        expected = json.loads((directory / MANIFEST).read_text("utf-8"))["files"][COUNTS]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{directory}: not readable ({error})"]
    differences = []
    if hashlib.sha256(text).hexdigest() != expected:
        differences.append(f"the SHA-256 of {COUNTS} is not that of the manifest")
    return differences + _differences(stored, counts())


def update(directory: Path = DIRECTORY) -> Update:
    """Write the counts made here where they differ; the notes say in what."""
    directory.mkdir(parents=True, exist_ok=True)
    differences = verify(directory)
    changed = []
    if differences:
        text = (json.dumps(counts(), indent=1) + "\n").encode()
        entry = {
            "sha256": hashlib.sha256(text).hexdigest(),
            "attnproof": version("attnproof"),
            "torch": torch.__version__,
        }
        manifest = json.dumps({"files": {COUNTS: entry}}, indent=1) + "\n"
        for name, content in ((COUNTS, text), (MANIFEST, manifest.encode())):
            path = directory / name
            if not (path.is_file() and path.read_bytes() == content):
                replace_file(path, content)
                changed.append(f"{name}: written")
    return Update(changed=changed, notes=differences)


def files() -> list[str]:
    """The names of the files that ``update`` may write."""
    return [COUNTS, MANIFEST]


def _differences(stored: Any, made: dict[str, dict[str, Any]]) -> list[str]:
    """Setting by setting, algorithm by algorithm, count by count."""
    said = []
    for setting in sorted(stored.keys() | made.keys()):
        there, here = stored.get(setting, {}), made.get(setting, {})
        for name in sorted(there.keys() | here.keys()):
            if name not in there or name not in here:
                said.append(f"{setting}: {name} is {'new' if name in here else 'gone'}")
                continue
            for what, value in here[name].items():
                if there[name].get(what) != value:
                    said.append(f"{setting}: {name}: {what} {there[name].get(what)}, now {value}")
    return said
