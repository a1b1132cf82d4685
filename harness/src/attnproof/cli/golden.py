"""``attnproof golden verify|update``."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from ..report.summary import Exit, plural
from .common import progress_console, stop

GOLDEN = Path("golden")
KINDS = ("vectors", "traffic")

golden = typer.Typer(
    help="The checked-in truth: recompute and compare it, or rewrite what changed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Directory = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DIRECTORY]",
        help="Vectors, or traffic if it is called that. Without it: all of golden/.",
        show_default=False,
    ),
]


@golden.command()
def verify(directory: Directory = None) -> None:
    """Recompute and compare; exit status 1 when something differs."""
    differ = False
    for folder, kind in _folders(directory):
        if not folder.is_dir():
            stop(f"golden verify: {folder}: no such directory")
        with progress_console().status(f"recomputing {folder}"):
            differences = kind.verify(folder)
        for difference in differences:
            typer.echo(difference)
        if differences:
            typer.echo(f"differs: {plural(len(differences), 'difference')} in {folder}")
        else:
            typer.echo(f"agrees: {folder}")
        differ = differ or bool(differences)
    if differ:
        raise typer.Exit(int(Exit.DOES_NOT))


@golden.command()
def update(directory: Directory = None) -> None:
    """Rewrite what no longer agrees, and say what."""
    for folder, kind in _folders(directory):
        try:
            with progress_console().status(f"recomputing {folder}"):
                changes = kind.update(folder)
        except OSError as error:
            stop(f"golden update: {folder}: {error.strerror}")
        for change in changes:
            typer.echo(change)
        typer.echo(f"{plural(len(changes), 'change')} in {folder}")


def _folders(directory: Path | None) -> list[tuple[Path, ModuleType]]:
    """Each folder with the module that verifies and updates its kind."""
    from ..golden import traffic, vectors  # import torch, which --help can do without

    modules = {"vectors": vectors, "traffic": traffic}
    if directory is None:
        return [(GOLDEN / kind, modules[kind]) for kind in KINDS]
    return [(directory, modules["traffic" if directory.name == "traffic" else "vectors"])]
