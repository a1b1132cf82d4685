"""A run as JSON that pytest-benchmark reads: its storage, ``compare`` and histograms work on it.

Beside what that format has, ``run`` says what must be the same for a run to be gone on with, and
``not_measured`` holds the targets and cells that have no times, with the reasons.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..environment import environment
from ..record import json_values
from ..writing import replace_file
from .measurement import Ended, Measurement
from .statistics import summary

VERSION = "5.0.0"  # of pytest-benchmark, whose format this is


class StorageError(Exception):
    """A file holds no benchmark, or one of another run; the message is one line."""


def write(path: Path, run: Mapping[str, Any], measurements: Iterable[Measurement]) -> None:
    """Write the whole file, a line for each measurement, or raise OSError."""
    parts = []
    for name, value in json_values(document(run, measurements)).items():
        if name in ("benchmarks", "not_measured"):
            lines = ",\n".join(json.dumps(one, allow_nan=False) for one in value)
            parts.append(f'"{name}": [\n{lines}\n]')
        else:
            parts.append(f'"{name}": {json.dumps(value, allow_nan=False)}')
    replace_file(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def document(run: Mapping[str, Any], measurements: Iterable[Measurement]) -> dict[str, Any]:
    """The file as plain values."""
    found = environment()
    every = list(enumerate(measurements))
    return {
        "machine_info": machine_info(found),
        "commit_info": _commit_info(found),
        "benchmarks": [_benchmark(n, m) for n, m in every if m.ended is Ended.MEASURED],
        "datetime": datetime.now(UTC).isoformat(),
        "version": VERSION,
        "run": dict(run),
        "not_measured": [_values(n, m) for n, m in every if m.ended is not Ended.MEASURED],
    }


def machine_info(found: Mapping[str, Any]) -> dict[str, Any]:
    """What pytest-benchmark says of a machine, its name left out, and GPU, driver and libraries."""
    gpu = found["gpus"][0] if found["gpus"] else {}
    return {
        "node": "",
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_compiler": platform.python_compiler(),
        "python_implementation": platform.python_implementation(),
        "python_implementation_version": platform.python_version(),
        "python_version": found["python"],
        "python_build": list(platform.python_build()),
        "release": platform.release(),
        "system": platform.system(),
        "cpu": {"brand_raw": found["cpu"]["model"], "count": found["cpu"]["cores"]},
        "gpu": gpu.get("name"),
        "driver": gpu.get("driver"),
        "cuda": gpu.get("cuda"),
        **{name: found["versions"].get(name) for name in ("torch", "triton")},
        "attnproof": dict(found),
    }


def read(path: Path) -> tuple[dict[str, Any], list[Measurement]]:
    """What a file holds: of which run, and its measurements; StorageError if it is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = [
            (
                one["extra_info"],
                tuple(float(t) for t in one["stats"]["data"]),
                int(one["stats"]["iterations"]),
            )
            for one in values["benchmarks"]
        ]
        found += [(one, (), 1) for one in values["not_measured"]]
        found.sort(key=lambda one: int(one[0].pop("number")))
        return dict(values["run"]), [Measurement.from_dict(*one) for one in found]
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(f"{path}: is no file that attnproof bench has written") from None


def resume(path: Path, run: Mapping[str, Any]) -> list[Measurement]:
    """The measurements of a file, empty if there is none; StorageError when it is of another run,
    saying in what they differ."""
    if not path.exists():
        return []
    before, measurements = read(path)
    for name in run:
        if before.get(name) != json_values(run[name]):
            raise StorageError(
                f"{path}: is of a run with {name} {_shown(before.get(name))}, "
                f"not {_shown(run[name])}; it cannot be resumed with this one"
            )
    return measurements


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _values(number: int, measurement: Measurement) -> dict[str, Any]:
    """All but the times, and the place in the order of the run."""
    return {**measurement.as_dict(), "number": number}


def _benchmark(number: int, measurement: Measurement) -> dict[str, Any]:
    """One entry: targets are compared within a group, which is a cell."""
    cell = measurement.cell
    name = f"{measurement.target}[{cell.name}]"
    return {
        "group": f"{cell.suite} {cell.name}",
        "name": name,
        "fullname": f"{cell.suite}::{name}",
        "params": {"target": measurement.target, **cell.as_dict()},
        "param": cell.name,
        "extra_info": _values(number, measurement),
        "options": {"disable_gc": True, "warmup": True, "timer": cell.clock},
        "stats": summary(measurement.seconds, measurement.iterations),
    }


def _commit_info(found: Mapping[str, Any]) -> dict[str, Any]:
    """pytest-benchmark's fields, as far as ``environment`` knows them."""
    commit = found["commit"] or "unversioned"
    return {
        "id": commit.removesuffix("+"),
        "time": None,
        "author_time": None,
        "dirty": commit.endswith("+"),
        "project": "attnproof",
        "branch": "(unknown)",
    }
