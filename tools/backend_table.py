"""Print the results of several backends as one Markdown table, backends across.

Usage: python tools/backend_table.py FOLDER [--by feature|chapter] [--judge] [--only NAME,NAME…]

The folder holds what ``attnproof check BACKEND --json FOLDER/BACKEND.json`` wrote. A cell is the
largest error over its budget (1 is the limit). With --judge the exit status is 1 when a backend
does not conform or none could be judged.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CONFORMS, NOT_JUDGED = 0, 3  # exit status of ``attnproof check``
FAILED = ("deviates", "crashed", "timed out")

Case = dict[str, Any]


def cell(cases: Iterable[Case]) -> str:
    """What the cases of one row say of one backend."""
    shown = [case for case in cases if case["verdict"] in ("conforms", "vacuous", *FAILED)]
    conforming = [case for case in shown if case["verdict"] == "conforms"]
    deviating = [case for case in shown if case["verdict"] in FAILED]
    known = [case for case in deviating if case["known_deviation"]]
    if len(known) < len(deviating):
        return f"**{len(deviating) - len(known)} of {len(shown)} fail**"
    if known:
        return f"{len(known)} of {len(shown)} known"
    if conforming:
        errors = [float(case["worst"]) for case in conforming if case["worst"] is not None]
        return f"{max(errors):.2f}" if errors else "✓"
    return "not shown" if shown else "–"


def table(results: dict[str, dict[str, Any]], by: str) -> list[list[str]]:
    """The cells, a header first; ``by`` is the field of a case that makes the rows."""
    rows = sorted({case[by] for result in results.values() for case in result["cases"]})
    lines = [[by, *results]]
    for row in rows:
        of_row = ([c for c in result["cases"] if c[by] == row] for result in results.values())
        lines.append([row, *map(cell, of_row)])
    lines.append(["cases judged", *(str(judged(result)) for result in results.values())])
    return [*lines, ["verdict", *(str(r["summary"]["verdict"]) for r in results.values())]]


def judged(result: dict[str, Any]) -> int:
    """Cases that showed something."""
    return sum(case["verdict"] in ("conforms", *FAILED) for case in result["cases"])


def markdown(lines: list[list[str]]) -> str:
    """Aligned, so that it can be read as it is."""
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = (
        [line[0].ljust(widths[0]), *(t.rjust(w) for t, w in zip(line[1:], widths[1:], strict=True))]
        for line in (lines[0], rule, *lines[1:])
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def keep(file: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write what the results say of whole backends; of others the file keeps what it says."""
    kept = json.loads(file.read_text("utf-8"))["backends"] if file.exists() else {}
    for name, result in results.items():
        summary = {key: result["summary"][key] for key in ("verdict", "line", "counts")}
        kept[name] = {
            "environment": result["environment"],
            "level": result["run"]["level"],
            **summary,
            "features": result["features"],
        }
    what = "verdicts of attnproof check by backend and feature; seconds are summed over processes"
    text = json.dumps({"what": what, "backends": dict(sorted(kept.items()))}, indent=1)
    file.write_text(text + "\n", "utf-8")


def main(
    folder: Path, by: str, judge: bool, only: str | None = None, write: Path | None = None
) -> None:
    """Print the table and why a backend could not be judged."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in files}
    results = {name: result for name, result in found.items() if "cases" in result}
    if only is not None:
        chosen = only.split(",")
        if missing := [name for name in chosen if name not in results]:
            sys.exit(f"--only {missing[0]}: there are results of {', '.join(results) or 'none'}")
        results = {name: results[name] for name in chosen}
    if not results:
        sys.exit(f"{folder}: no results; run python -m nox -s check")
    print(markdown(table(results, by)))
    if write is not None:
        keep(write, results)
    statuses = {name: result["summary"]["exit_status"] for name, result in results.items()}
    for name, status in statuses.items():
        if status == NOT_JUDGED:
            print(f"\n{name}: {results[name]['summary']['line']}")
    bad = [name for name, status in statuses.items() if status not in (CONFORMS, NOT_JUDGED)]
    if judge and (bad or CONFORMS not in statuses.values()):
        sys.exit(f"\ndo not conform: {', '.join(bad)}" if bad else "\nno backend could be judged")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Results of several backends as one table.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--by", choices=("feature", "chapter"), default="feature")
    parser.add_argument("--judge", action="store_true")
    parser.add_argument("--only", metavar="NAME,NAME…", help="these backends, in this order")
    parser.add_argument("--write", type=Path, metavar="FILE", help="keep verdicts by feature there")
    main(**vars(parser.parse_args()))
