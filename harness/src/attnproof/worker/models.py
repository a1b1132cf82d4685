"""A whole model in the process of a target: the request, and its answer as JSON and raw bytes.

The parent makes the same scenario from the same plain values, knows which tensors come in which
shape and dtype, and takes those bytes and no others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_reference.problem import DTYPES

from ..models.scenario import Scenario
from ..plan import CallResult, Outcome
from .execute import DeviceLost, Executor, OutOfMemory, record_exception
from .integrity import Settings
from .messages import bytes_of, read_outcome
from .protocol import TEXT_LIMIT, Channel, Header, ProtocolError, clean

# Taken before any target is loaded: code that patches it does not reach this.
_clock = time.perf_counter


@dataclass(kw_only=True)
class ModelReply:
    """What came of a scenario. ``answer`` is that of ``running.run``, None where it failed."""

    outcome: Outcome = Outcome.ANSWERED
    reason: str = ""  # for other outcomes than ANSWERED
    unsupported: str | None = None
    raised: str | None = None
    traceback: str = ""
    complaints: list[str] = field(default_factory=list)
    seconds: float = 0.0
    tainted: bool = False  # the process must not be trusted with another
    answer: Mapping[str, Tensor] | None = None


def carry_out(scenario: Scenario, executor: Executor) -> ModelReply:
    """Run a scenario with the backend of an executor; never raises for what the backend does."""
    from ..integrations.transformers import register
    from ..models.running import run, shapes

    (name,) = register(executor.backend)
    reply, result = ModelReply(), CallResult()
    settings = Settings.now(random=False)  # making a model draws
    start = _clock()
    try:
        answer = run(scenario, name, executor.device)
        reply.answer = {tensor: answer[tensor] for tensor in shapes(scenario)}
    except BaseException as error:  # SystemExit too: it is the target's, not the run's
        if executor.interruptible and isinstance(error, KeyboardInterrupt):
            raise
        try:
            record_exception(error, result, executor.device)
        except (OutOfMemory, DeviceLost) as lost:
            is_full = isinstance(lost, OutOfMemory)
            reply.outcome = Outcome.OUT_OF_MEMORY if is_full else Outcome.CRASHED
            reply.reason, reply.tainted = str(lost), True
            return reply
    reply.seconds = _clock() - start
    reply.unsupported, reply.raised = result.unsupported, result.raised
    reply.traceback = result.traceback
    reply.complaints = executor.watch.complaints(settings)
    reply.tainted = bool(reply.complaints)
    return reply


def reply_header(reply: ModelReply) -> tuple[Header, list[memoryview]]:
    """A reply as a header, and its bytes in the order of ``running.shapes``."""
    header = {
        "outcome": str(reply.outcome),
        "reason": reply.reason,
        "unsupported": reply.unsupported,
        "raised": reply.raised,
        "traceback": reply.traceback,
        "complaints": [text[:TEXT_LIMIT] for text in reply.complaints],
        "seconds": reply.seconds,
        "tainted": reply.tainted,
        "answered": reply.answer is not None,
    }
    tensors = [] if reply.answer is None else reply.answer.values()
    return header, [bytes_of(tensor.contiguous()).data for tensor in tensors]


def read_reply(header: Header, scenario: Scenario, channel: Channel) -> ModelReply:
    """The reply that a header announces, its bytes read; ProtocolError if it is none."""
    from ..models.running import shapes

    def text(name: str) -> str | None:
        value = header.get(name)
        if value is not None and not isinstance(value, str):
            raise ProtocolError(f"{name} that is no text")
        return None if value is None else clean(value)

    outcome, reason = read_outcome(header)
    complaints, seconds = header.get("complaints"), header.get("seconds")
    if not isinstance(complaints, list) or not all(isinstance(c, str) for c in complaints):
        raise ProtocolError("complaints that are no list of texts")
    if not isinstance(seconds, float) or not math.isfinite(seconds):
        raise ProtocolError("seconds that are no number")
    answer = None
    if header.get("answered") is True:
        answer = {}
        for name, shape in shapes(scenario).items():
            answer[name] = torch.empty(shape, dtype=DTYPES[scenario.dtype])
            channel.receive_into(bytes_of(answer[name]).data)
    return ModelReply(
        outcome=outcome,
        reason=reason,
        unsupported=text("unsupported"),
        raised=text("raised"),
        traceback=text("traceback") or "",
        complaints=[clean(c) for c in complaints],
        seconds=seconds,
        tainted=header.get("tainted") is not False,
        answer=answer,
    )
