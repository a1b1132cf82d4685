"""Import every module of an installed distribution and compare its files with the source.

Usage: python tools/import_all.py packages/reference

Modules named ``attnproof_backend`` meet the harness and are imported by it alone.
"""

import importlib
import sys
from pathlib import Path


def modules(package: Path) -> list[str]:
    """The dotted names of the modules under a package's folder."""
    names = []
    for file in sorted(package.rglob("*.py")):
        if file.stem in ("attnproof_backend", "__main__"):
            continue
        parts = file.relative_to(package.parent).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def main(distribution: Path) -> None:
    """Exit with a sentence for what is missing or was not imported from the installation."""
    for package in sorted((distribution / "src").iterdir()):
        installed = Path(importlib.import_module(package.name).__path__[0])
        if installed.is_relative_to(distribution.resolve()):
            sys.exit(f"{package.name} was imported from {installed}, not from its wheel")
        for file in package.rglob("*"):
            counterpart = installed / file.relative_to(package)
            if "__pycache__" not in file.parts and not counterpart.exists():
                sys.exit(f"the wheel lacks {file}")
        for name in modules(package):
            importlib.import_module(name)
            print(f"imported {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
