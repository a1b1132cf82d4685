"""``attnproof golden verify|update``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..report.summary import Exit, plural
from .common import stop

DIRECTORY = Path("golden/vectors")

golden = typer.Typer(
    help="The checked-in answers: recompute and compare them, or rewrite what changed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Directory = Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where the vectors are.")]


@golden.command()
def verify(directory: Directory = DIRECTORY) -> None:
    """Recompute every vector and compare; exit status 1 when something differs."""
    from ..golden.vectors import verify as compare

    if not directory.is_dir():
        stop(f"golden verify: {directory}: no such directory")
    differences = compare(directory)
    for difference in differences:
        typer.echo(difference)
    if differences:
        typer.echo(f"differs: {plural(len(differences), 'difference')} in {directory}")
        raise typer.Exit(int(Exit.DOES_NOT))
    typer.echo(f"agrees: {directory}")


@golden.command()
def update(directory: Directory = DIRECTORY) -> None:
    """Rewrite the vectors that no longer agree, and say which."""
    from ..golden.vectors import update as rewrite

    try:
        changes = rewrite(directory)
    except OSError as error:
        stop(f"golden update: {directory}: {error.strerror}")
    for change in changes:
        typer.echo(change)
    typer.echo(f"{plural(len(changes), 'change')} in {directory}")
