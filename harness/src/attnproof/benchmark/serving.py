"""In the process of a target under a benchmark: load it, make calls, show parts of the results."""

from __future__ import annotations

import gc
import os
import socket
import time
from typing import Any

import torch
from torch import Tensor

from ..backend import Backend
from ..plan import CallResult
from ..targets import LoadError, TargetSpec, describe, load
from ..worker.execute import DeviceLost, OutOfMemory, record_exception
from ..worker.messages import bytes_of
from ..worker.protocol import TEXT_LIMIT, Channel, Closed, Header
from ..worker.returned import not_plain
from .calls import Calls
from .clock import DeviceClock, Timed
from .sample import Sample, cut
from .suites import Cell

# Taken before any target is loaded.
_clock = time.perf_counter


def serve(connection: socket.socket, torch_seconds: float) -> None:
    """Answer requests until the other side closes the connection.

    ``torch_seconds``: what importing torch took.
    """
    channel = Channel(connection)
    request = channel.receive()
    os.chdir(request["cwd"])
    device = request["device"]
    start = _clock()
    try:
        backend = load(TargetSpec(**request["target"]), device)
        seconds = torch_seconds + _clock() - start
        description = describe(backend, device).as_dict()
    except LoadError as error:
        channel.send({"load_error": str(error)[:TEXT_LIMIT]})
        return
    channel.send({"description": description, "seconds": seconds})
    server = _Server(backend, device, channel)
    try:
        while True:
            server.answer(channel.receive())
    except Closed:
        return


class _Server:
    """The backend, and what its last timed calls returned."""

    def __init__(self, backend: Backend, device: str, channel: Channel) -> None:
        self._backend, self._device, self._channel = backend, device, channel
        self._clock: DeviceClock | None = None
        self._cell: Cell | None = None
        self._returned: list[dict[str, Any]] = []

    def answer(self, request: Header) -> None:
        """Answer one request: to make calls, or to show what they returned."""
        if "show" in request:
            self._show(request)
            return
        self._returned = []
        try:
            answer = self._make_calls(Cell.from_dict(request["cell"]), request["seeds"])
        except BaseException as error:  # SystemExit too: it is the target's, not the run's
            answer = self._failure(error)
        if self._device == "cuda" and not answer.get("lost"):
            torch.cuda.empty_cache()  # the others need the memory
        self._channel.send(answer)

    def _make_calls(self, cell: Cell, seeds: list[int]) -> Header:
        """An untimed call per seed, then a timed one.

        What the untimed ones return is kept until the last is made, since it is with the timed
        ones: torch then has the memory for all of them, and none waits for the driver.
        """
        self._cell = cell
        start = _clock()
        if self._clock is None:
            self._clock = DeviceClock(self._device)
        calls = Calls(cell, self._backend, self._clock)
        kept = [calls.untimed(0)]
        first = _clock() - start
        kept += [calls.untimed(0) for _ in seeds[1:]]
        kept.clear()
        gc.disable()
        try:
            timed: list[Timed[dict[str, Any]]] = [calls.timed(seed) for seed in seeds]
        finally:
            gc.enable()
        self._returned = [one.result for one in timed]
        return {
            "first": first,
            "seconds": [one.seconds for one in timed],
            "launch_bound": any(one.launch_bound for one in timed),
            "iterations": calls.iterations,
        }

    def _failure(self, error: BaseException) -> Header:
        result = CallResult()
        try:
            record_exception(error, result, self._device)
        except OutOfMemory as full:
            return {"out_of_memory": str(full)[:TEXT_LIMIT]}
        except DeviceLost as lost:
            return {"raised": str(lost)[:TEXT_LIMIT], "lost": True}
        return {"unsupported": result.unsupported, "raised": result.raised}

    def _show(self, request: Header) -> None:
        """Send the sampled parts of what one timed call returned."""
        assert self._cell is not None
        problem, sample = self._cell.problem, Sample.from_dict(request["sample"])
        headers, payload, complaints = [], [], []
        for name, value in self._returned[request["show"]].items():
            if (why := not_plain(value, self._device)) is not None:
                complaints.append(f"{name} is {why}")
                continue
            part: Tensor = value.detach()
            if part.dim() == 4:  # of any other, the judge has to say its shape is wrong
                of_queries = name in ("out", "dq")
                group = problem.group if of_queries else 1
                try:
                    part = cut(part, sample, group, rows=of_queries)
                except (IndexError, RuntimeError) as error:
                    complaints.append(f"{name} of shape {tuple(value.shape)}: {error}")
                    continue
            part = part.contiguous().cpu()
            dtype = str(part.dtype).removeprefix("torch.")
            headers.append({"name": name, "dtype": dtype, "shape": list(part.shape)})
            payload.append(bytes_of(part).data)
        self._channel.send({"tensors": headers, "complaints": complaints}, payload)
