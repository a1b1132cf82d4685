"""One run: load the targets, measure cell after cell, and write what came of each as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..environment import environment
from ..registry import registered
from ..targets import LoadError, TargetSpec
from .ceilings import measure_ceilings
from .measurement import Measurement
from .peer import OutOfTime, Peer
from .rounds import Bench
from .storage import resume, write
from .suites import Cell


class NothingToMeasure(Exception):
    """No target can run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and how. No ``targets``: every registered backend that can run."""

    targets: tuple[str, ...]
    signature: str | None
    cells: tuple[Cell, ...]  # of one dtype
    device: str  # 'cpu' or 'cuda'
    rounds: int
    seed: int
    timeout: float
    end: float  # by time.monotonic; what is not measured then is left
    json: Path | None
    resume: bool


@dataclass(kw_only=True)
class BenchSession:
    """A run that ended. ``left`` cells were not measured: out of time, or interrupted."""

    measurements: list[Measurement] = field(default_factory=list)
    taken_over: int = 0  # measurements of the run that was resumed
    left: int = 0


@contextmanager
def loaded(
    options: BenchOptions, tell: Callable[[str], None]
) -> Iterator[tuple[list[Peer], dict[str, str]]]:
    """The targets, in processes that end with the block, and why others are left out.

    LoadError for one that cannot be loaded, OutOfTime when there is no time left for that. Of the
    registered backends, where none is named, those are left out that cannot run here.
    NothingToMeasure when no target can.
    """
    known = registered()
    names = list(dict.fromkeys(options.targets)) or list(known)
    specs = [TargetSpec(n, None if n in known else options.signature) for n in names]
    peers = [Peer(spec, options.device, options.end) for spec in specs]
    try:
        unavailable = {}
        for peer in peers:
            tell(f"loading {peer.name}")
            try:
                why = peer.describe().unavailable
            except LoadError as error:
                if options.targets:
                    raise
                why = str(error)
            if why is not None:
                unavailable[peer.name] = why
                peer.close()
        if len(unavailable) == len(peers):
            raise NothingToMeasure("; ".join(f"{n}: {why}" for n, why in unavailable.items()))
        if options.targets:  # the table says it of them
            yield peers, {}
        else:
            yield [peer for peer in peers if peer.name not in unavailable], unavailable
    finally:
        for peer in peers:
            peer.close()


def run(options: BenchOptions, peers: Sequence[Peer], progress: Progress) -> BenchSession:
    """Measure what no earlier run has; StorageError where that is of other targets or another
    device, OSError when the results cannot be written. A cell in which time ran out is left."""
    must_agree = _must_agree(options, peers)
    session = BenchSession()
    if options.resume and options.json is not None:
        session.measurements = resume(options.json, must_agree)
        session.taken_over = len(session.measurements)
    done = {(one.cell.suite, one.cell.name) for one in session.measurements}
    cells = [cell for cell in options.cells if (cell.suite, cell.name) not in done]
    session.left = len(cells)
    if not cells or time.monotonic() >= options.end:
        return session
    try:
        progress.tell("measuring what this device reaches")
        bench = Bench(
            peers=peers,
            device=options.device,
            ceilings=measure_ceilings(options.device, cells[0].problem.dtype),
            rounds=options.rounds,
            timeout=options.timeout,
            seed=options.seed,
            tell=progress.tell,
        )
        for cell in cells:
            if time.monotonic() >= options.end:
                break
            found = bench.measure(cell)
            session.measurements += found
            session.left -= 1
            if options.json is not None:
                write(options.json, must_agree, session.measurements)
            progress.done(cell, found)
    except (KeyboardInterrupt, OutOfTime):
        pass
    return session


class Progress(Protocol):
    """What follows a run."""

    def tell(self, text: str) -> None:
        """What is being done now."""
        ...

    def done(self, cell: Cell, found: Sequence[Measurement]) -> None:
        """What came of a cell."""
        ...


def _must_agree(options: BenchOptions, peers: Sequence[Peer]) -> Mapping[str, Any]:
    """What must be the same for a run to be gone on with."""
    found = environment()
    return {
        "targets": [peer.name for peer in peers],
        "signature": options.signature,
        "device": found["gpus"][0]["name"] if options.device == "cuda" else found["cpu"]["model"],
        "torch": found["versions"]["torch"],
        "commit": found["commit"],
        "dtype": options.cells[0].problem.dtype,
        "rounds": options.rounds,
        "seed": options.seed,
    }
