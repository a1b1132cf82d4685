"""``attnproof replay``: exactly one case, printed in full."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Options, make_subject
from ..report.summary import FAILED, Exit, exit_status
from ..report.verdict_text import verdict_text
from ..writing import unwritable
from .common import (
    Device,
    InProcess,
    PrecisionName,
    Seed,
    Signature,
    Timeout,
    console,
    make_options,
    progress_console,
    stop,
)
from .progress import loading

if TYPE_CHECKING:
    from ..cases import Case
    from ..replay import Replayed
    from ..subject import Subject

SHRINK_SECONDS = 60.0


def replay(
    case_id: Annotated[
        str,
        typer.Argument(
            metavar="CASE_ID", help="As `attnproof check` prints it.", show_default=False
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="TARGET", help="As for `attnproof check`.", show_default=False
        ),
    ],
    signature: Signature = None,
    precision: PrecisionName = None,
    device: Device = "auto",
    seed: Seed = 0,
    timeout: Timeout = 60.0,
    in_process: InProcess = False,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Look for the smallest problem that still fails.")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the failing call for `attnproof explain`."),
    ] = None,
) -> None:
    """Run one case again and print its verdict in full.

    Exit status: 0 it conforms, 1 it does not, 2 usage, 3 it cannot be judged here.
    """
    from ..cases import find_case  # these import torch, which --help can do without
    from ..targets import LoadError

    options = make_options(
        target=target,
        signature=signature,
        precision=precision,
        device=device,
        seed=seed,
        timeout=timeout,
        in_process=in_process,
        case=case_id,
    )
    if save is not None and (why := unwritable(save)):
        stop(f"--save {str(save)!r}: {why}")
    try:
        with loading(progress_console(), options):
            subject = make_subject(options)
    except LoadError as error:
        stop(str(error))
    try:
        if subject.description.unavailable:
            stop(
                f"{target}: cannot be judged here: {subject.description.unavailable}",
                Exit.NOT_JUDGED,
            )
        replayed = _replay(find_case(case_id), subject, options)
        if shrink and replayed.verdict.status in FAILED:
            replayed = _shrink(find_case(case_id), replayed, subject, options)
    finally:
        subject.runner.close()
    if save is not None:
        _save(save, replayed, subject)
    raise typer.Exit(int(exit_status(replayed.verdict.status)))


def _replay(case: Case, subject: Subject, options: Options) -> Replayed:
    """Run a case and print it in full."""
    from ..replay import replay as run

    replayed = run(case, subject)
    text = verdict_text(case.id, replayed.verdict, options, console().width)
    typer.echo(text)
    return replayed


def _shrink(case: Case, replayed: Replayed, subject: Subject, options: Options) -> Replayed:
    """Print the smallest case that fails like this one, and give how it ended."""
    from ..replay import smallest

    found, tried = smallest(case, subject, replayed.verdict.status, SHRINK_SECONDS)
    if found == case:
        typer.echo(f"\n{tried} smaller problems tried: none of them fails")
        return replayed
    typer.echo(f"\n{tried} smaller problems tried; the smallest that fails:")
    return _replay(found, subject, options)


def _save(path: Path, replayed: Replayed, subject: Subject) -> None:
    """Write the call that deviates, in the form that ``attnproof explain`` reads."""
    from ..explain import save_computation

    computation = replayed.computation
    if computation is None:
        typer.echo(
            f"attnproof: --save {path}: no call deviates by value, nothing written", err=True
        )
        return
    try:
        save_computation(
            path,
            computation.problem,
            computation.inputs,
            computation.result,
            subject.precision,
            subject.description.capabilities,
        )
    except OSError as error:
        stop(f"--save {path}: cannot be written: {error.strerror}")
    typer.echo(f"saved: {path} (attnproof explain {path})")
