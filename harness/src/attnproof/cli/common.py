"""What the commands share: options, consoles, and how to stop with one clear line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..options import OptionError, Options, read_options
from ..report.summary import Exit

MAX_WIDTH = 100

Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A registered backend (see `attnproof list`), module:function or file.py:function.",
        show_default=False,
    ),
]
Signature = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="How the target is called: attnproof, sdpa or flash_attn."),
]
PrecisionName = Annotated[
    str | None,
    typer.Option(
        metavar="PROFILE", help="What it does to numbers inside, in place of what it declares."
    ),
]
# Named, where the metavar is the same word: typer 0.27 takes that for the name.
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Added to the seed of every case.")]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", help="Limit of a case.")]
InProcess = Annotated[
    bool,
    typer.Option(
        "--in-process",
        help="Run the target in this process, for debuggers, profilers and sanitizers.",
    ),
]


SkipBudget = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Exit with 1 when more cases than that are not run. [default: any number]",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Plain values for programs.")]


def console() -> Console:
    """For results: standard output, up to MAX_WIDTH columns."""
    return _console(sys.stdout)


def progress_console() -> Console:
    """For what passes: standard error, in a copy of it that pytest's capture does not catch."""
    try:
        stream = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # it is no file
        return _console(sys.stderr)
    return _console(stream)


def _console(stream: TextIO) -> Console:
    width = None if stream.isatty() else MAX_WIDTH
    made = Console(file=stream, width=width, highlight=False)
    made.width = min(made.width, MAX_WIDTH)
    return made


def stop(message: str, status: Exit = Exit.USAGE) -> NoReturn:
    """End with one line on standard error."""
    typer.echo(f"attnproof: {message}", err=True)
    raise typer.Exit(int(status))


def make_options(**given: Any) -> Options:
    """Checked options; ends with one line when one of them is not accepted."""
    defaults: dict[str, Any] = {
        "target": None,
        "signature": None,
        "precision": None,
        "device": "auto",
        "level": "quick",
        "dtype": [],
        "chapter": [],
        "seed": 0,
        "timeout": 60.0,
        "deviations": None,
        "in_process": False,
        "json": None,
        "resume": False,
        "case": None,
        "skip_budget": None,
    }
    namespace = {f"attn_{name}": value for name, value in (defaults | given).items()}
    try:
        options = read_options(argparse.Namespace(**namespace))
    except OptionError as error:
        stop(str(error).removeprefix("--attn-case: ").replace("--attn-", "--"))
    assert options is not None
    return options


def pairs(out: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and texts in two columns."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column()
    for name, text in rows:
        grid.add_row(name, Text(text))
    out.print(grid)


@contextmanager
def broken_pipe_is_fine() -> Iterator[None]:
    """End quietly when whoever reads standard output has had enough (``| head``)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(int(Exit.DOES_NOT)) from None
