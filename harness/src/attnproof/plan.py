"""What is asked of a target in one case (a Plan of Calls) and what comes back (a Reply)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from attn_reference.inputs import Attention, Gradients, Inputs
from attn_reference.problem import Problem


class Surroundings(StrEnum):
    """What lies around every input in memory."""

    NAN = "nan"  # NaN (0xff bytes) before, after and in the gaps of every tensor
    GUARD_AFTER = "guard-after"  # an inaccessible page right behind the tensor (CPU)
    GUARD_BEFORE = "guard-before"  # an inaccessible page right before the tensor (CPU)


@dataclass(kw_only=True)
class Call:
    """One call of the target: problem and inputs (canonical shapes, any strides).

    The runner lays the inputs out in memory as ``problem.layouts`` says. Gradients named by
    the problem are taken through autograd with inputs.grad_out (and inputs.grad_lse).
    """

    problem: Problem
    inputs: Inputs
    side_stream: bool = False  # CUDA: on a stream of its own
    graph_replay: bool = False  # CUDA: captured with other values, replayed with these


@dataclass(kw_only=True)
class Plan:
    """Calls made one after another in one process; all results are kept to the end."""

    calls: list[Call]
    surroundings: Surroundings = Surroundings.NAN
    canary_allocations: bool = False  # what the target allocates is surrounded by canaries
    invalid: bool = False  # bad inputs: an exception is the right answer
    threads: int | None = None  # torch.set_num_threads for this plan


@dataclass(kw_only=True)
class CallResult:
    """What one call gave. ``complaints`` are what the runner saw go wrong beside the numbers:
    inputs changed, canaries overwritten, a lazy subclass returned, a thread left running …"""

    attention: Attention | None = None
    gradients: Gradients | None = None
    unsupported: str | None = None  # NotImplementedError said so
    raised: str | None = None  # "ValueError: …", the exception that ended the call
    traceback: str = ""
    complaints: list[str] = field(default_factory=list)
    out_strides: tuple[int, ...] | None = None
    seconds: float = 0.0


class Outcome(StrEnum):
    """How the process that ran the plan fared."""

    ANSWERED = "answered"
    CRASHED = "crashed"
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"


@dataclass(kw_only=True)
class Reply:
    """The results of a plan, a result per call that was reached."""

    outcome: Outcome
    results: list[CallResult] = field(default_factory=list)
    reason: str = ""  # for outcomes other than ANSWERED: signal, exit status, limit
