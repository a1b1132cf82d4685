"""One self-contained HTML page about a run: nothing is fetched, plots are inside as SVG."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .. import environment
from ..diagnosis.heat_map import SHADES
from ..options import Options
from ..record import CaseRecord
from ..verdict import Status
from ..writing import replace_file
from .plots import by_tensor, features
from .summary import FAILED, Summary, worst_of
from .table import count_columns, number
from .verdict_text import replay_command, statistics_text, told_findings

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "index.html"
IN_FULL = 100  # failing cases that are shown with their heat map


def write_report(
    directory: Path,
    options: Options,
    summary: Summary,
    records: Sequence[CaseRecord],
    found: Mapping[str, Any],
    smallest: Mapping[str, str] | None = None,
) -> Path:
    """Write the page of a run into ``directory`` and return its path; OSError when it cannot be.

    ``found`` is the environment (``environment.environment()``), ``smallest`` the smallest case
    that fails like another, by the id of that.
    """
    failing = _in_order([r for r in records if r.known is None and r.status in FAILED], summary)
    loader = jinja2.FileSystemLoader(TEMPLATES)
    page = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page.filters["number"] = number
    text = page.get_template("report.html").render(
        options=options,
        summary=summary,
        columns=count_columns(summary),
        environment=environment.lines(dict(found)),
        shades=SHADES,
        plots=[Markup(plot) for plot in (by_tensor(records), features(summary)) if plot],
        failing=[_failing(record, options, smallest or {}) for record in failing[:IN_FULL]],
        left_out=len(failing[IN_FULL:]),
        known=[record for record in records if record.known is not None],
        cases=[_case(record) for record in sorted(records, key=lambda r: r.id)],
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PAGE
    replace_file(path, text.encode())
    return path


def coloured(heat_map: str) -> Markup:
    """A heat map as HTML in which every shade is a coloured cell; the legend is left out."""
    colours = {shade.glyph: shade.colour for shade in SHADES}
    row = re.compile(rf"( *\S+  )([ {''.join(map(re.escape, colours))}]+)")
    lines = []
    for line in heat_map.splitlines():
        if SHADES[-1].meaning in line:
            continue
        if found := row.fullmatch(line):
            cells = "".join(_cell(c, colours.get(c)) for c in found[2])
            lines.append(html.escape(found[1]) + cells)
        else:
            lines.append(html.escape(line))
    return Markup("\n".join(lines))


def _cell(glyph: str, colour: str | None) -> str:
    if colour is None:
        return glyph
    return f'<span style="background:{colour};color:{colour}">{glyph}</span>'


def _in_order(failing: Sequence[CaseRecord], summary: Summary) -> list[CaseRecord]:
    """A case of each feature first, the features as in the verdict line, then the others."""
    place = {row.feature: n for n, row in enumerate(summary.failing)}
    met: Counter[str] = Counter()
    ranked: list[tuple[bool, int, int, CaseRecord]] = []
    for record in failing:
        ranked.append((met[record.feature] > 0, place[record.feature], len(ranked), record))
        met[record.feature] += 1
    return [record for *_, record in sorted(ranked, key=lambda item: item[:3])]


def _failing(record: CaseRecord, options: Options, smallest: Mapping[str, str]) -> dict[str, Any]:
    verdict = record.verdict
    statistics = verdict.get("statistics", {}) if record.status == Status.DEVIATES else {}
    return {
        "record": record,
        "reason": verdict.get("reason", ""),
        "findings": told_findings(verdict.get("findings", [])),
        "looks_like": verdict.get("looks_like", []),
        "conforms_under": verdict.get("conforms_under"),
        "heat_map": coloured(verdict.get("heat_map", "")),
        "statistics": statistics_text(statistics),
        "command": replay_command(record.id, options),
        "smallest": replay_command(smallest[record.id], options) if record.id in smallest else "",
    }


def _case(record: CaseRecord) -> dict[str, Any]:
    reason = str(record.verdict.get("reason", "")).splitlines()
    return {
        "id": record.id,
        "feature": record.feature,
        "status": "known deviation" if record.known is not None else record.status,
        "worst": number(worst_of(record)),
        "seconds": f"{record.seconds:.2f}",
        "reason": reason[0] if reason else "",
    }
