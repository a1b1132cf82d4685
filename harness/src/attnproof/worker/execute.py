"""Carry out a plan: make its calls, copy what they return, look at what else they did.

Both runners use this: in a process of its own, and in this one. The inputs lie in a mapped
arena; whether they changed is for the arena's owner to say.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_reference.inputs import Attention, Gradients, Inputs

from ..backend import Backend
from ..plan import Call, CallResult, Outcome, Plan
from . import gpu
from .arena import ArenaMap
from .calling import (
    Computed,
    borrowed_memory,
    compute,
    require_gradients,
    result_bytes,
    result_limit,
)
from .canary import CanaryAllocations
from .integrity import Settings, Watch
from .mapped import MappedArena
from .returned import Returned, not_plain, shared_memory

TEXT_LIMIT = 4000  # characters of an exception's text, and of a traceback

# Taken before any target is loaded: code that patches it does not reach this.
_clock = time.perf_counter


class DeviceLost(Exception):
    """The device answers nothing any more, as a CUDA context after an illegal access."""


class OutOfMemory(Exception):
    """The target asked for more memory than there is."""


@dataclass(kw_only=True)
class Execution:
    """What came of a plan. ``tainted``: this process must not be trusted with another one."""

    outcome: Outcome = Outcome.ANSWERED
    results: list[CallResult] = field(default_factory=list)
    reason: str = ""
    tainted: bool = False


@dataclass(kw_only=True)
class Executor:
    """A backend on a device, ready to carry out plans.

    ``watch`` is begun before the target is loaded. Make one for each process. A
    KeyboardInterrupt is the target's own, unless the process is ``interruptible``.
    """

    backend: Backend
    device: str
    watch: Watch
    interruptible: bool = False

    def carry_out(
        self, descriptor: int, arena: ArenaMap, read: Callable[[Sequence[Inputs]], Plan]
    ) -> Execution:
        """Map the arena in that open file, and make the calls of a plan one after another.

        ``read`` gives the plan on the inputs of the arena. Never raises for what the target
        does.
        """
        try:
            mapped = MappedArena(descriptor, arena, self.device)
        except torch.OutOfMemoryError as error:
            return Execution(outcome=Outcome.OUT_OF_MEMORY, reason=_text_of(error), tainted=True)
        done = self._execute(read(mapped.inputs), mapped.remember)
        if done.outcome is Outcome.ANSWERED:
            mapped.write_back()
        return done

    def _execute(self, plan: Plan, remember: gpu.Remember) -> Execution:
        done = Execution()
        kept: list[Returned] = []
        threads = torch.get_num_threads()
        try:
            if plan.threads is not None:
                torch.set_num_threads(plan.threads)
            for call in plan.calls:
                self._call(call, plan.canary_allocations, remember, done, kept)
            _read_again(kept, done.results)
        except OutOfMemory as error:
            done.outcome, done.reason, done.tainted = Outcome.OUT_OF_MEMORY, str(error), True
        except DeviceLost as error:
            done.outcome, done.reason, done.tainted = Outcome.CRASHED, str(error), True
        finally:
            torch.set_num_threads(threads)
        return done

    def _call(
        self,
        call: Call,
        canary_allocations: bool,
        remember: gpu.Remember,
        done: Execution,
        kept: list[Returned],
    ) -> None:
        """Make one call; its result joins ``done``, the tensors that it returned ``kept``."""
        result, returned = CallResult(), Returned(live={})
        canaries = CanaryAllocations() if canary_allocations else None
        leaves = require_gradients(call)
        if self.device == "cuda":
            gpu.poison_free_memory(result_bytes(call), self.device)
        settings = Settings.now(random=call.problem.dropout == 0)
        computed: Computed | None = None
        start = _clock()
        try:
            with canaries if canaries is not None else nullcontext():
                computed = self._compute(call, leaves, remember)
        except BaseException as error:  # SystemExit too: it is the target's, not the run's
            if self.interruptible and isinstance(error, KeyboardInterrupt):
                raise
            record_exception(error, result, self.device)
        result.seconds = _clock() - start
        if computed is not None:
            # Copied before anything else, so that what is written late is seen as a change.
            returned = _collect(computed, result, self.device, result_limit(call))
            result.complaints += borrowed_memory(returned.live, leaves)
            result.complaints += _reused(returned, kept)
        process = self.watch.complaints(settings)
        if canaries is not None:
            process += canaries.complaints()
        result.complaints += process
        done.tainted = done.tainted or bool(process)
        done.results.append(result)
        kept.append(returned)

    def _compute(self, call: Call, leaves: Inputs, remember: gpu.Remember) -> Computed:
        def plainly() -> Computed:
            return compute(call, leaves, self.backend, self.device)

        if call.side_stream:
            computed = gpu.on_side_stream(leaves, remember, plainly)
        elif call.graph_replay:
            computed = gpu.replayed(leaves, remember, plainly)
        else:
            computed = plainly()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return computed


def _collect(computed: Computed, result: CallResult, device: str, limit: int) -> Returned:
    """Copy the plain tensors into the result, complain about everything else.

    limit: bytes of a tensor above which it is not looked at (an expanded one costs nothing).
    """
    result.complaints += computed.complaints
    if type(computed.attention) is not Attention:
        kind = type(computed.attention).__qualname__
        result.complaints.append(f"returned a {kind}, not an Attention")
    live: dict[str, Tensor] = {}
    for name, value in computed.named():
        if (why := not_plain(value, device)) is not None:
            result.complaints.append(f"{name} is {why}")
            continue
        assert isinstance(value, Tensor)
        if value.numel() * value.element_size() > limit:
            result.complaints.append(f"{name} has shape {tuple(value.shape)}, absurdly large")
        else:
            live[name] = value
    returned = Returned(live=live)
    copies = returned.copies
    if "out" in copies:
        result.out_strides = tuple(live["out"].stride())
        result.attention = Attention(
            out=copies["out"], lse=copies.get("lse"), keep_mask=copies.get("keep_mask")
        )
    if computed.gradients:
        result.gradients = Gradients(**{n: copies.get(f"d{n}") for n in computed.gradients})
    return returned


def _reused(returned: Returned, kept: list[Returned]) -> list[str]:
    """Complaints about results in the memory of results of earlier calls, which are kept."""
    earlier = [
        (f"{name} of call {number}, which is still in use", tensor)
        for number, one in enumerate(kept, start=1)
        for name, tensor in one.live.items()
    ]
    here = f"of call {len(kept) + 1}"
    live = {f"{name} {here}": tensor for name, tensor in returned.live.items()}
    return list(shared_memory(live, earlier))


def _read_again(kept: list[Returned], results: list[CallResult]) -> None:
    """Complain about results that are no longer what they were when their call returned."""
    for number, (returned, result) in enumerate(zip(kept, results, strict=True), start=1):
        since = f"call {number + 1} returned" if number < len(kept) else "it was returned"
        for name in returned.changed():
            result.complaints.append(
                f"{name} of call {number} changed after {since}: "
                "its memory is used again, or it is written late"
            )


def record_exception(error: BaseException, result: CallResult, device: str) -> None:
    """Put an exception of the target where it belongs; raises when it ends the plan."""
    text = f"{type(error).__name__}: {_text_of(error)}"[:TEXT_LIMIT]
    if _is_out_of_memory(error, text):
        raise OutOfMemory(text) from None
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise DeviceLost(f"the GPU is lost to this process: {lost}"[:TEXT_LIMIT]) from None
    if isinstance(error, NotImplementedError):
        result.unsupported = _text_of(error)[:TEXT_LIMIT] or "NotImplementedError, no reason given"
        return
    result.raised = text
    result.traceback = "".join(traceback.format_exception(error))[-TEXT_LIMIT:]


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return "(its text cannot be had)"


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU allocator, and CUDA outside the caching allocator, say so in a RuntimeError.
    said = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(s in text for s in said)
