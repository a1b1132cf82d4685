"""A cell measured: peers interleaved in rounds, on fresh inputs, outputs of timed calls judged."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any

import torch

from .ceilings import MARGIN, Ceilings
from .peers import Peer, fresh_inputs
from .sample import choose, why_wrong
from .suites import Cell
from .timing import FLUSH_BYTES, clock
from .work import flops, moved_bytes

CALLS = 5  # of a peer in a round
WALL_CALLS = 50
WARM_UP = 3
LONGEST = 1.0  # seconds of a call beyond which a peer is left out of a cell


@dataclass(kw_only=True)
class Measured:
    """A peer on a cell. Seconds of each timed call; a measurement that failed has ``failed``, why,
    and a peer that was not measured ``skipped``."""

    cell: str
    peer: str
    seconds: list[float] = field(default_factory=list)
    first_call: float | None = None  # s, compiling and all
    judged: int = 0  # timed calls whose output was judged
    skipped: str | None = None
    failed: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure(
    cell: Cell,
    peers: Sequence[Peer],
    ceilings: Ceilings,
    rounds: int,
    seed: int,
    begins: Callable[[str], None],
) -> Iterator[Measured]:
    """Measure the peers on a cell. ``begins`` is told the name of a peer before its turn, in which
    it may take the process down."""
    found = {peer.name: Measured(cell=cell.id, peer=peer.name) for peer in peers}
    running: list[Peer] = []
    device = peers[0].device
    warm = fresh_inputs(cell, device, seed)
    for peer in peers:
        one = found[peer.name]
        one.skipped = peer.refuses(cell)
        if one.skipped is not None:
            continue
        begins(peer.name)
        try:
            start = time.perf_counter()
            call = peer.call(cell, warm)
            call()
            _wait(device)
            one.first_call = time.perf_counter() - start
            start = time.perf_counter()
            call()
            _wait(device)
            if (seconds := time.perf_counter() - start) > LONGEST:
                one.skipped = f"a call takes over {LONGEST:g} s"
                continue
            for _ in range(WARM_UP if seconds < LONGEST / 10 else 0):
                call()
            _wait(device)
        except NotImplementedError as error:
            one.skipped = str(error)
        except Exception as error:
            one.failed = f"{type(error).__name__}: {str(error).strip()[:300]}"
        else:
            running.append(peer)
    random = Random(seed)
    timer = clock(device, cell.wall)
    for number in range(rounds):
        inputs = fresh_inputs(cell, device, seed + 1 + number)
        random.shuffle(running)
        for peer in list(running):
            one = found[peer.name]
            begins(peer.name)
            try:
                call = peer.call(cell, inputs)
                call()  # what its first call on new tensors does is not repeated by a user
                taken, outputs = timer.seconds([call] * (WALL_CALLS if cell.wall else CALLS))
                one.seconds += taken
                if number == rounds - 1:  # of every round takes longer than all the timing
                    sample = choose(cell, random)
                    output = random.choice(outputs)
                    backend = peer.backend
                    one.failed = why_wrong(
                        cell, sample, inputs, output, backend.precision(device),
                        backend.capabilities,
                    )  # fmt: skip
                    one.judged += 1
            except Exception as error:
                one.failed = f"{type(error).__name__}: {str(error).strip()[:300]}"
            finally:
                outputs = []  # before the next one's come
            if one.failed is not None:
                running.remove(peer)
    for one in found.values():
        if one.seconds and one.failed is None:
            one.failed = impossible(cell, statistics.median(one.seconds), ceilings, MARGIN[device])
        yield one


def impossible(cell: Cell, seconds: float, ceilings: Ceilings, margin: float) -> str | None:
    """A rate beyond what the device reaches, as a sentence."""
    if cell.wall:
        return None
    rates = [("FLOP/s", flops(cell), ceilings.flops)]
    if moved_bytes(cell) > FLUSH_BYTES:  # else a cache may have it
        rates.append(("bytes/s", moved_bytes(cell), ceilings.bytes))
    for what, amount, most in rates:
        if amount / seconds > most * margin:
            return f"{amount / seconds:.3g} {what}, and this device reaches {most:.3g}"
    return None


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
