"""``attnproof golden verify|update|check``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import make_subject
from ..report.results import write_results
from ..report.summary import FAILED, Exit, plural, summarise
from ..report.table import feature_table
from ..report.verdict_text import verdict_text
from ..writing import unwritable
from .common import (
    Device,
    InProcess,
    PrecisionName,
    Signature,
    SkipBudget,
    Target,
    Timeout,
    broken_pipe_is_fine,
    console,
    make_options,
    progress_console,
    stop,
)
from .progress import advancing, loading

if TYPE_CHECKING:
    from ..golden.comparison import Comparison, Progress, Update

GOLDEN = Path("golden")

golden = typer.Typer(
    help="The checked-in truth: recompute and compare it, rewrite it, judge a target on it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Directory = Annotated[
    Path | None,
    typer.Argument(
        metavar="[DIRECTORY]",
        help="Traffic or codegen if it is called that, else vectors. Without it: all of golden/.",
        show_default=False,
    ),
]


@golden.command()
def verify(directory: Directory = None) -> None:
    """Recompute and compare; exit status 1 when something differs, 3 when nothing is compared."""
    results = []
    for folder, kind in _folders(directory):
        if not folder.is_dir():
            stop(f"golden verify: {folder}: no such directory")
        with advancing(progress_console(), f"recomputing {folder}") as progress:
            found = kind.verify(folder, progress)
        if found.table is not None:
            console().print(found.table)
        for line in (*found.lines, *(f"not compared: {reason}" for reason in found.reasons)):
            typer.echo(line)
        if found.fails:
            typer.echo(f"differs: {found.summary} in {folder}")
        elif found.compared:
            typer.echo(f"agrees: {folder}" + (f" ({found.summary})" if found.summary else ""))
        results.append(found)
    if any(found.fails for found in results):
        raise typer.Exit(int(Exit.DOES_NOT))
    if not any(found.compared for found in results):
        raise typer.Exit(int(Exit.NOT_JUDGED))


@golden.command()
def update(directory: Directory = None) -> None:
    """Rewrite what no longer agrees, and say what."""
    folders = _folders(directory)
    for folder, kind in folders:
        for name in kind.files:
            # A folder that is missing will be made.
            if folder.is_dir() and (why := unwritable(folder / name)):
                stop(f"golden update {str(folder)!r}: its {name} {why}")
    for folder, kind in folders:
        try:
            with advancing(progress_console(), f"recomputing {folder}") as progress:
                done = kind.update(folder, progress)
        except OSError as error:
            stop(f"golden update: {folder}: {error.strerror}")
        if done.table is not None:
            console().print(done.table)
        for line in (*done.changed, *done.notes):
            typer.echo(line)
        typer.echo(f"{plural(len(done.changed), 'file')} changed in {folder}")


@golden.command()
def check(
    target: Target,
    directory: Annotated[
        Path, typer.Option("--vectors", metavar="DIRECTORY", help="Where the vectors are.")
    ] = GOLDEN / "vectors",
    signature: Signature = None,
    precision: PrecisionName = None,
    device: Device = "auto",
    timeout: Timeout = 60.0,
    skip_budget: SkipBudget = None,
    in_process: InProcess = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the results there.")
    ] = None,
) -> None:
    """Judge TARGET on the vectors: stored inputs, and answers within the budget of those stored.

    Exit status: that of `attnproof check`.
    """
    from ..golden import vectors
    from ..golden.judging import judge_vectors
    from ..targets import LoadError

    options = make_options(
        target=target,
        signature=signature,
        precision=precision,
        device=device,
        timeout=timeout,
        skip_budget=skip_budget,
        in_process=in_process,
        json=json,
    )
    if differences := vectors.verify(directory):
        for difference in differences:
            typer.echo(difference)
        stop(f"golden check: {directory} does not hold the vectors of this version")
    try:
        with loading(progress_console(), options):
            subject = make_subject(options)
    except LoadError as error:
        stop(str(error))
    unavailable = subject.description.unavailable
    try:
        with progress_console().status(f"judging {target}"):
            records = [] if unavailable else list(judge_vectors(subject, directory))
    finally:
        subject.runner.close()
    problems = write_results(options, records, (), unavailable) if options.json else []
    summary = summarise(records, unavailable=unavailable, skip_budget=options.skip_budget)
    out = console()
    with broken_pipe_is_fine():
        for record in records:
            if record.status in FAILED:
                text = verdict_text(record.id, record.verdict, options, out.width)
                out.print(text, markup=False, soft_wrap=True)
        if records:
            out.print(feature_table(summary))
        lines = [*summary.not_run_lines, *problems, target, summary.line]
        out.print("\n".join(lines), markup=False, soft_wrap=True)
    failed = problems and summary.exit is Exit.CONFORMS
    raise typer.Exit(int(Exit.DOES_NOT if failed else summary.exit))


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How one kind of checked-in truth is compared and rewritten."""

    verify: Callable[[Path, Progress], Comparison]
    update: Callable[[Path, Progress], Update]
    files: list[str]


def _kinds() -> dict[str, _Kind]:
    """By the name of their folder."""
    from ..golden import codegen, traffic, vectors  # import torch, which --help can do without
    from ..golden.comparison import Comparison

    def quick(module: ModuleType) -> _Kind:
        return _Kind(
            verify=lambda folder, progress: Comparison.of(module.verify(folder)),
            update=lambda folder, progress: module.update(folder),
            files=module.files(),
        )

    return {
        "vectors": quick(vectors),
        "traffic": quick(traffic),
        "codegen": _Kind(verify=codegen.verify, update=codegen.update, files=codegen.files()),
    }


def _folders(directory: Path | None) -> list[tuple[Path, _Kind]]:
    """Each folder with its kind."""
    kinds = _kinds()
    if directory is None:
        return [(GOLDEN / name, kind) for name, kind in kinds.items()]
    return [(directory, kinds.get(directory.name, kinds["vectors"]))]
