"""In the process of a target: load it, say what it is, carry out plans until there are no more."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from attn_reference.inputs import Inputs

from ..models.scenario import Scenario
from ..plan import Plan
from ..targets import LoadError, TargetSpec, describe, load
from .arena import ArenaMap
from .execute import Executor
from .integrity import Watch
from .messages import plan_of, results_header
from .models import carry_out, reply_header
from .protocol import TEXT_LIMIT, Channel, Closed, Header

# Taken before any target is loaded.
_exit, _own_pid = os._exit, os.getpid


def serve(connection: socket.socket) -> None:
    """Answer what comes over the connection until the other side closes it."""
    served_by = _own_pid()
    channel = Channel(connection, takes_files=True)
    request = channel.receive()
    os.chdir(request["cwd"])
    watch = Watch.begin()
    try:
        backend = load(TargetSpec(**request["target"]), request["device"])
        description = describe(backend, request["device"]).as_dict()
    except LoadError as error:
        channel.send({"load_error": str(error)[:TEXT_LIMIT]})
        return
    channel.send({"description": description})
    executor = Executor(backend=backend, device=request["device"], watch=watch)
    while True:
        try:
            header = channel.receive()
        except Closed:
            return
        _answer(header, channel, executor, served_by)


def _answer(header: Header, channel: Channel, executor: Executor, served_by: int) -> None:
    if "model" in header:
        _answer_model(header, channel, executor, served_by)
        return

    def read(inputs: Sequence[Inputs]) -> Plan:
        return plan_of(header["plan"], inputs)

    descriptor = channel.take_descriptor()
    try:
        done = executor.carry_out(descriptor, ArenaMap.from_dict(header["arena"]), read)
    finally:
        if _own_pid() != served_by:
            _exit(0)  # a process that the target has forked: the answer is not its to give
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


def _answer_model(header: Header, channel: Channel, executor: Executor, served_by: int) -> None:
    try:
        reply = carry_out(Scenario.from_dict(header["model"]), executor)
    finally:
        if _own_pid() != served_by:
            _exit(0)
    answer, payload = reply_header(reply)
    channel.send({"serial": header["serial"], **answer}, payload)
