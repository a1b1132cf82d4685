"""The command line: ``attnproof check|explain|list|doctor|replay|golden``."""

from __future__ import annotations

import typer

from .check import check
from .golden import golden
from .inspect import doctor, explain, list_
from .replay import replay

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
app.add_typer(golden, name="golden")


def main() -> None:
    """The entry point."""
    app()
