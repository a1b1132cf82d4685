"""``attnproof doctor``: what there is here, what runs, and what to do about what does not."""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from ..options import DEVICES
from .common import Device, Json, broken_pipe_is_fine, console, pairs, stop

if TYPE_CHECKING:
    from rich.console import Console


def doctor(device: Device = "auto", json: Json = False) -> None:
    """GPU, driver, torch, compilers, which backends run here or why not, and the remedy.

    Takes less than 10 s: what does not answer in time is said to. Put it into bug reports.
    """
    if device not in DEVICES:
        stop(f"--device {device}: unknown; accepted are {', '.join(DEVICES)}")
    from ..doctor import examine

    report = examine(device)
    if json:
        typer.echo(json_module.dumps(report, indent=1))
        return
    with broken_pipe_is_fine():
        _tell(console(), report)


def _tell(out: Console, report: dict[str, object]) -> None:
    from ..doctor.text import remedies, sections

    for section in sections(report):
        pairs(out, section)
        out.print()
    for name, command in remedies(report):
        out.print(Text(f"to get {name}:", style="bold"))
        out.print(f"  {command}", markup=False, soft_wrap=True)
        out.print()
    for finding in report["findings"] or ["nothing odd"]:  # type: ignore[attr-defined]
        out.print(f"- {finding}", markup=False, soft_wrap=True)
