"""How long a call takes: by the device's clock without launch overhead, or by the caller's.

On a GPU the queue is kept full: the device is held back until the host has issued all of what
is timed, which is verified. Before each timed call fresh inputs are written, and then more memory
than the cache has, so that a call reads its inputs from DRAM. On the CPU, which issues nothing,
the call itself is timed after the same preparations.
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
CACHES = 2  # how many times the cache is overwritten
CPU_CACHE = 1 << 24  # bytes: more than a core has; the rest is shared by a whole server

# Taken before any target is loaded: code that patches them does not reach this.
_clock = time.perf_counter
_event: Callable[[], Any] = partial(torch.cuda.Event, enable_timing=True)
_sleep: Callable[[int], None] = torch.cuda._sleep  # type: ignore[attr-defined,unused-ignore]


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
        size = CACHES * cache_bytes(device)
        self._scratch = torch.empty(size, dtype=torch.uint8, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget how long earlier calls took to be issued."""
        self._hold = HOLD_SECONDS

    def time(self, prepare: Callable[[], T], call: Callable[[T], R]) -> Timed[R]:
        """``prepare`` makes what ``call`` is given; the second alone is timed."""
        return self._on_gpu(prepare, call) if self.device == "cuda" else self._here(prepare, call)

    def _here(self, prepare: Callable[[], T], call: Callable[[T], R]) -> Timed[R]:
        ready = prepare()
        self._scratch.zero_()
        start = _clock()
        result = call(ready)
        return Timed(seconds=_clock() - start, result=result)

    def _on_gpu(self, prepare: Callable[[], T], call: Callable[[T], R]) -> Timed[R]:
        start, end = _event(), _event()
        while True:
            torch.cuda.synchronize()
            begun = _clock()
            _sleep(int(self._hold * CYCLES_PER_SECOND))
            ready = prepare()
            self._scratch.zero_()
            start.record()
            result = call(ready)
            end.record()
            late = start.query()  # the device got there before all of it was issued
            issuing = _clock() - begun
            end.synchronize()
            if not late or self._hold >= LONGEST_HOLD:
                seconds = start.elapsed_time(end) / 1e3
                return Timed(seconds=seconds, result=result, launch_bound=late)
            self._hold = min(2 * max(self._hold, issuing), LONGEST_HOLD)


def wall_time(
    device: str, prepare: Callable[[], T], call: Callable[[T], R], iterations: int
) -> Timed[R]:
    """Per call, of ``iterations`` in a row and one wait for the device behind them."""
    ready = prepare()
    synchronize(device)
    start = _clock()
    for _ in range(iterations):
        result = call(ready)
    synchronize(device)
    return Timed(seconds=(_clock() - start) / iterations, result=result)


def cache_bytes(device: str) -> int:
    """Size of a GPU's last cache; of a CPU's CPU_CACHE."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    return CPU_CACHE
