"""The parent's end of a target's process: talk to it by a deadline, know how it ended."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .nursery import forget_nursery, nursery
from .protocol import Channel, Closed, Header, clean

LOG_BYTES = 1 << 16  # of what the target prints, the last are kept
LAST_LINES = 8
STACK_SECONDS = 0.5  # for a process that hangs to print where
QUIET_SECONDS = 0.05  # without a further line: the stack is complete
POLL_SECONDS = 1.0
STACK = "Stack (most recent call first)"  # what faulthandler prints on demand
NEWEST = (STACK, "Fatal Python error:")
CALLING = str(Path(__file__).with_name("calling.py"))


class NoAnswer(Exception):
    """The process did not answer by its deadline."""


class Child:
    """A process that serves one target. ``end`` it, whatever happens."""

    def __init__(self) -> None:
        self._nursery = nursery()
        self._socket, theirs = socket.socketpair()
        self._log, their_log = os.pipe()
        os.set_blocking(self._log, False)
        self._printed = b""
        try:
            self.pid = self._nursery.start(theirs, their_log)
        except BaseException:
            self._socket.close()
            os.close(self._log)
            raise
        finally:
            theirs.close()
            os.close(their_log)
        self.channel = Channel(self._socket, awaiting=self._await)
        self._deadline = time.monotonic()
        self._events = selectors.DefaultSelector()
        self._events.register(self._socket, selectors.EVENT_READ)
        self._events.register(self._log, selectors.EVENT_READ)
        # Its death is seen by the end of the connection, and here even if a process that it
        # forked holds that open.
        self._death: int | None = None
        if hasattr(os, "pidfd_open"):
            self._death = os.pidfd_open(self.pid)
            self._events.register(self._death, selectors.EVENT_READ)

    def ask(self, header: Header, seconds: float, descriptors: Iterable[int] = ()) -> Header:
        """Send a header and give the next that comes back; sets the deadline for all that
        is read until the next one. Raises NoAnswer, Closed or ProtocolError."""
        self._deadline = time.monotonic() + seconds
        self._printed = b""
        self._socket.settimeout(max(seconds, 1.0))
        try:
            self.channel.send(header, descriptors=list(descriptors))
            return self.channel.receive()
        except TimeoutError:
            raise NoAnswer from None

    def end(self, grace: float = 0.0) -> str:
        """End the process, if it has not ended by itself within ``grace`` seconds; say how."""
        try:
            by_itself, code = self._nursery.end(self.pid, grace)
        except (Closed, OSError):
            # A target that killed the process it was forked from.
            forget_nursery(self._nursery)
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            how = "ended together with the process that it was started from"
        else:
            how = _in_words(code) if by_itself else "closed its connection before it answered"
        self._drain()
        self._events.close()
        self._socket.close()
        os.close(self._log)
        if self._death is not None:
            os.close(self._death)
        return how

    def print_stack(self) -> None:
        """Have a process that does not answer print where it is."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)  # for its fault handler
        until = time.monotonic() + STACK_SECONDS
        printing = True
        while printing and (left := until - time.monotonic()) > 0:
            quiet = not self._wait(min(left, QUIET_SECONDS))
            printing = not (quiet and STACK.encode() in self._printed)

    def last_lines(self) -> str:
        """The newest stack that it printed, or the last lines; each on a line of its own."""
        lines = _last_lines(self._printed.decode(errors="replace"))
        return "".join(f"\n{line}" for line in lines)

    def _await(self) -> None:
        """Return when there is something to read; raise NoAnswer at the deadline."""
        while True:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise NoAnswer
            ready = self._wait(left)
            if self._socket in ready:
                return
            if self._death is not None and self._death in ready:
                raise Closed

    def _wait(self, seconds: float) -> list[object]:
        events = self._events.select(min(seconds, POLL_SECONDS))
        ready: list[object] = [key.fileobj for key, _ in events]
        if self._log in ready:
            self._drain()
        return ready

    def _drain(self) -> None:
        """Read what has been printed, so that printing does not block; the end is kept."""
        try:
            while read := os.read(self._log, LOG_BYTES):
                self._printed = (self._printed + read)[-LOG_BYTES:]
        except BlockingIOError:
            return
        # Every writer is gone: an end of file would wake up every wait.
        with suppress(KeyError):
            self._events.unregister(self._log)


def _in_words(code: int) -> str:
    if code >= 0:
        return f"exited with status {code} before it answered"
    name = signal.Signals(-code).name
    hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def _last_lines(printed: str) -> list[str]:
    """The newest stack that was printed, without the frames of the harness, or the last lines."""
    lines = [clean(line, 300) for line in printed.splitlines() if line.strip()]
    for mark in NEWEST:
        starts = [i for i, line in enumerate(lines) if line.startswith(mark)]
        if starts:
            stack = lines[starts[-1] :]
            ours = next((i for i, line in enumerate(stack) if CALLING in line), len(stack))
            return stack[: min(ours, LAST_LINES)]
    return lines[-LAST_LINES:]
