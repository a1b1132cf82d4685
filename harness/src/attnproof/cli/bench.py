"""``attnproof bench``: how fast targets are, measured in rounds and judged meanwhile."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import TextColumn

from ..options import DEVICES, resolved_device
from ..report.summary import Exit, plural
from ..writing import unwritable
from .common import (
    Device,
    Seed,
    Signature,
    broken_pipe_is_fine,
    console,
    progress_console,
    stop,
)
from .progress import counting

if TYPE_CHECKING:
    from ..benchmark.measurement import Measurement
    from ..benchmark.session import BenchOptions, BenchSession
    from ..benchmark.suites import Cell

DTYPE = {"cuda": "bf16", "cpu": "fp32"}


def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET]...",
            help="As of `check`. Without one: every registered backend that this device can run.",
        ),
    ] = None,
    signature: Signature = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="papers, decoding, overhead or small; may be repeated. "
            "[default: all but small; on a CPU small and overhead]",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX",
            help="Only cells in whose name it is found, as forward or _d(64|128)_; all of several.",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="fp32, fp16 or bf16. [default: bf16; on a CPU fp32]",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", help="In which all take turns.")] = 10,
    seed: Seed = 0,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Limit of a turn, compiling included.")
    ] = 120.0,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Limit of the run, loading and compiling included; --resume goes on. "
            "[default: no limit]",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Show how many times as fast as that.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the results there as they come: pytest-benchmark's JSON."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that --json FILE holds.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the rates (.svg, .png, .pdf).")
    ] = None,
    show: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure nothing: show what --json FILE has written."),
    ] = None,
) -> None:
    """Measure how fast TARGETs are, side by side, and judge what the timed calls return.

    Exit status: 0 all that was measured conforms, 1 a measurement failed (a wrong result, a crash,
    a rate that the device cannot have), 2 usage or a TARGET cannot be loaded, 3 nothing could be
    measured here.
    """
    begun = time.monotonic()
    from ..benchmark.plot import FORMATS

    if plot is not None and plot.suffix not in FORMATS:
        stop(f"--plot {plot}: accepted are files named {', '.join(FORMATS)}")
    for name, path in (("--plot", plot), ("--json", json)):
        if path is not None and (why := unwritable(path)):
            stop(f"{name} {str(path)!r}: {why}")
    for text in only or []:
        try:
            re.compile(text)
        except re.error as error:
            stop(f"--only {text}: accepted is a regular expression: {error}")
    if show is not None:
        raise typer.Exit(int(_show(show, only or [], baseline, plot)))
    if device not in DEVICES:
        stop(f"--device {device}: unknown; accepted are {', '.join(DEVICES)}")
    if rounds < 1:
        stop(f"--rounds {rounds}: accepted is 1 or more")
    for option, value in (("--timeout", timeout), ("--seconds", seconds)):
        if value is not None and not 0 < value < float("inf"):
            stop(f"{option} {value:g}: accepted is a time above 0 seconds")
    if resume and json is None:
        stop("--resume: needs --json, which names the run to go on with")
    from ..benchmark.session import BenchOptions

    here = resolved_device(device)
    options = BenchOptions(
        targets=tuple(targets or ()),
        signature=signature,
        cells=tuple(_cells(here, dtype, suite or [], only or [])),
        device=here,
        rounds=rounds,
        seed=seed,
        timeout=timeout,
        end=math.inf if seconds is None else begun + seconds,
        json=json,
        resume=resume,
    )
    session = _measured(options, baseline)
    status = _tell(session.measurements, baseline, plot)
    if session.taken_over:
        typer.echo(f"{plural(session.taken_over, 'measurement')} taken over from the earlier run")
    if session.left:
        how = "go on with the same command and --resume"
        if json is None:
            how = "with --json FILE a run can be resumed"
        typer.echo(f"{plural(session.left, 'cell')} not measured; {how}")
        status = Exit.INTERRUPTED
    raise typer.Exit(int(status))


def _cells(
    device: str, dtype: str | None, suites: Sequence[str], only: Sequence[str]
) -> list[Cell]:
    """What is to be measured, in order."""
    from attn_reference.problem import DTYPES

    from ..benchmark.suites import DEFAULT_SUITES, SUITES

    dtype = dtype or DTYPE[device]
    if dtype not in DTYPES:
        stop(f"--dtype {dtype}: unknown; accepted are {', '.join(DTYPES)}")
    for name in suites:
        if name not in SUITES:
            stop(f"--suite {name}: unknown; accepted are {', '.join(SUITES)}")
    cells = [c for n in dict.fromkeys(suites or DEFAULT_SUITES[device]) for c in SUITES[n](dtype)]
    chosen = [c for c in cells if _wanted(c, only)]
    if not chosen:
        stop(f"--only {' '.join(only)}: in the name of no cell; one is {cells[0].name}")
    return chosen


def _wanted(cell: Cell, only: Sequence[str]) -> bool:
    return all(re.search(text, cell.name) for text in only)


def _measured(options: BenchOptions, baseline: str | None) -> BenchSession:
    """Carry out a run; ends with one line where it cannot be."""
    from ..benchmark.peer import OutOfTime
    from ..benchmark.session import BenchSession, NothingToMeasure, loaded, run
    from ..benchmark.storage import StorageError
    from ..targets import LoadError

    follow = _Follow(progress_console(), len(options.cells))
    try:
        with follow, loaded(options, follow.tell) as (peers, left_out):
            for name, why in left_out.items():
                follow.say(f"left out: {name}: {why}")
            names = [peer.name for peer in peers]
            if baseline is not None and baseline not in names:
                stop(f"--baseline {baseline}: accepted is one of the targets: {', '.join(names)}")
            return run(options, peers, follow)
    except OutOfTime:
        follow.say("out of time before all targets were loaded")
        return BenchSession(left=len(options.cells))
    except LoadError as error:
        stop(str(error))
    except NothingToMeasure as error:
        stop(f"nothing can be measured here: {error}", Exit.NOT_JUDGED)
    except StorageError as error:
        stop(f"--resume: {error}")
    except OSError as error:
        stop(f"--json {options.json}: cannot be written: {error.strerror}", Exit.DOES_NOT)


def _show(path: Path, only: Sequence[str], baseline: str | None, plot: Path | None) -> Exit:
    """Print and draw what a file holds."""
    from ..benchmark.storage import StorageError, read

    try:
        _, measurements = read(path)
    except StorageError as error:
        stop(f"--show {error}")
    chosen = [one for one in measurements if _wanted(one.cell, only)]
    if not chosen:
        stop(f"--only {' '.join(only)}: in the name of no cell of {path}")
    names = dict.fromkeys(one.target for one in chosen)
    if baseline is not None and baseline not in names:
        stop(f"--baseline {baseline}: accepted is one of the targets of {path}: {', '.join(names)}")
    return _tell(chosen, baseline, plot)


def _tell(measurements: Sequence[Measurement], baseline: str | None, plot: Path | None) -> Exit:
    """Print the tables, draw the figure, and give the exit status."""
    from ..benchmark.measurement import FAILED, Ended
    from ..benchmark.plot import plot as draw
    from ..benchmark.table import judged_line, reasons, tables

    out = console()
    with broken_pipe_is_fine():
        for table in tables(measurements, out, baseline):
            out.print(table)
        for line in reasons(measurements):
            out.print(line, markup=False, soft_wrap=True)
        out.print(judged_line(measurements), markup=False)
    if plot is not None:
        try:
            draw(plot, measurements)
        except OSError as error:
            stop(f"--plot {plot}: {error.strerror}")
        typer.echo(f"drawn: {plot}", err=True)
    ended = {one.ended for one in measurements}
    if ended & FAILED:
        return Exit.DOES_NOT
    return Exit.CONFORMS if Ended.MEASURED in ended else Exit.NOT_JUDGED


class _Follow:
    """A bar on a terminal; elsewhere a line for every cell."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._begun = time.monotonic()
        text = TextColumn("{task.fields[text]}")
        self._bar = counting(console, "measuring", text, width=20)
        self._task = self._bar.add_task("measuring", total=total, text="")

    def __enter__(self) -> _Follow:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, text: str) -> None:
        """What is being done now."""
        self._bar.update(self._task, text=escape(text))

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False, soft_wrap=True)

    def done(self, cell: Cell, found: Sequence[Measurement]) -> None:
        """What came of a cell."""
        from ..benchmark.table import in_short

        self._bar.advance(self._task)
        if not self._console.is_terminal:
            seconds = time.monotonic() - self._begun
            self.say(f"{seconds:5.0f} s  {cell.direction} {cell.label}: {in_short(found)}")
