"""Print a Markdown page about a run on a GPU: the machine, the table, what was not run and why.

Usage: python tools/step_summary.py FOLDER

The folder holds doctor.json, the results of ``attnproof check`` as BACKEND.json, and, in a folder
golden, those of ``attnproof golden check``.
"""

import json
import sys
from pathlib import Path
from typing import Any

from backend_table import markdown, table

REASONS = 5  # of one backend


def machine(report: dict[str, Any]) -> list[str]:
    """The GPUs and what drives them, a line each."""
    hardware, torch = report["hardware"], report["torch"] or {}
    return [
        *(
            f"- {gpu['name']}, {gpu['sm']}, {gpu['multiprocessors']} SMs, {gpu['memory_gib']} GiB"
            for gpu in hardware["gpus"]
        ),
        f"- driver {hardware['driver']}, torch {torch.get('version')}, CUDA {torch.get('cuda')}",
    ]


def not_run(results: dict[str, dict[str, Any]]) -> list[str]:
    """For each backend how many cases were not run, and the most frequent reasons."""
    lines = []
    for name, result in results.items():
        summary = result["summary"]
        if summary["unavailable"]:
            lines.append(f"- **{name}** was not judged: {summary['unavailable']}")
        elif summary["not_run"]:
            counts = summary["counts"]
            lines.append(f"- **{name}**: {counts['unsupported']} of {counts['cases']}")
            lines += [
                f"  - {one['cases']}: {one['reason']}" for one in summary["not_run"][:REASONS]
            ]
            if left := sum(one["cases"] for one in summary["not_run"][REASONS:]):
                lines.append(f"  - {left}: for other reasons")
    return lines


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    """What was written for each backend."""
    found = {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
    }
    return {name: result for name, result in found.items() if "cases" in result}


def page(folder: Path) -> str:
    """The whole page."""
    lines = ["## attnproof on a GPU", ""]
    if (folder / "doctor.json").is_file():
        lines += machine(json.loads((folder / "doctor.json").read_text("utf-8")))
    results, golden = results_in(folder), results_in(folder / "golden")
    if results:
        lines += ["", "### Worst error over its budget, by chapter", "", ""]
        lines[-1] = markdown(table(results, "chapter"))
    if golden:
        lines += ["", "### Golden vectors", ""]
        lines += [f"- {name}: {found['summary']['line']}" for name, found in golden.items()]
    if reasons := not_run(results):
        lines += ["", "### Not run", "", *reasons]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(page(Path(sys.argv[1])))
