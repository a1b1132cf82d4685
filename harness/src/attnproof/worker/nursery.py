"""The parent's end of the process that targets' processes are forked from."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import tempfile

from .protocol import Channel, Closed, Header, clean

START_SECONDS = 120.0  # for Python and torch to load on a busy machine
ANSWER_SECONDS = 30.0  # for a fork, or for a process to end, thereafter
CLOSE_SECONDS = 5.0
# glibc fills fresh memory with the complement of this byte: 0x7f is NaN in fp16, and beyond 1e38
# in bf16 and fp32. Its per-thread cache would hand out small blocks as they are.
MALLOC = "glibc.malloc.tcache_count=0:glibc.malloc.perturb=128"


class Nursery:
    """One such process (see ``main``), and the processes that it started."""

    def __init__(self) -> None:
        self.environment = _environment()
        self._running: set[int] = set()
        self._retired = False
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(START_SECONDS)
        self._channel = Channel(self._socket)
        tunables = self.environment.get("GLIBC_TUNABLES")
        with theirs, tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                # -P: what lies in the current folder must not shadow what is imported here.
                [sys.executable, "-P", "-u", "-m", "attnproof.worker.main", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **self.environment,
                    "GLIBC_TUNABLES": f"{tunables}:{MALLOC}" if tunables else MALLOC,
                },
                start_new_session=True,
            )
            theirs.close()
            try:
                self._channel.receive()
            except (Closed, TimeoutError) as error:
                self.close()
                log.seek(0)
                said = clean(log.read().decode(errors="replace"))
                raise RuntimeError(f"the process for targets did not start: {said}") from error
        self._socket.settimeout(ANSWER_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether the process is there: a target may have killed it."""
        return self._socket.fileno() >= 0 and self._process.poll() is None

    def start(self, connection: socket.socket, log: int) -> int:
        """Fork a process that serves ``connection`` and prints to ``log``; its pid."""
        pid = int(self._ask({"start": True}, connection.fileno(), log)["pid"])
        self._running.add(pid)
        return pid

    def end(self, pid: int, grace: float) -> tuple[bool, int]:
        """End a process, waiting ``grace`` seconds for it to do so by itself.

        Returns whether it had, and its exit code, negative for a signal.
        """
        self._running.remove(pid)
        answer = self._ask({"end": pid, "grace": grace})
        if self._retired and not self._running:
            self.close()
        return bool(answer["by_itself"]), int(answer["exit_code"])

    def _ask(self, header: Header, *descriptors: int) -> Header:
        try:
            self._channel.send(header, descriptors=descriptors)
            return self._channel.receive()
        except BaseException:
            # After an interrupt an answer is on its way that would be taken for the next.
            self._socket.close()
            raise

    def retire(self) -> None:
        """Close as soon as none of its processes is left."""
        self._retired = True
        if not self._running:
            self.close()

    def close(self) -> None:
        """End the process and those that it started."""
        self._socket.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment() -> dict[str, str]:
    # pytest names the current test in a variable, which is nobody's business.
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


_current: Nursery | None = None


def nursery() -> Nursery:
    """The nursery of this process: started on first use, and anew when it is gone or the
    environment differs from the one that it was started in."""
    global _current
    if _current is not None and not (_current.alive and _current.environment == _environment()):
        forget_nursery(_current)
    if _current is None:
        _current = Nursery()
    return _current


def forget_nursery(gone: Nursery) -> None:
    """Start another one next time; this one closes when its last process has ended."""
    global _current
    gone.retire()
    if _current is gone:
        _current = None


@atexit.register
def _close() -> None:
    if _current is not None:
        _current.close()
