"""``attnproof bench``: how fast targets are, side by side, their timed outputs judged."""

from __future__ import annotations

import json as json_module
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import resolved_device
from ..registry import registered
from ..report.summary import Exit
from ..writing import replace_file, unwritable
from .common import Device, Signature, broken_pipe_is_fine, console, progress_console, stop

if TYPE_CHECKING:
    from ..benchmark.run import Run

ROUNDS = 10
DTYPES = ("bf16", "fp16", "fp32")


def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET]...",
            help="As for check; every registered backend that runs here, unless named.",
        ),
    ] = None,
    suite: Annotated[
        str, typer.Option(metavar="NAME", help="papers, core, decoding, overhead or small.")
    ] = "core",
    signature: Signature = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help=f"{', '.join(DTYPES)}.")] = "bf16",
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="In which the peers take turns.")
    ] = ROUNDS,
    seed: Annotated[int, typer.Option(metavar="N", help="Of inputs and turns.")] = 0,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="Say how many times as fast the others are."),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write pytest-benchmark's JSON; lines as they come to FILE + l."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that --json FILE holds.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it (.svg, .png, .pdf).")
    ] = None,
) -> None:
    """Measure targets side by side. A timed call whose output deviates is a failed measurement.

    Exit status: 0 all is measured or unsupported, 1 a measurement failed, 2 usage, 3 nothing could
    be measured here.
    """
    from ..benchmark.plot import FORMATS
    from ..benchmark.plot import plot as draw
    from ..benchmark.run import Run
    from ..benchmark.storage import stored
    from ..benchmark.suites import SUITES

    if suite not in SUITES:
        stop(f"--suite {suite}: accepted are {', '.join(SUITES)}")
    if dtype not in DTYPES:
        stop(f"--dtype {dtype}: accepted are {', '.join(DTYPES)}")
    if device not in ("auto", "cpu", "cuda"):
        stop(f"--device {device}: accepted are auto, cpu, cuda")
    if plot is not None and plot.suffix not in FORMATS:
        stop(f"--plot {plot}: accepted are files named {', '.join(FORMATS)}")
    for option, path in (("--json", json), ("--plot", plot)):
        if path is not None and (why := unwritable(path)):
            stop(f"{option} {path}: {why}")
    if resume and json is None:
        stop("--resume: needs --json FILE, which holds the run to go on with")
    names = list(dict.fromkeys(targets or []))
    if signature is None:
        for name in names:
            if name not in registered() and ":" not in name:
                stop(f"{name}: unknown backend; registered are {', '.join(registered())}")
    if baseline is not None and targets and baseline not in names:
        names.append(baseline)
    device = resolved_device(device)
    peers = [(name, None if name in registered() else signature) for name in names]
    if not names:
        peers = [(name, None) for name in registered()]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "lines") if json is None else json.with_name(json.name + "l")
        run = Run(
            suite=suite, dtype=dtype, device=device, peers=peers, rounds=rounds, seed=seed,
            file=lines,
        )  # fmt: skip
        _begin(run, resume)
        with progress_console().status("") as status:
            run.go(
                lambda text: status.update(
                    f"{len(run.finished)} of {len(SUITES[suite](dtype))} cells: {text}"
                )
            )
        if json is not None:
            replace_file(json, (json_module.dumps(stored(run), indent=1) + "\n").encode())
        if plot is not None:
            draw(plot, run)
    _print(run, baseline)
    good = [m for m in run.measured.values() if m.seconds and not m.failed]
    if any(m.failed for m in run.measured.values()) or (names and run.unloadable):
        raise typer.Exit(int(Exit.DOES_NOT))
    if not good:
        raise typer.Exit(int(Exit.NOT_JUDGED))


def _begin(run: Run, resume: bool) -> None:
    """A new file of lines, or the one of the run that is resumed."""
    if not resume:
        run.file.unlink(missing_ok=True)
        return
    if not run.file.exists():
        stop(f"--resume: there is no {run.file}")
    first = run.file.read_text("utf-8").partition("\n")[0]
    held = json_module.loads(first).get("run") if first else None
    if held != run.settings:
        changed = [k for k, v in run.settings.items() if (held or {}).get(k) != v]
        stop(f"--resume: {run.file} is of another run: {', '.join(changed)} differ")
    # Whatever a stopped run began and did not end is measured again.
    run.file.write_text(run.file.read_text("utf-8").rpartition("\n")[0] + "\n", "utf-8")


def _print(run: Run, baseline: str | None) -> None:
    from ..benchmark.table import against, rates, reasons, shown

    out = console()
    out.width = max(out.width, 44 + 16 * len(shown(run)))
    with broken_pipe_is_fine():
        if run.ceilings:
            product, copy = run.ceilings["flops"] / 1e12, run.ceilings["bytes"] / 1e9
            out.print(
                f"{run.suite}, {run.dtype}: medians, and per cent of what a large product reaches, "
                f"{product:.3g} TFLOP/s, or a copy, {copy:.4g} GB/s"
            )
        out.print(rates(run, out.width))
        for sentence in reasons(run):
            out.print(sentence)
        if baseline is not None:
            for sentence in against(run, baseline):
                out.print(sentence)
