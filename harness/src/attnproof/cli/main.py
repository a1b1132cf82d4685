"""The command line: ``attnproof check|explain|list|doctor|replay|bench|golden|traffic``."""

from __future__ import annotations

import sys

import typer

from ..report.summary import Exit
from .bench import bench
from .check import check
from .doctor import doctor
from .golden import golden
from .inspect import explain, list_
from .replay import replay
from .traffic import traffic

app = typer.Typer(
    name="attnproof",
    help="Prove or refute that a function computes attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command()(check)
app.command()(explain)
app.command("list")(list_)
app.command()(doctor)
app.command()(replay)
app.command()(bench)
app.command()(traffic)
app.add_typer(golden, name="golden")


def main() -> None:
    """The entry point; what is no command line gets one line too."""
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        status = Exit.INTERRUPTED
    except Exception as error:
        # The class of such errors is click's, or the copy of it that newer typers bring along.
        said = getattr(error, "format_message", None)
        if said is None:
            raise
        status, message = Exit.USAGE, str(said()).removesuffix(".")
        where = getattr(getattr(error, "ctx", None), "command_path", "attnproof")
        text = message if "\n" in message else f"attnproof: {message} (see {where} --help)"
        typer.echo(text, err=True)
    sys.exit(status if status is None else int(status))
