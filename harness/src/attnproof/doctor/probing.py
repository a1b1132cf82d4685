"""Programs that look at this machine, side by side, each cut off when it takes too long.

What a probe finds out it prints, a line of JSON at a time or as the tool of somebody else does, so
that what it said before it hung is kept. A program that cannot be killed is left behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO, Any

POLL_SECONDS = 0.02
DYING_SECONDS = 0.3  # from being killed to being gone
TAIL = 300  # characters of what a program says when it fails


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a probe said, and what went wrong with it."""

    output: str = ""
    problem: str | None = None

    def values(self) -> list[dict[str, Any]]:
        """The lines of JSON; others, and one that was cut off, are passed over."""
        found = []
        for line in self.output.splitlines():
            with suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(value)
        return found


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package; nothing in the current folder shadows it."""
    return [sys.executable, "-P", "-m", f"{__package__}.{name}", *arguments]


def run(probes: Mapping[str, list[str]], seconds: float) -> dict[str, Answer]:
    """Run commands side by side for ``seconds`` at most: an Answer for each, whatever happens."""
    until = time.monotonic() + seconds
    answers: dict[str, Answer] = {}
    with ExitStack() as stack:
        running: dict[str, _Running] = {}
        for name, command in probes.items():
            try:
                running[name] = _Running(
                    command,
                    out=stack.enter_context(tempfile.TemporaryFile()),
                    err=stack.enter_context(tempfile.TemporaryFile()),
                )
            except OSError as error:
                reason = "is not here" if isinstance(error, FileNotFoundError) else error.strerror
                answers[name] = Answer(problem=f"{command[0]}: {reason}")
        while time.monotonic() < until and any(one.goes_on for one in running.values()):
            time.sleep(POLL_SECONDS)
        late = [one for one in running.values() if one.goes_on]
        for one in late:
            one.kill()
        for one in late:
            one.await_end()
        for name, one in running.items():
            answers[name] = one.answer(f"no answer within {seconds:g} s" if one in late else None)
    return answers


class _Running:
    """A program that runs, in a process group of its own, and prints into files."""

    def __init__(self, command: list[str], *, out: IO[bytes], err: IO[bytes]) -> None:
        self._out, self._err = out, err
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )

    @property
    def goes_on(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def await_end(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(DYING_SECONDS)
        # One that hangs in the kernel stays; nothing waits for it.
        self._process.returncode = self._process.returncode or -signal.SIGKILL

    def answer(self, problem: str | None) -> Answer:
        status = self._process.returncode
        if problem is None and status:
            said = " ".join(_read(self._err).split())[-TAIL:]
            how = f"exit status {status}" if status > 0 else f"killed by signal {-status}"
            problem = f"{how}: {said}" if said else how
        return Answer(output=_read(self._out), problem=problem)


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def say(file: IO[str], values: Mapping[str, Any]) -> None:
    """In a probe: one line, at once."""
    file.write(json.dumps(values) + "\n")
    file.flush()


def answers() -> IO[str]:
    """In a probe: standard output for ``say``; what others print there goes to standard error."""
    file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return file
