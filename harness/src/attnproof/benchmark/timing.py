"""Time of calls: on a GPU between events, with a cold L2, else by the clock of the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # beyond the L2 of any GPU


class DeviceClock:
    """Events around each call. The L2 is filled with other data before it, which also keeps the GPU
    busy while the host is ahead: launching is not measured."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def seconds(self, calls: list[Callable[[], Any]]) -> tuple[list[float], list[Any]]:
        """How long each of the calls took, and what it gave."""
        results, events = [], []
        for call in calls:
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            results.append(call())
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events], results


class HostClock:
    """The clock of the host around each call. On a GPU the calls are launched one behind the other,
    and the time is that until the host may go on."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"

    def seconds(self, calls: list[Callable[[], Any]]) -> tuple[list[float], list[Any]]:
        """How long each of the calls took, and what it gave."""
        taken, results = [], []
        self._wait()
        for call in calls:
            start = time.perf_counter()
            results.append(call())
            taken.append(time.perf_counter() - start)
        self._wait()
        return taken, results

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def clock(device: str, wall: bool) -> DeviceClock | HostClock:
    """The one for a cell."""
    return DeviceClock() if device == "cuda" and not wall else HostClock(device)
