"""In the process of a target: load it, say what it is, carry out plans until there are no more."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from attn_reference.inputs import Inputs

from ..plan import Plan
from ..targets import LoadError, TargetSpec, describe, load
from .arena import ArenaMap
from .execute import Executor
from .integrity import Watch
from .messages import plan_of, results_header
from .protocol import Channel, Closed, Header


def serve(connection: socket.socket) -> None:
    """Answer what comes over the connection until the other side closes it."""
    channel = Channel(connection, takes_files=True)
    request = channel.receive()
    os.chdir(request["cwd"])
    watch = Watch.begin()
    try:
        backend = load(TargetSpec(**request["target"]))
        description = describe(backend, request["device"]).as_dict()
    except LoadError as error:
        channel.send({"load_error": str(error)})
        return
    channel.send({"description": description})
    executor = Executor(backend=backend, device=request["device"], watch=watch)
    while True:
        try:
            header = channel.receive()
        except Closed:
            return
        _answer(header, channel, executor)


def _answer(header: Header, channel: Channel, executor: Executor) -> None:
    def read(inputs: Sequence[Inputs]) -> Plan:
        return plan_of(header["plan"], inputs)

    descriptor = channel.take_descriptor()
    try:
        done = executor.carry_out(descriptor, ArenaMap.from_dict(header["arena"]), read)
    finally:
        os.close(descriptor)
    results, payload = results_header(done.results)
    answer = {
        "serial": header["serial"],
        "outcome": str(done.outcome),
        "reason": done.reason,
        "tainted": done.tainted,
        "results": results,
    }
    channel.send(answer, payload)
