"""The same question twice, alone and in company.

Required: the forward gives the same bits for the same inputs in the same process, and every
answer lies within its budget. Information, in the reason of a verdict that conforms: whether the
gradients repeat to the bit, and whether a sequence gets the same bits alone as in a batch.
"""

from dataclasses import replace

import torch
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem

from ..cases import cases
from ..plan import Call, CallResult, Plan
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, GRADIENTS, in_each_dtype, lengths, turning

REPEATS = 4
MANY = 100
THREADS = 3


def _named(result: CallResult) -> dict[str, Tensor]:
    """The tensors of an answer by name."""
    found: dict[str, Tensor | None] = {}
    if result.attention is not None:
        found |= {"out": result.attention.out, "lse": result.attention.lse}
    if result.gradients is not None:
        found |= {f"d{name}": tensor for name, tensor in result.gradients.tensors().items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN equal to NaN: what a NaN means is the judge's to say."""
    if one.shape != other.shape:
        return False
    return torch.equal(one.nan_to_num(nan=12345.0), other.nan_to_num(nan=12345.0))


@cases(
    quick=in_each_dtype(
        turning(lengths((64, 64), (129, 300), (1, 257), (65, 97)), heads_q=4, gradients=GRADIENTS)
        + turning(({"causal": "top-left"}, {"causal": "bottom-right"}), heads_q=4, seqlen_q=129),
        fewest=True,
    ),
    full=problems(
        {
            "lengths": lengths((64, 64), (129, 300), (1, 1031), (512, 512)),
            "causal": ("none", "top-left", "bottom-right"),
            "dtype": DTYPES,
            "head_dim": (48, 64, 96, 128),
        },
        batch=2,
        heads_q=4,
        gradients=GRADIENTS,
    ),
    feature="determinism",
)
def test_repeats(problem: Problem, subject: Subject) -> None:
    """Out and LSE repeat to the bit."""
    _repeat(problem, subject, REPEATS)


@cases(
    full=turning(
        ({"head_dim": 40}, {"head_dim": 96}, {"head_dim": 128, "causal": "bottom-right"}),
        batch=4,
        heads_q=8,
        seqlen_q=200,
        seqlen_k=257,
    ),
    feature="determinism",
)
def test_many_repeats(problem: Problem, subject: Subject) -> None:
    """The same, often enough to meet a race."""
    _repeat(problem, subject, MANY)


def _repeat(problem: Problem, subject: Subject, times: int) -> None:
    """Make the same call several times; the first answers for those with the same bits."""
    problem, inputs = subject.prepare(problem)
    results = subject.run(Plan(calls=[Call(problem=problem, inputs=inputs)] * times))
    first = _named(results[0])
    subject.judge(problem, inputs, results[0])
    varying: set[str] = set()
    for result in results[1:]:
        now = _named(result)
        other = {n for n, tensor in first.items() if n not in now or not _same(now[n], tensor)}
        if other or result.complaints:
            subject.judge(problem, inputs, result)
        varying |= other
    for name in ("out", "lse"):
        if name in varying:
            raise subject.deviates(
                "determinism", f"{name} differs between {times} calls with the same inputs", name
            )
    if varying and subject.last_verdict is not None:
        subject.last_verdict.reason = f"{', '.join(sorted(varying))}: other bits in each call"


@cases(
    quick=in_each_dtype(
        turning(({"gradients": GRADIENTS}, {"causal": "top-left"}), heads_q=3, seqlen_q=129),
        fewest=True,
    ),
    full=problems(
        {
            "lengths": lengths((1, 300), (129, 129), (300, 65)),
            "causal": ("none", "top-left", "bottom-right"),
            "dtype": DTYPES,
        },
        heads_q=3,
        gradients=GRADIENTS,
    ),
    feature="determinism",
)
def test_threads(problem: Problem, subject: Subject) -> None:
    """On a number of threads that divides nothing evenly."""
    subject.check(problem, threads=THREADS)


@cases(
    quick=in_each_dtype(
        turning(
            ({}, {"causal": "bottom-right"}, {"causal": "top-left"}, {"key_lengths": (65, 1, 33)}),
            batch=3,
            heads_q=2,
            seqlen_q=33,
            seqlen_k=65,
        ),
        fewest=True,
    ),
    full=problems(
        {
            "lengths": lengths((1, 300), (64, 64), (129, 257)),
            "causal": ("none", "top-left", "bottom-right"),
            "dtype": DTYPES,
        },
        batch=5,
        heads_q=4,
    ),
    feature="batch invariance",
)
def test_batch(problem: Problem, subject: Subject) -> None:
    """Each sequence alone, and all of them in a batch."""
    problem, inputs = subject.prepare(problem)
    single = [_entry(problem, inputs, b) for b in range(problem.batch)]
    calls = [Call(problem=p, inputs=i) for p, i in [(problem, inputs), *single]]
    together, *alone = subject.run(Plan(calls=calls))
    subject.judge(problem, inputs, together)
    for (one, its_inputs), result in zip(single, alone, strict=True):
        subject.judge(one, its_inputs, result)
    assert together.attention is not None
    outs = [result.attention.out for result in alone if result.attention is not None]
    if not _same(together.attention.out, torch.cat(outs)) and subject.last_verdict is not None:
        subject.last_verdict.reason = "out: other bits alone than in a batch"


def _entry(problem: Problem, inputs: Inputs, b: int) -> tuple[Problem, Inputs]:
    """One entry of the batch as a problem of its own."""
    lengths_of_one = None if problem.key_lengths is None else (problem.key_lengths[b],)
    one = replace(problem, batch=1, key_lengths=lengths_of_one)
    parts = {name: tensor[b : b + 1] for name, tensor in inputs.tensors().items()}
    return one, Inputs(**parts)
