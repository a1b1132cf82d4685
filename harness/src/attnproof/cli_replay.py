"""``attnproof replay``: exactly one case, printed in full."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_common import (
    Device,
    InProcess,
    PrecisionName,
    Seed,
    Signature,
    Timeout,
    make_options,
    stop,
)
from .options import make_subject
from .summary import FAILED, Exit, exit_status
from .verdict_text import verdict_text

if TYPE_CHECKING:
    from .cases import Case
    from .replay import Replayed
    from .subject import Subject

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
        typer.Option(metavar="TARGET", help="As for `attnproof check`.", show_default=False),
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
    from .cases import find_case  # these import torch, which --help can do without
    from .targets import LoadError

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
    try:
        subject = make_subject(options)
    except LoadError as error:
        stop(str(error))
    try:
        if subject.description.unavailable:
            stop(f"{target}: {subject.description.unavailable}", Exit.NOT_JUDGED)
        case, replayed, tried = _replayed(find_case(case_id), subject, shrink)
    finally:
        subject.runner.close()
    if tried:
        outcome = "none of them fails" if case.id == case_id else "the smallest that fails is"
        typer.echo(f"{tried} smaller problems tried: {outcome}")
    typer.echo(verdict_text(case.id, replayed.verdict, options))
    if save is not None:
        _save(save, replayed, subject)
    raise typer.Exit(int(exit_status(replayed.verdict.status)))


def _replayed(case: Case, subject: Subject, shrink: bool) -> tuple[Case, Replayed, int]:
    """The case, or the smallest that fails like it, how it ended, and how many were tried."""
    from .replay import replay as run
    from .replay import smallest

    replayed = run(case, subject)
    if not shrink or replayed.verdict.status not in FAILED:
        return case, replayed, 0
    found, tried = smallest(case, subject, replayed.verdict.status, SHRINK_SECONDS)
    return found, (replayed if found == case else run(found, subject)), tried


def _save(path: Path, replayed: Replayed, subject: Subject) -> None:
    """Write the call that deviates, in the form that ``attnproof explain`` reads."""
    from .explain import save_computation

    computation = replayed.computation
    if computation is None:
        stop(f"--save {path}: no call deviates by value, nothing to write", Exit.DOES_NOT)
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
