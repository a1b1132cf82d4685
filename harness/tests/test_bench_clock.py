"""The clock of a GPU, on a device that is made up: launch overhead is kept out, or told of, and
so are the driver's time for memory and what was written before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attn_reference.inputs import Attention, Inputs
from attn_reference.problem import Problem
from attnproof.benchmark import clock, serving
from attnproof.benchmark.clock import ATTEMPTS, CACHES, LONGEST_HOLD, DeviceClock, wall_time
from attnproof.benchmark.suites import Cell

ISSUING = 1e-2  # seconds that the host needs to issue what is timed
KERNEL = 3e-3


class Device:
    """A queue: its time is where the last thing in it ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.end = 0.0
        self.blocks = 0  # of memory that the driver was asked for
        monkeypatch.setattr(clock, "_memory_stats", lambda: {"num_device_alloc": self.blocks})
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


class Flushing(TorchDispatchMode):
    """Counts bytes that operations read and write."""

    read = written = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        given |= kwargs or {}
        for argument in func._schema.arguments:
            value = given.get(argument.name)
            if isinstance(value, torch.Tensor):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.written += value.nbytes
                else:
                    self.read += value.nbytes
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cache_is_emptied_by_reading(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written would have to go to DRAM while the call is timed."""
    Device(monkeypatch)
    made = gpu_clock()
    made.device = device
    with Flushing() as counted:
        made.time(lambda: None, lambda _: None)
    assert counted.read >= CACHES * clock.CPU_CACHE
    assert counted.written < clock.CPU_CACHE / 100


@pytest.mark.parametrize("how", ["device", "wall"])
def test_no_timed_call_waits_for_memory_of_the_driver(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made again, when what came of the attempt is gone."""
    device = Device(monkeypatch)
    alive: list[int] = []
    results = weakref.WeakSet[torch.Tensor]()

    def call(_: object) -> torch.Tensor:
        alive.append(len(results))
        asks = len(alive) == 1
        device.blocks += asks
        device.host += 1.0 * asks
        device.add(KERNEL)
        result = torch.ones(1)
        results.add(result)
        return result

    time: dict[str, Callable[[], clock.Timed[torch.Tensor]]] = {
        "device": lambda: gpu_clock().time(lambda: None, call),
        "wall": lambda: wall_time("cuda", lambda: None, call, 1),
    }
    assert time[how]().seconds == pytest.approx(KERNEL)
    assert alive == [0, 0]


def test_what_asks_for_memory_in_every_call_is_timed_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch)

    def call(_: object) -> None:
        device.blocks += 1
        device.add(KERNEL)

    assert gpu_clock().time(lambda: None, call).seconds == pytest.approx(KERNEL)
    assert device.blocks == ATTEMPTS


class Alive:
    """A backend that notes how many results are alive when it is called."""

    def __init__(self) -> None:
        self.results = weakref.WeakSet[torch.Tensor]()
        self.alive: list[int] = []

    def attention(self, inputs: Inputs, problem: Problem) -> Attention:
        self.alive.append(len(self.results))
        out = torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)
        self.results.add(out)
        return Attention(out=out)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_timed_calls_find_as_much_memory_as_the_untimed_left(direction: str) -> None:
    """Results of timed calls are kept, and so are those of the untimed calls before them."""
    backend = Alive()
    server = serving._Server(backend, "cpu", None)  # type: ignore[arg-type]
    problem = Problem(gradients=("q", "k", "v") if direction == "backward" else ())
    server._make_calls(Cell(suite="test", direction=direction, problem=problem), [1, 2, 3])
    untimed, timed = backend.alive[:3], backend.alive[3:]
    assert timed == untimed
