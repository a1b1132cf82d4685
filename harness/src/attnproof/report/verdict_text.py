"""A case that does not conform, in full, as text of up to 100 columns."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..options import Options
from ..verdict import Status, Verdict

WIDTH = 100
FINDINGS = 8  # written out at most
FINDINGS_IN_GIST = 3
# Options that a replay must be given too.
REPLAYED = ("signature", "precision", "device", "seed", "timeout", "in_process")


def verdict_text(
    case_id: str, verdict: Verdict | Mapping[str, Any], options: Options, width: int = WIDTH
) -> str:
    """What deviates, where, by how much, what it looks like, and how to see it again.

    ``verdict`` may be ``Verdict.as_dict()``, as records hold it. Sentences are broken at
    ``width``, commands never are.
    """
    values = verdict.as_dict() if isinstance(verdict, Verdict) else verdict
    parts = [case_id]
    guesses = values["looks_like"] or [""]
    parts.append(_wrapped(": ".join(filter(None, [values["status"], guesses[0]])), width, ""))
    parts += [_wrapped(f"or: {guess}", width) for guess in guesses[1:]]
    parts += _findings(values, width)
    if values["status"] == Status.CONFORMS and values["worst"]:
        worst = ", ".join(f"{name} {float(x):.2g}" for name, x in values["worst"].items())
        parts.append(_wrapped(f"largest error over its budget: {worst}", width))
    if values["statistics"] and values["status"] == Status.DEVIATES:
        parts.append(_wrapped(statistics_text(values["statistics"]), width))
    if values["heat_map"]:
        parts.append(values["heat_map"])
    if values["conforms_under"]:
        name = values["conforms_under"]
        text = f"It would conform under precision {name}: --precision {name}"
        parts.append(_wrapped(text, width, ""))
    parts.append(f"replay: {replay_command(case_id, options)}")
    return "\n".join(part for part in parts if part)


def told_findings(findings: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those worth telling: a tensor that is wrong element by element has wrong statistics too."""

    def statistical(finding: Mapping[str, Any]) -> bool:
        return str(finding["rule"]).endswith("statistic")

    by_element = {f["tensor"] for f in findings if not statistical(f)}
    return [f for f in findings if not (statistical(f) and f["tensor"] in by_element)]


def gist(verdict: Mapping[str, Any]) -> str:
    """What a failing case has in common with others, in a few words: what it looks like without
    tensors and numbers, or the rules that it breaks, or how it ended."""
    if verdict["looks_like"]:
        guess = re.sub(r"^.*? equals? ", "", verdict["looks_like"][0])
        guess = re.sub(r", in the rows that deviate .*$", "", guess)
        return re.sub(r" \([^()]*(\([^()]*\)[^()]*)*\)$", "", guess)
    if verdict["findings"]:
        broken = {f"{f['tensor']} ({f['rule']})": None for f in verdict["findings"]}
        return f"{verdict['status']}: {', '.join(list(broken)[:FINDINGS_IN_GIST])}"
    return (str(verdict["reason"]).splitlines() or [str(verdict["status"])])[0]


def replay_command(case_id: str, options: Options) -> str:
    """The command that runs this case alone."""
    words = ["attnproof", "replay", case_id, "--target", options.target]
    if options.model is not None:  # of which only the whole can be run again
        words = ["attnproof", "check", options.target, "--model", options.model]
    defaults = Options(target=options.target)
    for name in REPLAYED:
        value = getattr(options, name)
        if value == getattr(defaults, name):
            continue
        flag = "--" + name.replace("_", "-")
        words += (
            [flag] if value is True else [flag, f"{value:g}" if name == "timeout" else str(value)]
        )
    return shlex.join(words)


def statistics_text(statistics: Mapping[str, float]) -> str:
    """The z values with their limits, in a line."""
    named = [name for name in statistics if not name.endswith("_limit")]
    return ", ".join(
        f"{name} {statistics[name]:.3g}"
        + (f" (limit {statistics[f'{name}_limit']:.3g})" if f"{name}_limit" in statistics else "")
        for name in named
    )


def _findings(values: Mapping[str, Any], width: int) -> list[str]:
    """The findings, or the reason where there are none (a crash, say), wrapped."""
    findings = values["findings"]
    if not findings:
        return [_wrapped(line, width) for line in str(values["reason"]).splitlines()]
    told = told_findings(findings)
    lines = [_wrapped(f"{f['rule']}: {f['message']}", width) for f in told[:FINDINGS]]
    if len(told) > FINDINGS:
        lines.append(f"  and {len(told) - FINDINGS} more findings")
    return lines


def _wrapped(text: str, width: int, indent: str = "  ") -> str:
    return textwrap.fill(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
