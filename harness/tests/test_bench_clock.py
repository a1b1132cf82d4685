"""The clock of a GPU, on a device that is made up: launch overhead is kept out, or told of."""

from __future__ import annotations

import pytest
import torch

from attnproof.benchmark import clock
from attnproof.benchmark.clock import LONGEST_HOLD, DeviceClock, wall_time

ISSUING = 1e-2  # seconds that the host needs to issue what is timed
KERNEL = 3e-3


class Device:
    """A queue: its time is where the last thing in it ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.end = 0.0
        monkeypatch.setattr(clock, "_sleep", lambda n: self.add(n / clock.CYCLES_PER_SECOND))
        monkeypatch.setattr(clock, "_event", lambda: Event(self))
        monkeypatch.setattr(clock, "_clock", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def add(self, seconds: float) -> None:
        self.end = max(self.end, self.host) + seconds

    def wait(self) -> None:
        self.host = max(self.host, self.end)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.device.add(0.0)
        self.at = self.device.end

    def query(self) -> bool:
        return self.device.host >= self.at

    def synchronize(self) -> None:
        self.device.wait()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


def gpu_clock() -> DeviceClock:
    made = DeviceClock("cpu")  # for its scratch
    made.device = "cuda"
    return made


def test_the_device_is_held_until_all_is_issued(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    def call(_: object) -> str:
        device.host += ISSUING
        device.add(KERNEL)
        return "result"

    timed = gpu_clock().time(lambda: None, call)
    assert timed.seconds == pytest.approx(KERNEL)
    assert not timed.launch_bound
    assert timed.result == "result"


def test_a_call_that_waits_for_the_device_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    def call(_: object) -> None:
        device.wait()
        device.host += ISSUING
        device.add(KERNEL)

    timed = gpu_clock().time(lambda: None, call)
    assert timed.launch_bound
    assert timed.seconds == pytest.approx(ISSUING + KERNEL)
    assert device.host < 20 * LONGEST_HOLD


def test_what_comes_before_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    timed = gpu_clock().time(lambda: device.add(1.0), lambda _: device.add(KERNEL))
    assert timed.seconds == pytest.approx(KERNEL)


def test_the_wall_clock_counts_what_the_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    def call(_: object) -> None:
        device.host += ISSUING
        device.add(KERNEL)

    timed = wall_time("cuda", lambda: None, call, 10)
    assert timed.seconds == pytest.approx(ISSUING + KERNEL / 10)
