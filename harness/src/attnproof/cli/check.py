"""``attnproof check``: judge a target, print what is wrong, the table and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..environment import cores, environment
from ..options import Options, resolved_device
from ..record import CaseRecord
from ..report.summary import FAILED, Exit, Summary, plural, summarise
from ..report.table import feature_table
from ..report.verdict_text import gist, verdict_text
from ..writing import unwritable
from .common import (
    Device,
    InProcess,
    PrecisionName,
    Seed,
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
from .model import require_known, run_model
from .progress import Watcher
from .session import Session, run_session

if TYPE_CHECKING:
    from ..smallest import Smallest

IN_FULL = 3  # failing cases printed in full, the first of as many features
OF_A_KIND = 5  # ids printed of further ones that look the same
MAX_WORKERS = 8  # by default: each takes two processes that hold torch
WORKERS_PER_GPU = 4
SHRINK_SECONDS = 10.0  # looking for smallest failing problems, in all


def check(
    target: Target,
    signature: Signature = None,
    precision: PrecisionName = None,
    device: Device = "auto",
    level: Annotated[
        str, typer.Option("--level", metavar="LEVEL", help="quick or full.")
    ] = "quick",
    dtype: Annotated[
        list[str] | None,
        typer.Option("--dtype", metavar="DTYPE", help="Judge this dtype only; may be repeated."),
    ] = None,
    chapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Judge this chapter only; may be repeated. `attnproof list`."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Judge it inside a model of transformers, such as llama-tiny, not by chapters.",
        ),
    ] = None,
    seed: Seed = 0,
    timeout: Timeout = 60.0,
    deviations: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Known deviations in place of those that ship, or none."),
    ] = None,
    skip_budget: SkipBudget = None,
    in_process: InProcess = False,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes that share the cases. [default: cores]"),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the results there, as they come to FILE + l."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that --json FILE holds.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write one self-contained HTML page there."),
    ] = None,
) -> None:
    """Judge whether TARGET computes attention.

    Exit status: 0 it conforms, 1 it does not, or more cases than --skip-budget were not run, 2
    usage or TARGET cannot be loaded, 3 nothing could be judged here.
    """
    options = make_options(
        target=target,
        signature=signature,
        precision=precision,
        device=device,
        level=level,
        dtype=dtype or [],
        chapter=chapter or [],
        seed=seed,
        timeout=timeout,
        deviations=deviations,
        skip_budget=skip_budget,
        in_process=in_process,
        json=json,
        resume=resume,
    )
    if report is not None and report.exists() and not report.is_dir():
        stop(f"--report {report}: is a file; accepted is a folder")
    if report is not None and report.is_dir():
        from ..report.page import PAGE  # imports matplotlib, which --help can do without

        if why := unwritable(report / PAGE):
            stop(f"--report {str(report)!r}: its {PAGE} {why}")
    progress = progress_console()
    if model is None:
        session = run_session(options, _workers(workers, options), Watcher(progress, options))
    else:
        given = {"precision": precision, "chapter": chapter, "deviations": deviations}
        require_known(model, given | {"resume": resume, "workers": workers})
        options = replace(options, model=model)
        session = run_model(options, progress)
    if session.refused is not None:
        stop(session.refused)
    if session.unavailable is not None:
        for problem in session.problems:
            typer.echo(problem, err=True)
        over = options.skip_budget is not None
        status = Exit.DOES_NOT if over else Exit.NOT_JUDGED
        budget = f"; the skip budget is {options.skip_budget}" if over else ""
        stop(f"{target}: cannot be judged here: {session.unavailable}{budget}", status)
    if session.broken is not None:
        typer.echo(session.broken, err=True)
        stop("the harness itself failed, see above", Exit.DOES_NOT)
    with broken_pipe_is_fine():
        status = _tell(options, session, report, progress)
    raise typer.Exit(int(status))


def _tell(options: Options, session: Session, report: Path | None, progress: Console) -> Exit:
    """Print and write what came out, and give the exit status."""
    out = console()
    summary = summarise(session.records, session.complaints, skip_budget=options.skip_budget)
    smallest = {}
    if options.model is None and not session.interrupted:
        from ..smallest import smallest_of  # imports torch, which --help can do without

        first = _first_of_each(_failing(session.records), summary)[:IN_FULL]
        with progress.status("looking for the smallest problems that fail"):
            smallest = smallest_of(options, first, SHRINK_SECONDS)
    _print_failing(out, session.records, summary, options, smallest)
    out.print(feature_table(summary))
    for line in summary.not_run_lines:
        out.print(line, markup=False, soft_wrap=True)
    problems = list(session.problems)
    if report is not None:
        problems += _write_report(report, options, summary, session.records, smallest)
    _print_notes(out, session, problems)
    if session.interrupted:
        return _interrupted(out, options)
    out.print(f"{options.target}\n{summary.line}", markup=False, soft_wrap=True)
    return Exit.DOES_NOT if problems and summary.exit is Exit.CONFORMS else summary.exit


def _failing(records: Sequence[CaseRecord]) -> list[CaseRecord]:
    return [record for record in records if record.known is None and record.status in FAILED]


def _print_failing(
    out: Console,
    records: Sequence[CaseRecord],
    summary: Summary,
    options: Options,
    smallest: Mapping[str, Smallest],
) -> None:
    """The first failing case of each feature, a few in full; the others by what they look like."""
    failing = _failing(records)
    in_full = _first_of_each(failing, summary)[:IN_FULL]
    for record in in_full:
        out.rule(f"[bold]{record.feature}", align="left", characters="─")
        text = verdict_text(record.id, record.verdict, options, out.width)
        out.print(text, markup=False, soft_wrap=True)
        if record.id in smallest:
            out.print(smallest[record.id].text(options), markup=False, soft_wrap=True)
        out.print()
    others: dict[str, list[CaseRecord]] = {}
    for record in failing:
        if record not in in_full:
            others.setdefault(gist(record.verdict), []).append(record)
    if others:
        count = sum(map(len, others.values()))
        out.rule(f"{plural(count, 'more case')} that do not conform", align="left", characters="─")
    for likeness, group in sorted(others.items(), key=lambda item: -len(item[1])):
        looks = "looks like " if group[0].verdict["looks_like"] else ""
        out.print(f"{len(group)}: {looks}{likeness}", markup=False, soft_wrap=True)
        for record in group[:OF_A_KIND]:
            out.print(f"  {record.id}", markup=False, soft_wrap=True)
        if len(group) > OF_A_KIND:
            out.print(f"  … and {len(group) - OF_A_KIND} more")


def _first_of_each(failing: Sequence[CaseRecord], summary: Summary) -> list[CaseRecord]:
    """The first failing case of each feature, the features in the order of the verdict line."""
    first: dict[str, CaseRecord] = {}
    for record in failing:
        first.setdefault(record.feature, record)
    return [first[row.feature] for row in summary.failing]


def _print_notes(out: Console, session: Session, problems: Sequence[str]) -> None:
    """Known deviations, what is out of date about them, what could not be written."""
    known: dict[str, int] = {}
    for record in session.records:
        if record.known is not None:
            known[record.known] = known.get(record.known, 0) + 1
    lines = [f"known deviation, {plural(n, 'case')}: {reason}" for reason, n in known.items()]
    lines += [f"known deviations out of date: {complaint}" for complaint in session.complaints]
    if session.taken_over:
        lines.append(f"{plural(session.taken_over, 'case')} taken over from the earlier run")
    for line in [*lines, *problems]:
        out.print(line, markup=False, soft_wrap=True)


def _interrupted(out: Console, options: Options) -> Exit:
    """Say how to go on."""
    done = "interrupted; the table shows the cases that have finished"
    if options.json is None:
        out.print(f"{done}. With --json FILE a run can be resumed.", markup=False)
    else:
        out.print(f"{done}. Go on with the same command and --resume.", markup=False)
    return Exit.INTERRUPTED


def _workers(given: int | None, options: Options) -> int:
    """How many processes share the cases: by default one per core, a few per GPU, and one for a
    debugger."""
    if options.in_process:
        return 1
    if given is not None:
        return given
    if resolved_device(options.device) == "cuda":
        import torch

        return min(cores(), WORKERS_PER_GPU * max(1, torch.cuda.device_count()))
    return min(cores(), MAX_WORKERS)


def _write_report(
    directory: Path,
    options: Options,
    summary: Summary,
    records: Sequence[CaseRecord],
    smallest: Mapping[str, Smallest],
) -> list[str]:
    """Write the page; gives what went wrong."""
    from ..report.page import write_report

    try:
        found = {name: one.case.id for name, one in smallest.items()}
        path = write_report(directory, options, summary, records, environment(), found)
    except OSError as error:
        return [f"--report {directory}: cannot be written: {error.strerror}"]
    typer.echo(f"report: {path}")
    return []
