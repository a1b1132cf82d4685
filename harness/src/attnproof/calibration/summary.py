"""The figures of a calibration as tables in Markdown, as docs/calibration.md shows them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .measure import Measurement

TENSORS = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")
STATISTICS = ("z_row", "z_max", "z_global")
EXAMPLES = 5

Group = tuple[str, str, str]
Result = dict[str, Any]  # of one group, as the file holds it


def summary(measured: Sequence[Measurement]) -> str:
    """Worst ratios by kernel, instruction set and dtype; room by term; examples of deviations."""
    if not measured:
        return "nothing was measured"
    found = results(measured)
    parts = [*(table(found) for table in TABLES.values()), _unusual(_groups(measured))]
    return "\n\n".join(part for part in parts if part)


def record(measured: Sequence[Measurement], environments: Sequence[Any]) -> dict[str, Any]:
    """The same figures as plain values, with what they were measured on."""
    distinct = {json.dumps(e, sort_keys=True): e for e in environments}
    return {
        "what": "share of the error budget that honest kernels use on random problems: "
        "python -m attnproof.calibration",
        "environments": list(distinct.values()),
        "results": results(measured),
    }


def results(measured: Iterable[Measurement]) -> list[Result]:
    """The figures of each kernel, instruction set and dtype."""
    return [
        {
            "kernel": kernel,
            "on": on,
            "dtype": dtype,
            "problems": dict(sorted(Counter(m.status for m in found).items())),
            "worst_error_over_budget": _maxima([m.worst for m in found], TENSORS),
            "room": {
                tensor: room
                for tensor in TENSORS
                if (room := _maxima([m.room.get(tensor, {}) for m in found]))
            },
            "largest_statistic": _maxima([m.values for m in found], STATISTICS),
            "worst_statistic_over_limit": _maxima([m.statistics for m in found], STATISTICS),
            "no_answer": {
                m.problem: f"{m.status}: {m.reason}"
                for m in found
                if m.status in ("crashed", "timed out")
            },
        }
        for (kernel, on, dtype), found in sorted(_groups(measured).items())
    ]


def _groups(measured: Iterable[Measurement]) -> dict[Group, list[Measurement]]:
    groups: dict[Group, list[Measurement]] = {}
    for m in measured:
        groups.setdefault((m.kernel, m.instructions, m.dtype), []).append(m)
    return groups


def _maxima(
    found: Iterable[Mapping[str, float]], names: Iterable[str] | None = None
) -> dict[str, float]:
    """The largest value of each name, in the order of ``names``, or else of the alphabet."""
    largest: dict[str, float] = {}
    for values in found:
        for name, value in values.items():
            largest[name] = max(largest.get(name, value), value)
    order = sorted(largest) if names is None else names
    return {name: round(largest[name], 3) for name in order if name in largest}


def _worst(found: Sequence[Result]) -> str:
    head = ["kernel", "on", "dtype", "problems", "deviate", *TENSORS]
    head += [f"{name} (of limit)" for name in STATISTICS]
    rows = []
    for one in found:
        deviating = one["problems"].get("deviates", 0)
        judged = one["problems"].get("conforms", 0) + deviating
        row = [one["kernel"], one["on"], one["dtype"], str(judged), str(deviating)]
        row += [_shown(one["worst_error_over_budget"].get(name)) for name in TENSORS]
        for name in STATISTICS:
            share = _shown(one["worst_statistic_over_limit"].get(name))
            value = _shown(one.get("largest_statistic", {}).get(name))
            row.append("–" if share == "–" else f"{value} ({share})")
        rows.append(row)
    return _table(head, rows)


def _room(found: Sequence[Result]) -> str:
    """By tensor and term: the largest ratio where the term gives at least half of the bound, over
    all instruction sets. Files from before this was kept have none."""
    largest: dict[tuple[str, str, str], dict[str, float]] = {}
    for one in found:
        for tensor, terms in one.get("room", {}).items():
            for term, ratio in terms.items():
                row = largest.setdefault((one["kernel"], tensor, term), {})
                row[one["dtype"]] = max(row.get(one["dtype"], ratio), ratio)
    dtypes = sorted({dtype for row in largest.values() for dtype in row})
    order = sorted(largest, key=lambda k: (k[0], TENSORS.index(k[1]), k[2]))
    rows = [[*key, *(_shown(largest[key].get(dtype)) for dtype in dtypes)] for key in order]
    return _table(["kernel", "tensor", "dominating term", *dtypes], rows) if rows else ""


TABLES: dict[str, Callable[[Sequence[Result]], str]] = {"worst": _worst, "room": _room}


def _unusual(groups: dict[Group, list[Measurement]]) -> str:
    """What did not conform, or could not be judged: how often and for example."""
    lines = []
    for (kernel, on, dtype), found in sorted(groups.items()):
        for status in ("deviates", "crashed", "timed out", "vacuous", "raised", "skipped"):
            some = [m for m in found if m.status == status]
            if not some:
                continue
            lines.append(f"{kernel} {on} {dtype}: {len(some)} {status}")
            if status != "skipped":
                lines += [f"  {m.problem}: {m.reason[:300]}" for m in some[:EXAMPLES]]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
