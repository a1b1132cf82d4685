"""``attnproof list`` and ``explain``: commands that look and judge nothing."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from ..options import DEVICES, resolved_device
from ..report.summary import Exit
from .common import Device, Json, broken_pipe_is_fine, console, stop

if TYPE_CHECKING:
    from ..backend import Capabilities
    from ..listing import Check, Listed


def list_(device: Device = "auto", json: Json = False) -> None:
    """Registered backends, whether they run here and what they support; chapters and checks."""
    from ..listing import backends, catalogue  # imports torch, which --help can do without

    listed, chapters = backends(_device(device)), catalogue()
    if json:
        typer.echo(json_module.dumps(_plain(listed, chapters), indent=1))
        return
    out = console()
    with broken_pipe_is_fine():
        out.print(_backend_table(listed))
        out.print(_chapter_table(chapters))


def explain(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="safetensors with q, k, v, out, … and the problem id."),
    ],
) -> None:
    """One saved computation: is its error honest, and by which term of the budget, why.

    The metadata of FILE holds the problem's id under "problem" and, if it is not that of a flash
    kernel, a precision profile under "precision". `attnproof replay --save FILE` writes one.
    """
    from ..explain import ExplainError
    from ..explain import explain as answer

    try:
        explanation = answer(file)
    except ExplainError as error:
        stop(f"explain: {error}")
    typer.echo(explanation.text)
    raise typer.Exit(int(Exit.CONFORMS if explanation.honest else Exit.DOES_NOT))


def _device(device: str) -> str:
    if device not in DEVICES:
        stop(f"--device {device}: unknown; accepted are {', '.join(DEVICES)}")
    return resolved_device(device)


def _backend_table(listed: list[Listed]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="backends", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("here")
    table.add_column("dtypes")
    table.add_column("features")
    for backend in listed:
        can = backend.description.capabilities if backend.description else None
        table.add_row(
            Text(backend.name, style="bold" if backend.problem is None else "dim"),
            Text(backend.problem or "yes"),
            " ".join(can.dtypes) if can else "",
            ", ".join(_abilities(can)) if can else "",
        )
    return table


def _abilities(can: Capabilities) -> list[str]:
    """The features, the LSE and the gradients that a backend supports."""
    named = sorted(can.features - {"gradients"})
    if can.returns_lse:
        named.append("LSE")
    if can.gradients:
        named.append(f"gradients of {' '.join(can.gradients)}")
    return named


def _chapter_table(chapters: dict[str, list[Check]]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="chapters",
        title_justify="left",
        show_footer=True,
    )
    every = [check for checks in chapters.values() for check in checks]
    table.add_column("chapter", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("what it shows")
    for level in ("quick", "full"):
        total = sum(check.cases[level] for check in every)
        table.add_column(level, justify="right", footer=str(total))
    for chapter, checks in chapters.items():
        for i, check in enumerate(checks):
            counts = [str(check.cases[level]) for level in ("quick", "full")]
            table.add_row("" if i else chapter, check.name, check.about, *counts)
    return table


def _plain(listed: list[Listed], chapters: dict[str, list[Check]]) -> dict[str, object]:
    return {
        "backends": [
            {
                "name": b.name,
                "source": b.source,
                "available": b.problem is None,
                "reason": b.problem,
                "capabilities": b.description.capabilities.as_dict() if b.description else None,
            }
            for b in listed
        ],
        "chapters": {
            chapter: [{"check": c.name, "about": c.about, "cases": c.cases} for c in checks]
            for chapter, checks in chapters.items()
        },
    }
