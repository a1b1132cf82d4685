"""Print what was found on GPUs, a Markdown table for each: features down, backends across.

Usage: python tools/gpu_table.py FILE… , such as golden/performance/conformance-*.json, which
``tools/backend_table.py --write`` made. A cell is the largest error over its budget (1 is the
limit), or how many of the cases fail in a way that a deviations file knows; – is not supported.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backend_table import markdown

WITHOUT = ("attnproof", "numpy", "safetensors", "pytest", "hypothesis")  # not of a GPU

Entry = dict[str, Any]


def cell(found: dict[str, Any] | None) -> str:
    """What a feature came to."""
    if found is None:
        return "–"
    shown = found["cases"] - found["unsupported"]
    failed = shown - found["conforms"] - found["vacuous"]
    if failed > found["known"]:
        return f"**{failed - found['known']} of {shown} fail**"
    if failed:
        return f"{failed} of {shown} known"
    if not found["conforms"]:
        return "–"
    return "✓" if found["worst"] is None else f"{float(found['worst']):.2f}"


def table(backends: dict[str, Entry]) -> str:
    """The cells of one GPU."""
    by_name = {
        name: {row["feature"]: row for row in entry["features"]} for name, entry in backends.items()
    }
    features = sorted({feature for rows in by_name.values() for feature in rows})
    lines = [["feature", *backends]]
    lines += [[f, *(cell(rows.get(f)) for rows in by_name.values())] for f in features]
    lines.append(["conform", *(f"{entry['counts']['conforms']:,}" for entry in backends.values())])
    level = max(entry["counts"]["cases"] for entry in backends.values())
    missing = [level - entry["counts"]["cases"] for entry in backends.values()]
    if any(missing):  # those of a run that was stopped
        lines.append(["not reached", *(f"{count:,}" if count else "–" for count in missing)])
    known = [sum(row["known"] for row in entry["features"]) for entry in backends.values()]
    lines.append(["known to fail", *(f"{count:,}" if count else "–" for count in known)])
    lines.append(["verdict", *(entry["verdict"] for entry in backends.values())])
    return markdown(lines)


def gpu_of(entry: Entry) -> str:
    """The GPU that a backend was judged on."""
    return str(entry["environment"]["gpus"][0]["name"])


def conditions(entries: Iterable[Entry]) -> str:
    """In which versions of everything the verdicts hold, each named once."""
    said: dict[str, set[str]] = {}
    for entry in entries:
        environment, gpu = entry["environment"], entry["environment"]["gpus"][0]
        said.setdefault("driver", set()).add(gpu["driver"])
        said.setdefault("CUDA", set()).add(gpu["cuda"])
        for library, version in environment["versions"].items():
            if not library.startswith(WITHOUT):
                said.setdefault(library, set()).add(version)
        said.setdefault("commit", set()).add(str(environment["commit"]))
        said.setdefault("date", set()).add(environment["date"])
    return ", ".join(f"{name} {' and '.join(sorted(values))}" for name, values in said.items())


def main(files: list[Path]) -> None:
    """Print them."""
    gpus: dict[str, dict[str, Entry]] = {}
    for file in files:
        for name, entry in json.loads(file.read_text("utf-8"))["backends"].items():
            gpus.setdefault(gpu_of(entry), {})[name] = entry
    for gpu, backends in gpus.items():
        levels = " and ".join(sorted({entry["level"] for entry in backends.values()}))
        print(f"**{gpu}**, level {levels} ({conditions(backends.values())}):\n")
        print(table(backends), end="\n\n")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    main([Path(name) for name in sys.argv[1:]])
