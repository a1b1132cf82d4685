"""How the harness and its processes talk: lines of JSON, each followed by raw bytes.

Nothing is ever unpickled. What the lines of a plan and its answer hold is in ``messages``.
"""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

HEADER_LIMIT = 1 << 22
TEXT_LIMIT = 4000

Header = dict[str, Any]
Awaiting = Callable[[], None]


class ProtocolError(Exception):
    """What arrived is not what was agreed; the message says how."""


class Closed(Exception):
    """The other side has closed the connection."""


class Channel:
    """Headers and bytes over a stream socket.

    ``awaiting`` returns when there is something to read, or raises (a deadline, a death);
    without it, reading just blocks. Open files are taken only where they are expected.
    """

    def __init__(
        self,
        connection: socket.socket,
        *,
        awaiting: Awaiting = lambda: None,
        takes_files: bool = False,
    ) -> None:
        self._socket = connection
        self._awaiting = awaiting
        self._takes_files = takes_files
        self._buffer = bytearray()
        self._descriptors: list[int] = []

    def send(
        self,
        header: Header,
        payload: Iterable[memoryview] = (),
        descriptors: Sequence[int] = (),
    ) -> None:
        """Send a header, with open files, and the bytes that belong to it."""
        line = memoryview(json.dumps(header, allow_nan=False).encode() + b"\n")
        try:
            sent = socket.send_fds(self._socket, [line], list(descriptors)) if descriptors else 0
            self._socket.sendall(line[sent:])
            for part in payload:
                self._socket.sendall(part)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def receive(self) -> Header:
        """The next header; ProtocolError for anything that is not a JSON object of its size."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > HEADER_LIMIT:
                raise ProtocolError(f"a header of over {HEADER_LIMIT} bytes")
            self._buffer += self._read_some(1 << 16)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            header = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"a header that is not JSON ({type(error).__name__})") from None
        if not isinstance(header, dict):
            raise ProtocolError("a header that is no JSON object")
        return header

    def receive_into(self, target: memoryview) -> None:
        """Fill ``target`` with the bytes that follow."""
        ready = min(len(self._buffer), len(target))
        target[:ready] = self._buffer[:ready]
        del self._buffer[:ready]
        while ready < len(target):
            self._awaiting()
            try:
                count = self._socket.recv_into(target[ready:])
            except ConnectionResetError as error:
                raise Closed from error
            if not count:
                raise Closed
            ready += count

    def take_descriptor(self) -> int:
        """The oldest open file that came with a header; it is the caller's to close."""
        if not self._descriptors:
            raise ProtocolError("a header without the open file that belongs to it")
        return self._descriptors.pop(0)

    def quiet(self) -> bool:
        """Whether nothing has arrived that was not asked for, the end of the stream included."""
        arrived = select.poll()
        arrived.register(self._socket, select.POLLIN)
        return not self._buffer and not arrived.poll(0)

    def _read_some(self, count: int) -> bytes:
        self._awaiting()
        try:
            if self._takes_files:
                data, descriptors, _, _ = socket.recv_fds(self._socket, count, 4)
                self._descriptors += descriptors
            else:
                data = self._socket.recv(count)
        except ConnectionResetError as error:
            raise Closed from error
        if not data:
            raise Closed
        return data


def clean(text: str, limit: int = TEXT_LIMIT) -> str:
    """Text of a target, cut to ``limit`` and without what could drive a terminal."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in shown
    )
