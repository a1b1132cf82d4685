"""``attnproof traffic``: what the algorithms load, store and compute, counted."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import broken_pipe_is_fine, console, progress_console, stop

if TYPE_CHECKING:
    from ..traffic.sources import Setting, Traffic, TrafficSource

LENGTHS = (256, 512, 1024, 2048, 4096)  # of a plot


def traffic(
    algorithms: Annotated[
        list[str] | None, typer.Argument(metavar="[ALGORITHM]...", help="All, unless named.")
    ] = None,
    seqlen: Annotated[int, typer.Option("-N", "--seqlen", help="Queries, and keys.")] = 1024,
    head_dim: Annotated[int, typer.Option("-d", "--head-dim", help="Columns of Q, K, V.")] = 64,
    on_chip: Annotated[
        int, typer.Option("-M", "--on-chip", help="On-chip memory, in elements.")
    ] = 65536,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp16",
    causal: Annotated[bool, typer.Option("--causal", help="Keys j <= i only.")] = False,
    backward: Annotated[bool, typer.Option("--backward", help="The backward pass.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it over N (.svg, .png, .pdf).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Plain values for programs.")] = False,
) -> None:
    """Loads and stores by tensor, and operations, of each algorithm: counted by running it."""
    from ..traffic.plot import FORMATS
    from ..traffic.plot import plot as draw
    from ..traffic.sources import BYTES, Setting
    from ..traffic.table import by_tensor, overview, saved

    for name, value in (("--seqlen", seqlen), ("--head-dim", head_dim), ("--on-chip", on_chip)):
        if value < 1:
            stop(f"{name} {value}: accepted is 1 or more")
    if dtype not in BYTES:
        stop(f"--dtype {dtype}: accepted are {', '.join(BYTES)}")
    if plot is not None and plot.suffix not in FORMATS:
        stop(f"--plot {plot}: accepted are files named {', '.join(FORMATS)}")
    setting = Setting(
        seqlen=seqlen, head_dim=head_dim, on_chip=on_chip, dtype=dtype, causal=causal,
        backward=backward,
    )  # fmt: skip
    chosen = _chosen(algorithms or [], setting)
    found = _count(chosen, setting)
    if json:
        counts = {name: counted.as_dict() for name, counted in found.items()}
        typer.echo(json_module.dumps({"setting": asdict(setting), "counts": counts}, indent=1))
    else:
        out = console()
        with broken_pipe_is_fine():
            out.print(overview(setting, found, out))
            out.print(*by_tensor(found, out), sep="")
            if "standard" in found:
                out.print("standard attention: " + ", ".join(found["standard"].lines))
            for sentence in saved(found):
                out.print(sentence)
    if plot is not None:
        settings = [replace(setting, seqlen=n) for n in LENGTHS]
        each = [_count(chosen, s) for s in settings]
        try:
            draw(plot, settings, {name: [counts[name] for counts in each] for name in chosen})
        except OSError as error:
            stop(f"--plot {plot}: {error.strerror}")
        typer.echo(f"drawn: {plot}", err=True)


def _chosen(names: list[str], setting: Setting) -> dict[str, TrafficSource]:
    """The sources that were named and have such a pass; or all that have."""
    from ..traffic.sources import sources

    registered = sources()
    for name in names:
        if name not in registered:
            stop(f"{name}: unknown; known are {', '.join(registered) or 'none: none is installed'}")
        if reason := registered[name].unsupported(setting):
            stop(f"{name}: {reason}")
    return {
        name: source
        for name, source in registered.items()
        if (name in names if names else source.unsupported(setting) is None)
    }


def _count(chosen: dict[str, TrafficSource], setting: Setting) -> dict[str, Traffic]:
    found = {}
    with progress_console().status("") as status:
        for name, source in chosen.items():
            status.update(f"counting {name}, {setting}")
            try:
                found[name] = source.count(setting)
            except ValueError as error:
                stop(f"{name}: {error}")
    return found
