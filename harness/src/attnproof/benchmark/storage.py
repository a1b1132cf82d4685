"""Results in the JSON of pytest-benchmark, for its storage, ``compare`` and histograms.

Statistics are computed as it does: quartiles are medians of the halves, outliers lie beyond 1.5
interquartile ranges or a standard deviation.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from .rounds import Measured
from .run import Run
from .suites import SUITES, Cell
from .work import flops, moved_bytes

VERSION = "5.2.3"  # of pytest-benchmark, whose form this is


def stored(run: Run) -> dict[str, Any]:
    """The whole run. Failed and skipped measurements are in ``attnproof``, which pytest-benchmark
    does not read."""
    cells = {cell.id: cell for cell in SUITES[run.suite](run.dtype)}
    good = [m for m in run.measured.values() if m.seconds and m.failed is None]
    gpus = run.environment.get("gpus") or []
    return {
        "machine_info": {
            "node": platform.node(),
            "processor": platform.processor(),
            "machine": platform.machine(),
            "python_version": platform.python_version(),
            "system": platform.system(),
            "release": platform.release(),
            "cpu": {"brand_raw": run.environment.get("cpu", {}).get("model", "")},
            "gpu": gpus[0] if gpus else None,
            "versions": run.environment.get("versions", {}),
        },
        "commit_info": {"id": run.environment.get("commit"), "project": "attnproof"},
        "benchmarks": [benchmark(cells[m.cell], m) for m in good],
        "datetime": datetime.now(UTC).isoformat(),
        "version": VERSION,
        "attnproof": {
            "run": run.settings,
            "environment": run.environment,
            "ceilings": run.ceilings,
            "first_results": run.first_results,
            "unloadable": run.unloadable,
            "others": [
                {k: v for k, v in m.as_dict().items() if k != "seconds"}
                for m in run.measured.values()
                if m not in good
            ],
        },
    }


def benchmark(cell: Cell, one: Measured) -> dict[str, Any]:
    """One measurement. Its group is the cell, its name the peer\'s."""
    p = cell.problem
    return {
        "group": cell.id,
        "name": f"{one.peer}[{cell.id}]",
        "fullname": f"bench::{one.peer}[{cell.id}]",
        "params": {"peer": one.peer, "direction": cell.direction, "problem": p.id},
        "param": one.peer,
        "extra_info": {
            "flops": flops(cell),
            "bytes": moved_bytes(cell),
            "first_call": one.first_call,
            "judged": one.judged,
            "clock": "host" if cell.wall else "device",
        },
        "options": {
            "disable_gc": False,
            "timer": "host" if cell.wall else "device",
            "min_rounds": len(one.seconds),
            "max_time": 0.0,
            "min_time": 0.0,
            "warmup": True,
        },
        "stats": stats(one.seconds),
    }


def stats(seconds: Sequence[float]) -> dict[str, Any]:
    """What pytest-benchmark says of some seconds."""
    data = sorted(seconds)
    mean, median = statistics.fmean(data), statistics.median(data)
    deviation = statistics.stdev(data) if len(data) > 1 else 0.0
    half = len(data) // 2
    q1 = statistics.median(data[:half] or data)
    q3 = statistics.median(data[len(data) - half :] or data)
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    beyond = sum(not low <= value <= high for value in data)
    far = sum(abs(value - mean) > deviation for value in data)
    return {
        "min": data[0],
        "max": data[-1],
        "mean": mean,
        "stddev": deviation,
        "rounds": len(data),
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": beyond,
        "stddev_outliers": far,
        "outliers": f"{far};{beyond}",
        "ld15iqr": next(value for value in data if value >= low),
        "hd15iqr": next(value for value in reversed(data) if value <= high),
        "ops": 1 / mean,
        "total": sum(data),
        "data": list(seconds),
        "iterations": 1,
    }
