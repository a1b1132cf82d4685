"""Measuring a cell: all targets by turns, in an order that is shuffled anew in every round.

Each target has a process of its own, so that a crash, a hang or a CUDA error costs its column
alone, and one waits for its turn while another is timed: a GPU that several processes share works
for the one that has work. A turn begins with untimed calls, and ahead of every timed one there
is enough for the device to do that switching to the process is over by then. What drifts
(clocks, temperature) drifts for all targets alike.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..backend import Capabilities, Description
from ..registry import registered
from .ceilings import Ceilings
from .judging import deviation
from .measurement import Ended, Measurement
from .peer import Failed, Peer, Turn
from .sample import draw_sample
from .suites import Cell
from .work import LARGEST_MEASURED, work

CALLS = 3  # timed in a turn
TURN_SECONDS = 0.5  # a call that takes longer is timed once in a turn
CELL_SECONDS = 20.0  # of one target in one cell: it gets fewer rounds rather than more
LEAST_ROUNDS = 3
# Rounds that are judged, drawn beforehand: the fp64 answer of gradients takes long.
JUDGED_ROUNDS = {"forward": 5, "backward": 2, "both": 2}


@dataclass
class _Contender:
    """A target in the cell that is being measured."""

    peer: Peer
    cell: Cell  # with the causal alignment that it takes
    rounds: int = 0
    calls: int = CALLS
    judged_rounds: frozenset[int] = frozenset()
    seconds: list[float] = field(default_factory=list)
    judged: int = 0
    sample: str = ""
    iterations: int = 1
    launch_bound: bool = False
    failed: tuple[Ended, str] | None = None


@dataclass(kw_only=True)
class Bench:
    """The targets, and how long they are measured. ``tell`` is called with what is being done."""

    peers: Sequence[Peer]
    device: str
    ceilings: Ceilings
    rounds: int = 10
    timeout: float = 120.0  # seconds of a turn, compiling included
    seed: int = 0
    tell: Callable[[str], None] = lambda text: None
    _startup: dict[str, dict[str, float]] = field(default_factory=dict, init=False)
    _gave_up: list[tuple[str, Cell]] = field(default_factory=list, init=False)

    def measure(self, cell: Cell) -> list[Measurement]:
        """A measurement of every target, in the order of the targets."""
        # A number that a target cannot know, but a run can be repeated with.
        chance = random.Random(f"{self.seed} {cell.suite} {cell.name}")
        contenders = [self._enter(peer, cell) for peer in self.peers]
        self._warm_up(contenders)
        for contender in contenders:
            count = min(JUDGED_ROUNDS[cell.direction], contender.rounds)
            contender.judged_rounds = frozenset(chance.sample(range(contender.rounds), count))
        for number in range(self.rounds):
            order = [c for c in contenders if c.failed is None and number < c.rounds]
            chance.shuffle(order)
            seed = chance.getrandbits(48)
            for contender in order:
                self.tell(f"{cell.label}, round {number + 1}: {contender.peer.name}")
                self._round(contender, number, seed, chance)
        return [self._measurement(contender, cell) for contender in contenders]

    def _enter(self, peer: Peer, cell: Cell) -> _Contender:
        """The target, or why it cannot be measured in that cell."""
        description = peer.describe()
        contender = _Contender(peer, for_capabilities(cell, description.capabilities))
        reasons = unsupported(contender.cell, description)
        if description.unavailable is not None:
            contender.failed = Ended.UNAVAILABLE, description.unavailable
        elif reasons:
            contender.failed = Ended.UNSUPPORTED, "; ".join(reasons)
        else:
            for name, other in self._gave_up:
                if name == peer.name and _less(other, cell):
                    reason = f"timed out on {other.label}, which is less work"
                    contender.failed = Ended.SKIPPED, reason
        return contender

    def _warm_up(self, contenders: Sequence[_Contender]) -> None:
        """The first calls, in which kernels are compiled; how long a call takes decides how many
        rounds a target gets.

        Registered backends, none of which tunes itself by timing, compile at the same time,
        once it is known how long each took to its first result.
        """
        waiting = [c for c in contenders if c.failed is None]
        known = registered()
        together = [c for c in waiting if c.peer.name in known and c.peer.name in self._startup]
        turns: list[tuple[_Contender, Turn | None]] = []
        for contender in together:
            self._begin(contender, [0])
        for contender in together:
            self.tell(f"{contender.cell.label}: {contender.peer.name} compiles")
            turns.append((contender, self._finish(contender, 1)))
        for contender in waiting:
            crowded = contender.failed is not None and contender.failed[0] is Ended.OUT_OF_MEMORY
            if contender not in together or crowded:
                self.tell(f"{contender.cell.label}: {contender.peer.name} compiles")
                contender.failed = None
                self._begin(contender, [0])
                turns.append((contender, self._finish(contender, 1)))
        for contender, turn in turns:
            if turn is not None:
                self._allot(contender, turn)

    def _allot(self, contender: _Contender, turn: Turn) -> None:
        """Rounds, by what the first turn took."""
        name, first = contender.peer.name, contender.peer.import_seconds
        if name not in self._startup:
            total = first + turn.first
            self._startup[name] = {"import": first, "first": turn.first, "total": total}
        call = turn.seconds[0] * turn.iterations
        contender.calls = CALLS if call < TURN_SECONDS else 1
        fit = int(CELL_SECONDS / (call * 2 * contender.calls))  # each is made untimed, too
        contender.rounds = min(self.rounds, max(fit, LEAST_ROUNDS))

    def _begin(self, contender: _Contender, seeds: Sequence[int]) -> None:
        """Begin a turn; that it could not be is noted."""
        try:
            contender.peer.begin(contender.cell, seeds, self.timeout)
        except Failed as failed:
            contender.failed = Ended(failed.kind), failed.reason

    def _finish(self, contender: _Contender, count: int) -> Turn | None:
        """A turn that was begun; None when it failed, which is noted."""
        if contender.failed is not None:
            return None
        try:
            turn = contender.peer.finish(count)
        except Failed as failed:
            contender.failed = Ended(failed.kind), failed.reason
            if failed.kind == Ended.TIMED_OUT:
                self._gave_up.append((contender.peer.name, contender.cell))
            return None
        contender.iterations = turn.iterations
        return turn

    def _round(self, contender: _Contender, number: int, seed: int, chance: random.Random) -> None:
        """A turn of timed calls, of which one is drawn afterwards and judged."""
        seeds = [seed + i for i in range(contender.calls)]
        begun = time.monotonic()
        self._begin(contender, seeds)
        turn = self._finish(contender, len(seeds))
        if turn is None:
            return
        if sum(turn.seconds) * turn.iterations > time.monotonic() - begun:
            contender.failed = Ended.CRASHED, "claims more seconds than have passed"
            return
        contender.seconds += turn.seconds
        contender.launch_bound |= turn.launch_bound
        if number in contender.judged_rounds:
            self._judge(contender, chance.randrange(len(seeds)), seeds, chance)

    def _judge(
        self, contender: _Contender, call: int, seeds: Sequence[int], chance: random.Random
    ) -> None:
        cell, description = contender.cell, contender.peer.describe()
        sample = draw_sample(cell.problem, self.device, chance)
        try:
            shown, complaint = contender.peer.show(call, sample, self.timeout)
        except Failed as failed:
            contender.failed = Ended(failed.kind), failed.reason
            return
        try:
            wrong = complaint or deviation(
                cell,
                seeds[call],
                sample,
                {name: tensor.to(self.device) for name, tensor in shown.items()},
                description.precision,
                description.capabilities,
                self.device,
            )
        except torch.OutOfMemoryError as full:
            contender.failed = Ended.OUT_OF_MEMORY, f"the judge, not the target: {full}"
            return
        finally:
            if self.device == "cuda":
                torch.cuda.empty_cache()  # the targets need the memory
        contender.judged += 1
        contender.sample = sample.describe(cell.problem)
        if wrong:
            contender.failed = Ended.DEVIATES, wrong

    def _measurement(self, contender: _Contender, cell: Cell) -> Measurement:
        amount = work(cell)
        notes = []
        if contender.launch_bound:
            notes.append("the device waited for the host: launch overhead is part of the time")
        if 0 < contender.rounds < self.rounds:
            notes.append(f"{contender.rounds} rounds, since a call takes long")
        found = Measurement(
            cell=cell,
            target=contender.peer.name,
            ended=Ended.MEASURED,
            seconds=tuple(contender.seconds),
            iterations=contender.iterations,
            judged=contender.judged,
            sample=contender.sample,
            notes=tuple(notes),
            flops=amount.flops,
            bytes=amount.bytes,
            ceilings=self.ceilings.as_dict(),
            startup=self._startup.get(contender.peer.name, {}),
        )
        if contender.failed is not None:
            ended, reason = contender.failed
            return replace(found, ended=ended, reason=reason, seconds=())
        least = amount.seconds(self.ceilings.matmul, self.ceilings.memory) / LARGEST_MEASURED
        if cell.clock == "device" and found.typical < least:
            reason = (
                f"a call took {found.typical:.3g} s; at the ceilings of this device, "
                f"{self.ceilings.matmul / 1e12:.3g} TFLOP/s and {self.ceilings.memory / 1e9:.3g} "
                f"GB/s, it takes {least:.3g} s at least"
            )
            return replace(found, ended=Ended.TOO_FAST, reason=reason, seconds=())
        return found


def for_capabilities(cell: Cell, capabilities: Capabilities) -> Cell:
    """The cell with the causal alignment that is supported, where the two are the same."""
    p = cell.problem
    if p.causal == "none" or p.seqlen_q != p.keys or not capabilities.unsupported_reasons(p):
        return cell
    other = "bottom-right" if p.causal == "top-left" else "top-left"
    turned = replace(cell, problem=p.replace(causal=other))
    return cell if capabilities.unsupported_reasons(turned.problem) else turned


def unsupported(cell: Cell, description: Description) -> list[str]:
    """Why a target does not take the cell; empty when it does."""
    reasons = description.capabilities.unsupported_reasons(cell.problem)
    if refused := description.refused_dtypes.get(cell.problem.dtype):
        reasons.append(refused)
    return reasons


def _less(one: Cell, other: Cell) -> bool:
    """Whether a cell is no more work than another of its kind."""
    return (
        (one.suite, one.direction) == (other.suite, other.direction)
        and work(one).flops <= work(other).flops
        and one.problem.keys <= other.problem.keys
    )
