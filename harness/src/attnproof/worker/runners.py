"""Runners: where a target runs. In a process of its own, or, for debuggers, in this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from attn_reference.inputs import Inputs

from ..backend import Description
from ..models.scenario import Scenario
from ..plan import Outcome, Plan, Reply, Surroundings
from ..targets import LoadError, TargetSpec, describe, load
from .arena import Arena
from .child import Child, NoAnswer
from .execute import Execution, Executor
from .integrity import Functions, Threads, Watch
from .messages import plan_header, read_outcome, read_results
from .models import ModelReply, carry_out, read_reply
from .protocol import Channel, Closed, Header, ProtocolError, clean

T = TypeVar("T")

LOAD_SECONDS = 300.0  # a target may build its kernels when it is imported
DYING_SECONDS = 5.0  # from the end of a process's connection to its own
ACCESS_SIGNALS = ("killed by SIGSEGV", "killed by SIGBUS")
GUARDED = {
    Surroundings.GUARD_AFTER: "behind",
    Surroundings.GUARD_BEFORE: "before",
}


class IsolatedRunner:
    """Runs a target in a process of its own, which any number of plans share.

    A crash, an exit, a hang or running out of memory costs the plan in which it happens, and
    what a call does to its process ends with that plan: the next plan gets a fresh process.
    The target and ``device`` ('cpu' or 'cuda') are named here; nothing is loaded before
    ``describe`` or ``run``.
    """

    def __init__(self, target: TargetSpec, device: str) -> None:
        self._target = target
        self._device = device
        self._child: Child | None = None
        self._description: Description | None = None
        self._serial = 0

    def describe(self) -> Description:
        """What the target says of itself; LoadError when it cannot be loaded."""
        if self._description is None:
            self._ready_child()
        assert self._description is not None
        return self._description

    def run(self, plan: Plan, timeout: float) -> Reply:
        """Carry out a plan within ``timeout`` seconds; never raises for what the target does.

        Raises ValueError for a plan that cannot be run on this device or whose layouts are
        not understood, OSError when there is no room for its inputs.
        """
        _check(plan, self._device)
        arena = Arena(plan)
        try:
            reply = self._answer_to(plan, arena, timeout)
            _add_changes(reply, arena)
        except BaseException:
            self.close()
            raise
        finally:
            arena.close()
        return reply

    def close(self) -> None:
        """End the process of the target."""
        if self._child is not None:
            self._take_child().end()

    def run_model(self, scenario: Scenario, timeout: float) -> ModelReply:
        """Run a whole model within ``timeout`` seconds; never raises for what the target does."""

        def read(header: Header, channel: Channel) -> ModelReply:
            return read_reply(header, scenario, channel)

        reply = self._exchange({"model": scenario.as_dict()}, timeout, read)
        if isinstance(reply, Reply):
            return ModelReply(outcome=reply.outcome, reason=reply.reason)
        if reply.tainted:
            self.close()
        return reply

    def _answer_to(self, plan: Plan, arena: Arena, timeout: float) -> Reply:
        request = {"plan": plan_header(plan), "arena": arena.map.as_dict()}

        def read(header: Header, channel: Channel) -> Reply:
            outcome, reason = read_outcome(header)
            results = read_results(header.get("results"), plan, channel)
            if outcome is Outcome.ANSWERED and len(results) != len(plan.calls):
                raise ProtocolError(f"{len(results)} results of {len(plan.calls)} calls")
            if header.get("tainted") is not False:
                self.close()
            return Reply(outcome=outcome, results=results, reason=reason)

        reply = self._exchange(request, timeout, read, [arena.fileno()])
        if reply.outcome is Outcome.CRASHED:
            reply.reason += _guard_hint(plan, reply.reason)
        return reply

    def _exchange(
        self,
        request: Header,
        timeout: float,
        read: Callable[[Header, Channel], T],
        descriptors: Sequence[int] = (),
    ) -> T | Reply:
        """Ask the process of the target, and read its answer; a Reply that says why where there
        is none."""
        try:
            child = self._ready_child()
        except LoadError as error:
            return Reply(outcome=Outcome.CRASHED, reason=f"could not be loaded again: {error}")
        self._serial += 1
        try:
            header = child.ask({"serial": self._serial, **request}, timeout, descriptors)
            if header.get("serial") != self._serial:
                raise ProtocolError("an answer to something else")
            return read(header, child.channel)
        except NoAnswer:
            reason = f"no answer within {timeout:g} s" + self._where()
            return Reply(outcome=Outcome.TIMED_OUT, reason=reason)
        except Closed:
            return Reply(outcome=Outcome.CRASHED, reason=self._how_it_ended())
        except ProtocolError as error:
            self.close()
            reason = f"sent {error}, which is no answer to what it was asked"
            return Reply(outcome=Outcome.CRASHED, reason=reason)

    def _ready_child(self) -> Child:
        """A process with the target loaded that has nothing to say unasked."""
        if self._child is not None and not self._child.channel.quiet():
            self.close()  # it has ended, or sent more than it was asked for
        return self._load() if self._child is None else self._child

    def _load(self) -> Child:
        text = self._target.text
        request = {
            "target": {"text": text, "signature": self._target.signature},
            "device": self._device,
            "cwd": os.getcwd(),
        }
        self._child = child = Child()
        try:
            header = child.ask(request, LOAD_SECONDS)
            described = self._described(header)
        except NoAnswer:
            late = f"not loaded within {LOAD_SECONDS:g} s"
            raise LoadError(f"{text}: {late}{self._where()}") from None
        except Closed:
            how = self._how_it_ended()
            raise LoadError(f"{text}: cannot be loaded, its process {how}") from None
        except ProtocolError as error:
            self.close()
            raise LoadError(f"{text}: cannot be loaded, its process sent {error}") from None
        except BaseException:
            self.close()
            raise
        self._description = self._description or described
        return child

    def _where(self) -> str:
        """Where a process that does not answer is; it is ended."""
        child = self._take_child()
        child.print_stack()
        child.end()
        lines = child.last_lines()
        return f"; it was here:{lines}" if lines else ""

    def _how_it_ended(self) -> str:
        """How a process ended that has closed its connection."""
        child = self._take_child()
        return child.end(DYING_SECONDS) + child.last_lines()

    def _take_child(self) -> Child:
        assert self._child is not None
        child, self._child = self._child, None
        return child

    def _described(self, header: Header) -> Description:
        if isinstance(said := header.get("load_error"), str):
            raise LoadError(clean(said))
        try:
            return Description.from_dict(header["description"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(
                f"{self._target.text}: describes itself in a way that is not understood: {error!r}"
            ) from None


class InProcessRunner:
    """Runs a target in this process: for debuggers, profilers and sanitizers.

    Same inputs, same surroundings, same complaints; but a crash is a crash of this process,
    nothing is timed out, and what a target does to the process stays done.
    """

    def __init__(self, target: TargetSpec, device: str) -> None:
        self._target = target
        self._device = device
        self._functions = Functions()
        self._executor: Executor | None = None

    def describe(self) -> Description:
        """What the target says of itself; LoadError when it cannot be loaded."""
        return describe(self._ready().backend, self._device)

    def run(self, plan: Plan, timeout: float) -> Reply:
        """Carry out a plan; ``timeout`` is not kept. Raises as ``IsolatedRunner.run`` does."""
        _check(plan, self._device)
        executor = self._ready()
        executor.watch = Watch(functions=self._functions, threads=Threads.running())

        def read(inputs: Sequence[Inputs]) -> Plan:
            calls = [replace(c, inputs=i) for c, i in zip(plan.calls, inputs, strict=True)]
            return replace(plan, calls=calls)

        arena = Arena(plan)
        try:
            done: Execution = executor.carry_out(arena.fileno(), arena.map, read)
            reply = Reply(outcome=done.outcome, results=done.results, reason=done.reason)
            _add_changes(reply, arena)
        finally:
            arena.close()
        return reply

    def run_model(self, scenario: Scenario, timeout: float) -> ModelReply:
        """Run a whole model; ``timeout`` is not kept."""
        executor = self._ready()
        executor.watch = Watch(functions=self._functions, threads=Threads.running())
        return carry_out(scenario, executor)

    def close(self) -> None:
        """Nothing to end."""

    def _ready(self) -> Executor:
        if self._executor is None:
            watch = Watch(functions=self._functions, threads=Threads.running())
            self._executor = Executor(
                backend=load(self._target, self._device),
                device=self._device,
                watch=watch,
                interruptible=True,
            )
        return self._executor


def _check(plan: Plan, device: str) -> None:
    for call in plan.calls:
        for name in ("side_stream", "graph_replay"):
            if getattr(call, name) and device != "cuda":
                raise ValueError(f"{name}=True: accepted on cuda, and the target runs on {device}")


def _add_changes(reply: Reply, arena: Arena) -> None:
    for result, changes in zip(reply.results, arena.changes(), strict=False):
        result.complaints += changes


def _guard_hint(plan: Plan, how: str) -> str:
    """What a guard page suggests, beside the signal that it gave."""
    if plan.surroundings not in GUARDED or not how.startswith(ACCESS_SIGNALS):
        return ""
    side = GUARDED[plan.surroundings]
    return f"\n(memory right {side} each input was inaccessible: was it read or written there?)"
