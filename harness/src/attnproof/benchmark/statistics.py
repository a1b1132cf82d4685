"""The statistics of pytest-benchmark, under its names, of the times of one measurement.

Source: https://pytest-benchmark.readthedocs.io, and its stats.py: quartiles are the medians of
the halves (with interpolation where the count is odd), outliers as Tukey has them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def summary(seconds: Sequence[float], iterations: int) -> dict[str, Any]:
    """Of one number or more; seconds, and calls per second (``ops``)."""
    data = sorted(seconds)
    mean, total = statistics.mean(data), sum(data)
    stddev = statistics.stdev(data) if len(data) > 1 else 0.0
    q1, q3 = _quartiles(data)
    iqr = q3 - q1
    low, high = q1 - 1.5 * iqr, q3 + 1.5 * iqr
    beyond_stddev = sum(not mean - stddev <= value <= mean + stddev for value in data)
    beyond_iqr = sum(not low <= value <= high for value in data)
    return {
        "min": data[0],
        "max": data[-1],
        "mean": mean,
        "stddev": stddev,
        "rounds": len(data),
        "median": statistics.median(data),
        "iqr": iqr,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": beyond_iqr,
        "stddev_outliers": beyond_stddev,
        "outliers": f"{beyond_stddev};{beyond_iqr}",
        "ld15iqr": next(value for value in data if value >= low),
        "hd15iqr": next(value for value in reversed(data) if value <= high),
        "ops": len(data) / total,
        "total": total,
        "data": list(seconds),
        "iterations": iterations,
    }


def _quartiles(data: Sequence[float]) -> tuple[float, float]:
    count = len(data)
    if count == 1:
        return data[0], data[0]
    if count % 2 == 0:
        return statistics.median(data[: count // 2]), statistics.median(data[count // 2 :])
    n = count // 4
    if count % 4 == 1:
        return (
            0.25 * data[n - 1] + 0.75 * data[n],
            0.75 * data[3 * n] + 0.25 * data[3 * n + 1],
        )
    return (
        0.75 * data[n] + 0.25 * data[n + 1],
        0.25 * data[3 * n + 1] + 0.75 * data[3 * n + 2],
    )
