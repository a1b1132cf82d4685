"""Asks the registered backends what they are, each in a process of its own, side by side.

``python -m attnproof.doctor.asking DEVICE UNTIL``: UNTIL is a reading of ``time.monotonic()``, at
which backends that have not answered are given up.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import EntryPoint
from typing import IO, Any

from ..environment import cores
from ..registry import registered
from .probing import answers, say

LIMIT_SECONDS = 5.0  # for one backend
AT_LEAST = 8  # at a time: those that hang hold up no others
CHUNK = 1 << 16


def describe(name: str, source: str, device: str) -> dict[str, Any]:
    """What a backend says of itself, as plain values; imports it."""
    from ..device import current_devices
    from ..environment import free_memory_bytes
    from ..installation import Installable, Machine, installer, missing_tools, remedy
    from ..options import resolved_device
    from ..requirement import requirement_of
    from ..targets import LoadError, TargetSpec, load
    from ..targets import describe as describe_target

    values: dict[str, Any] = {"name": name, "source": source}
    device = resolved_device(device)
    try:
        backend = load(TargetSpec(name), device)
        told = describe_target(backend, device)
    except LoadError as error:
        return values | {"available": False, "reason": str(error)}
    requirement = requirement_of(backend)
    values |= {
        "available": told.unavailable is None,
        "reason": told.unavailable,
        "refused_dtypes": dict(told.refused_dtypes),
        "requirement": None if requirement is None else asdict(requirement),
        "precision": told.precision.as_dict(),
        "capabilities": told.capabilities.as_dict(),
    }
    gpus = current_devices() if device == "cuda" else []
    fits = device in told.capabilities.devices and not any(
        requirement.unmet(gpu) for gpu in gpus if requirement is not None
    )
    if told.unavailable is not None and isinstance(backend, Installable) and fits:
        machine = Machine(
            cores=cores(),
            free_memory=free_memory_bytes(),
            capabilities=tuple(gpu.capability for gpu in gpus),
            installer=installer(),
            missing_tools=missing_tools(),
        )
        values["remedy"] = remedy(backend, machine).as_dict()
    return values


def unanswered(point: EntryPoint, reason: str) -> dict[str, Any]:
    """What is known of a backend that does not answer."""
    return {"name": point.name, "source": point.value, "available": False, "reason": reason}


class Asked:
    """A backend that was asked, in a process forked from this one, and has yet to answer."""

    def __init__(self, point: EntryPoint, device: str) -> None:
        self.point = point
        self.since = time.monotonic()
        self.pipe, theirs = os.pipe()
        self._text = b""
        self._pid = os.fork()
        if not self._pid:
            _answer(point, device, theirs)
        os.close(theirs)

    def read(self) -> bool:
        """Take what has come; False when that was all."""
        chunk = os.read(self.pipe, CHUNK)
        self._text += chunk
        return bool(chunk)

    def end(self, reason: str | None = None) -> dict[str, Any]:
        """End its process; what it said, or with a reason why it is given up."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        os.close(self.pipe)
        if reason is None:
            with suppress(ValueError):
                values: dict[str, Any] = json.loads(self._text)
                return values
            reason = "its process ended while it was asked"
        return unanswered(self.point, reason)


def _answer(point: EntryPoint, device: str, pipe: int) -> None:
    """In the forked process; never returns."""
    try:
        os.setsid()
        text = json.dumps(describe(point.name, point.value, device)).encode()
    except BaseException as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        text = json.dumps(unanswered(point, said)).encode()
    while text:
        text = text[os.write(pipe, text) :]
    os._exit(0)


def ask_all(points: list[EntryPoint], device: str, until: float, out: IO[str]) -> None:
    """Say of each backend what it answers, as it answers."""
    import attnproof.targets  # noqa: F401  torch is imported once, for all of them

    waiting = list(points)
    asked: dict[int, Asked] = {}
    with selectors.DefaultSelector() as events:

        def end(one: Asked, reason: str | None = None) -> None:
            events.unregister(one.pipe)
            del asked[one.pipe]
            say(out, {"backend": one.end(reason)})

        while (waiting or asked) and time.monotonic() < until:
            while waiting and len(asked) < max(AT_LEAST, cores()):
                one = Asked(waiting.pop(0), device)
                asked[one.pipe] = one
                events.register(one.pipe, selectors.EVENT_READ, one)
            for key, _ in events.select(0.05):
                if not key.data.read():
                    end(key.data)
            for one in list(asked.values()):
                if time.monotonic() - one.since > LIMIT_SECONDS:
                    end(one, _no_answer(one, f" within {LIMIT_SECONDS:g} s"))
        for one in list(asked.values()):
            end(one, _no_answer(one, " in the time that there was"))


def _no_answer(one: Asked, limit: str) -> str:
    """That it was given up; some libraries take longer to import than anybody waits for doctor."""
    return f"no answer{limit}; attnproof check {one.point.name} waits for it"


def main(device: str, until: str) -> None:
    """Ask every registered backend."""
    ask_all(list(registered().values()), device, float(until), answers())


if __name__ == "__main__":
    main(*sys.argv[1:])
