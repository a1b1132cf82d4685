"""The figures of a calibration as tables in Markdown, as docs/calibration.md shows them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .measure import Measurement

TENSORS = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")
STATISTICS = ("z_row", "z_max", "z_global")
EXAMPLES = 5

Group = tuple[str, str, str]


def summary(measured: Iterable[Measurement]) -> str:
    """Worst ratios by kernel, instruction set and dtype; room by term; examples of deviations."""
    groups: dict[Group, list[Measurement]] = {}
    for m in measured:
        groups.setdefault((m.kernel, m.instructions, m.dtype), []).append(m)
    if not groups:
        return "nothing was measured"
    parts = [_worst(groups), _room(groups), _unusual(groups)]
    return "\n\n".join(part for part in parts if part)


def record(measured: Iterable[Measurement], environments: Sequence[Any]) -> dict[str, Any]:
    """The same figures as plain values, with what they were measured on."""
    groups: dict[Group, list[Measurement]] = {}
    for m in measured:
        groups.setdefault((m.kernel, m.instructions, m.dtype), []).append(m)
    distinct = {json.dumps(e, sort_keys=True): e for e in environments}
    return {
        "what": "share of the error budget that honest kernels use on random problems: "
        "python -m attnproof.calibration",
        "environments": list(distinct.values()),
        "results": [
            {
                "kernel": kernel,
                "on": on,
                "dtype": dtype,
                "problems": dict(sorted(Counter(m.status for m in found).items())),
                "worst_error_over_budget": _maxima(TENSORS, [m.worst for m in found]),
                "worst_statistic_over_limit": _maxima(STATISTICS, [m.statistics for m in found]),
                "no_answer": {
                    m.problem: f"{m.status}: {m.reason}"
                    for m in found
                    if m.status in ("crashed", "timed out")
                },
            }
            for (kernel, on, dtype), found in sorted(groups.items())
        ],
    }


def _maxima(names: Iterable[str], found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        name: round(max(values[name] for values in found if name in values), 3)
        for name in names
        if any(name in values for values in found)
    }


def _worst(groups: dict[Group, list[Measurement]]) -> str:
    head = ["kernel", "on", "dtype", "problems", "deviate", *TENSORS]
    head += [f"{name} (of limit)" for name in STATISTICS]
    rows = []
    for (kernel, on, dtype), found in sorted(groups.items()):
        judged = [m for m in found if m.status in ("conforms", "deviates")]
        deviating = sum(m.status == "deviates" for m in judged)
        row = [kernel, on, dtype, str(len(judged)), str(deviating)]
        row += [_largest(judged, lambda m, name=name: m.worst.get(name)) for name in TENSORS]  # type: ignore[misc]
        for name in STATISTICS:
            value = _largest(judged, lambda m, name=name: m.values.get(name))  # type: ignore[misc]
            share = _largest(judged, lambda m, name=name: m.statistics.get(name))  # type: ignore[misc]
            row.append(f"{value} ({share})" if value != "–" else "–")
        rows.append(row)
    return _table(head, rows)


def _room(groups: dict[Group, list[Measurement]]) -> str:
    """By tensor and term: the largest ratio where the term gives at least half of the bound."""
    dtypes = sorted({dtype for _, _, dtype in groups})
    found: dict[tuple[str, str, str, str], float] = {}
    for (kernel, _, dtype), group in groups.items():
        for m in group:
            for tensor, terms in m.room.items():
                for term, ratio in terms.items():
                    key = (kernel, tensor, term, dtype)
                    found[key] = max(found.get(key, 0.0), ratio)
    rows = []
    for kernel, tensor, term in sorted(
        {key[:3] for key in found}, key=lambda k: (k[0], TENSORS.index(k[1]), k[2])
    ):
        ratios = [found.get((kernel, tensor, term, dtype)) for dtype in dtypes]
        rows.append([kernel, tensor, term, *("–" if r is None else f"{r:.2f}" for r in ratios)])
    return _table(["kernel", "tensor", "dominating term", *dtypes], rows) if rows else ""


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


def _largest(found: Sequence[Measurement], of: Callable[[Measurement], float | None]) -> str:
    values = [value for m in found if (value := of(m)) is not None]
    return f"{max(values):.2f}" if values else "–"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
