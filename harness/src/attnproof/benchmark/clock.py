"""How long a call takes: by the device's clock without launch overhead, or by the caller's.

On a GPU the queue is kept full: the device is held back until the host has issued all of what
is timed, which is verified, and so is that torch asked the driver for no memory meanwhile. Before
each timed call fresh inputs are written, and then more memory is read than the cache has, so that
a call reads its inputs from DRAM. It is read, and not written: the cache would be full of what has
yet to go to DRAM, and the timed call would wait for that. On the CPU, which issues nothing, the
call itself is timed after the same preparations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

HOLD_SECONDS = 2e-4  # at first: longer than most calls take to be issued
LONGEST_HOLD = 0.25  # what takes longer to be issued waits for the device anyway
CYCLES_PER_SECOND = 2e9  # at least as many as a GPU has, so that no hold is too short
CACHES = 2  # how many times what the cache holds is read
ROWS = (
    4096  # of what is read, each summed by itself: all in one sum would take memory, and a kernel
)
ATTEMPTS = 3  # at a call without new memory: what asks for some each time does so for its users too
CPU_CACHE = 1 << 24  # bytes: more than a core has; the rest is shared by a whole server

# Taken before any target is loaded: code that patches them does not reach this.
_clock = time.perf_counter
_event: Callable[[], Any] = partial(torch.cuda.Event, enable_timing=True)
_sleep: Callable[[int], None] = torch.cuda._sleep  # type: ignore[attr-defined,unused-ignore]
_memory_stats = torch.cuda.memory_stats


@dataclass(frozen=True, kw_only=True)
class Timed(Generic[R]):
    """One timed call, or several in a row. ``launch_bound``: the device waited for the host, so
    that launch overhead is part of the time."""

    seconds: float
    result: R
    launch_bound: bool = False


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


class DeviceClock:
    """Times calls one at a time."""

    def __init__(self, device: str) -> None:
        self.device = device
        columns = -(-CACHES * cache_bytes(device) // (4 * ROWS))
        self._scratch = torch.zeros(ROWS, columns, device=device)
        self._sums = torch.empty(ROWS, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget how long earlier calls took to be issued."""
        self._hold = HOLD_SECONDS

    def time(self, prepare: Callable[[], T], call: Callable[[T], R]) -> Timed[R]:
        """``prepare`` makes what ``call`` is given; the second alone is timed."""
        return self._on_gpu(prepare, call) if self.device == "cuda" else self._here(prepare, call)

    def _flush(self) -> None:
        """Leave the cache full of what nobody needs, and what was written before in DRAM."""
        torch.sum(self._scratch, 1, out=self._sums)

    def _here(self, prepare: Callable[[], T], call: Callable[[T], R]) -> Timed[R]:
        ready = prepare()
        self._flush()
        start = _clock()
        result = call(ready)
        return Timed(seconds=_clock() - start, result=result)

    def _on_gpu(self, prepare: Callable[[], T], call: Callable[[T], R]) -> Timed[R]:
        start, end = _event(), _event()
        attempts = 0
        while True:
            torch.cuda.synchronize()
            begun, blocks = _clock(), _device_blocks()
            _sleep(int(self._hold * CYCLES_PER_SECOND))
            ready = prepare()
            self._flush()
            start.record()
            result = call(ready)
            end.record()
            late = start.query()  # the device got there before all of it was issued
            issuing = _clock() - begun
            end.synchronize()
            attempts += 1
            more = _device_blocks() > blocks and attempts < ATTEMPTS
            if not more and (not late or self._hold >= LONGEST_HOLD):
                seconds = start.elapsed_time(end) / 1e3
                return Timed(seconds=seconds, result=result, launch_bound=late)
            if late:
                self._hold = min(2 * max(self._hold, issuing), LONGEST_HOLD)
            del ready, result  # the next attempt takes their memory


def wall_time(
    device: str, prepare: Callable[[], T], call: Callable[[T], R], iterations: int
) -> Timed[R]:
    """Per call, of ``iterations`` in a row and one wait for the device behind them."""
    ready = prepare()
    last: list[R] = []
    for _ in range(ATTEMPTS):
        synchronize(device)
        blocks = _device_blocks()
        start = _clock()
        for _ in range(iterations):
            last.clear()  # the next call takes its memory
            last.append(call(ready))
        synchronize(device)
        seconds = (_clock() - start) / iterations
        if _device_blocks() == blocks:
            break
    return Timed(seconds=seconds, result=last[0])


def _device_blocks() -> int:
    """How often torch has asked the driver for memory."""
    return int(_memory_stats().get("num_device_alloc", 0))


def cache_bytes(device: str) -> int:
    """Size of a GPU's last cache; of a CPU's CPU_CACHE."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    return CPU_CACHE
