"""The parent's end of a target under a benchmark: a process that makes calls when it is asked."""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backend import Description
from ..targets import LoadError, TargetSpec
from ..worker.messages import DTYPES, bytes_of
from ..worker.protocol import Channel, Closed, Header, ProtocolError, clean
from .sample import Sample
from .suites import Cell

LOAD_SECONDS = 300.0  # a target may build its kernels when it is imported
LAST_LINES = 6
SHOWN_BYTES = 1 << 31  # more than any sample has


class Failed(Exception):
    """No times came of a request. ``kind``: unsupported, crashed, timed out or out of memory."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class OutOfTime(Exception):
    """The time of the whole run is over."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a few timed calls in a row took: seconds each, and of the first untimed one."""

    seconds: tuple[float, ...]
    first: float
    iterations: int
    launch_bound: bool


class Peer:
    """A target in a process of its own, started when it is first needed, and again after a crash.

    A process waits for the parent whenever another one is timed. ``close`` it. From ``end`` on, a
    time of ``time.monotonic``, whatever waits for it raises OutOfTime.
    """

    def __init__(self, spec: TargetSpec, device: str, end: float = math.inf) -> None:
        self.spec, self.device, self.end = spec, device, end
        self.import_seconds = math.nan  # of torch and the target, in its first process
        self._description: Description | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """As the user named it."""
        return self.spec.text

    def describe(self) -> Description:
        """What the target says of itself; LoadError when it cannot be loaded."""
        if self._description is None:
            self._start()
        assert self._description is not None
        return self._description

    def begin(self, cell: Cell, seeds: Sequence[int], seconds: float) -> None:
        """Have it make an untimed call and a timed one for each seed, within ``seconds``; this does
        not wait for them. Failed when it cannot be asked."""
        self._send({"cell": cell.as_dict(), "seeds": list(seeds)}, seconds)

    def finish(self, count: int) -> Turn:
        """What came of the ``count`` timed calls that were begun; Failed when nothing did."""
        answer = self._receive()
        if (text := answer.get("unsupported")) is not None:
            raise Failed("unsupported", clean(str(text)))
        if (text := answer.get("out_of_memory")) is not None:
            raise Failed("out of memory", clean(str(text)))
        if (text := answer.get("raised")) is not None:
            if answer.get("lost"):
                self.close()
            raise Failed("crashed", f"raised {clean(str(text))}")
        times = [answer.get("first"), *_list(answer.get("seconds"))]
        if len(times) != 1 + count or not all(_is_time(t) for t in times):
            raise Failed("crashed", "sent times that are no numbers above 0")
        return Turn(
            seconds=tuple(times[1:]),
            first=times[0],
            iterations=int(answer.get("iterations", 1)),
            launch_bound=answer.get("launch_bound") is True,
        )

    def show(self, call: int, sample: Sample, seconds: float) -> tuple[dict[str, Tensor], str]:
        """The sampled parts of what a call of the last turn returned, on the CPU, and what is
        wrong with others, if anything is."""
        self._send({"show": call, "sample": sample.as_dict()}, seconds)
        answer = self._receive()
        awaited: dict[str, Tensor] = {}
        try:
            for header in _list(answer.get("tensors")):
                awaited[str(header["name"])] = _announced(header)
        except (KeyError, TypeError, ValueError):
            self.close()
            raise Failed("crashed", "sent tensors that are none") from None
        try:
            for tensor in awaited.values():
                self._channel.receive_into(bytes_of(tensor).data)
        except TimeoutError:
            raise self._late() from None
        except Closed:
            raise self._ended() from None
        return awaited, "; ".join(clean(str(c)) for c in _list(answer.get("complaints")))

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._socket.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        self._log.close()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        with theirs:
            self._process = subprocess.Popen(
                # -P: what lies in the current folder must not shadow what is imported here.
                [sys.executable, "-P", "-m", "attnproof.benchmark.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
        self._channel = Channel(self._socket, awaiting=self._await)
        target = {"text": self.spec.text, "signature": self.spec.signature}
        request = {"target": target, "device": self.device, "cwd": os.getcwd()}
        try:
            self._post(request, LOAD_SECONDS)
            answer = self._receive()
            if (text := answer.get("load_error")) is not None:
                raise LoadError(clean(str(text)))
            described = Description.from_dict(answer["description"])
        except Failed as failed:
            raise LoadError(f"{self.name}: cannot be loaded: {failed.reason}") from None
        except BaseException:
            self.close()
            raise
        if self._description is None:
            self._description, self.import_seconds = described, float(answer["seconds"])

    def _send(self, request: Header, seconds: float) -> None:
        """Ask; an answer is due in that time."""
        if self._process is None:
            try:
                self._start()
            except LoadError as error:
                raise Failed("crashed", f"could not be loaded again: {error}") from None
        self._post(request, seconds)

    def _post(self, request: Header, seconds: float) -> None:
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
        self._heard = False
        try:
            self._channel.send(request)
        except Closed:
            raise self._ended() from None

    def _receive(self) -> Header:
        """The answer."""
        try:
            return self._channel.receive()
        except TimeoutError:
            raise self._late() from None
        except Closed:
            raise self._ended() from None
        except ProtocolError as error:
            self.close()
            raise Failed("crashed", f"sent {error}") from None

    def _late(self) -> Exception:
        """Why it is no longer waited for, which ends its process."""
        self.close()
        if time.monotonic() >= self.end:
            return OutOfTime()
        return Failed("timed out", f"no answer within {self._seconds:g} s")

    def _ended(self) -> Failed:
        """Why its process is gone."""
        how = self._how_it_ended()
        self.close()
        return Failed("crashed", how)

    def _await(self) -> None:
        """Return when there is something to read; TimeoutError at the deadline.

        An answer whose beginning lies there is in time, whenever it is looked for: several may be
        awaited one after the other. The rest of it has to come before the deadline.
        """
        left = min(self._deadline, self.end) - time.monotonic()
        if left <= 0 and self._heard:
            raise TimeoutError
        if not select.select([self._socket], [], [], max(left, 0.0))[0]:
            raise TimeoutError
        self._heard = True

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return "closed its connection before it answered"
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        self._log.seek(0)
        lines = clean(self._log.read().decode(errors="replace")).splitlines()[-LAST_LINES:]
        return "\n".join([f"its process ended: {how}", *lines])


def _is_time(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _announced(header: Header) -> Tensor:
    """Memory for one announced tensor."""
    shape, dtype = header["shape"], DTYPES[header["dtype"]]
    if math.prod(shape) * dtype.itemsize > SHOWN_BYTES:
        raise ValueError(f"shape {shape}: more than was asked for")
    return torch.empty(shape, dtype=dtype)
