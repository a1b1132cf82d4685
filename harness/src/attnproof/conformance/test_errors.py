"""Bad inputs get an exception, never a wrong answer, a crash or a hang.

Each check spoils the inputs of a valid problem in one way. Where tensors contradict each
other there is no right answer, so any exception passes and any answer does not; where the
contract is silent (mixed dtypes, sizes of 1) the right answer passes as well.
"""

from dataclasses import replace

import torch

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem

from ..cases import cases
from ..plan import Call, CallResult, Plan
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, GRADIENTS, in_each_dtype, turning

VALID = in_each_dtype(turning(({},), batch=2, heads_q=4, seqlen_q=33, seqlen_k=65))
MORE = problems(
    {"dtype": DTYPES, "gradients": ((), GRADIENTS), "seqlen_q": (1, 64)},
    batch=2,
    heads_q=4,
    seqlen_k=65,
)


def _answer(subject: Subject, problem: Problem, inputs: Inputs) -> CallResult | None:
    """What the target answers to these inputs; None when it refuses them."""
    result = subject.run(Plan(calls=[Call(problem=problem, inputs=inputs)], invalid=True))[0]
    refused = result.raised is not None or result.unsupported is not None
    return None if refused else result


def _must_refuse(subject: Subject, problem: Problem, inputs: Inputs, what: str) -> None:
    """There is no right answer."""
    if _answer(subject, problem, inputs) is not None:
        raise subject.deviates("error", f"{what}: answered without an exception")


@cases(quick=VALID, full=MORE, feature="errors")
def test_head_dim_of_k(problem: Problem, subject: Subject) -> None:
    """k with another head_dim than q."""
    problem, inputs = subject.prepare(problem)
    inputs.k = inputs.k[..., : problem.head_dim // 2].contiguous()
    _must_refuse(subject, problem, inputs, f"head_dim {problem.head_dim} of q, half of it in k")


@cases(quick=VALID, full=MORE, feature="errors")
def test_length_of_v(problem: Problem, subject: Subject) -> None:
    """v with fewer keys than k."""
    problem, inputs = subject.prepare(problem)
    inputs.v = inputs.v[:, :, :-1].contiguous()
    _must_refuse(subject, problem, inputs, f"{problem.keys} keys in k, one less in v")


@cases(quick=VALID, full=MORE, feature="errors")
def test_heads(problem: Problem, subject: Subject) -> None:
    """Query heads that are no multiple of the key/value heads."""
    problem, inputs = subject.prepare(problem)
    inputs.k, inputs.v = inputs.k[:, :3].contiguous(), inputs.v[:, :3].contiguous()
    _must_refuse(subject, problem, inputs, "4 heads in q, 3 in k and v")


@cases(quick=VALID, full=MORE, feature="errors")
def test_heads_of_v(problem: Problem, subject: Subject) -> None:
    """k and v with different heads: refused, or each shared by a group of its own."""
    problem, inputs = subject.prepare(replace(problem, gradients=()))
    fewer = replace(inputs, v=inputs.v[:, :2].contiguous())
    if answered := _answer(subject, problem, fewer):
        fewer.v = fewer.v.repeat_interleave(2, 1)
        subject.judge(problem, fewer, answered)


@cases(quick=VALID, full=MORE, feature="errors")
def test_batch(problem: Problem, subject: Subject) -> None:
    """More entries in the batch of q than in that of k and v."""
    problem, inputs = subject.prepare(problem)
    inputs.q = torch.cat([inputs.q, inputs.q[:1]])
    if inputs.grad_out is not None:
        inputs.grad_out = torch.cat([inputs.grad_out, inputs.grad_out[:1]])
    _must_refuse(subject, problem, inputs, "batch 3 of q, 2 of k and v")


@cases(quick=VALID, full=MORE, feature="errors")
def test_batch_of_one(problem: Problem, subject: Subject) -> None:
    """One entry in the batch of k and v: refused, or shared by all of q."""
    problem, inputs = subject.prepare(replace(problem, gradients=()))
    shared = replace(inputs, k=inputs.k[:1].contiguous(), v=inputs.v[:1].contiguous())
    if answered := _answer(subject, problem, shared):
        shape = (problem.batch, -1, -1, -1)
        shared.k, shared.v = shared.k.expand(shape), shared.v.expand(shape)
        subject.judge(problem, shared, answered)


@cases(quick=VALID, full=MORE, feature="errors")
def test_mixed_dtypes(problem: Problem, subject: Subject) -> None:
    """k and v in another dtype than q: refused, or converted."""
    problem, inputs = subject.prepare(replace(problem, gradients=()))
    other = torch.float32 if problem.dtype != "fp32" else torch.bfloat16
    mixed = replace(inputs, k=inputs.k.to(other), v=inputs.v.to(other))
    if answered := _answer(subject, problem, mixed):
        own = problem.torch_dtype
        mixed.k, mixed.v = mixed.k.to(own), mixed.v.to(own)
        subject.judge(problem, mixed, answered)


@cases(
    quick=in_each_dtype(
        turning(({"mask": "random"},), batch=2, heads_q=4, seqlen_q=33, seqlen_k=65)
    ),
    full=problems(
        {"dtype": DTYPES, "mask_shape": ("bhqk", "11qk")},
        batch=2,
        heads_q=4,
        seqlen_q=33,
        seqlen_k=65,
        mask="random",
    ),
    feature="errors",
)
def test_shape_of_mask(problem: Problem, subject: Subject) -> None:
    """A mask with one key more than there are."""
    problem, inputs = subject.prepare(problem)
    assert inputs.mask is not None
    inputs.mask = torch.cat([inputs.mask, inputs.mask[..., :1]], -1)
    _must_refuse(subject, problem, inputs, f"a mask for {problem.keys + 1} keys")


@cases(
    quick=in_each_dtype(
        turning(({"bias": "normal"},), batch=2, heads_q=4, seqlen_q=33, seqlen_k=65)
    ),
    full=problems(
        {"dtype": DTYPES, "bias_shape": ("bhqk", "1hqk")},
        batch=2,
        heads_q=4,
        seqlen_q=33,
        seqlen_k=65,
        bias="normal",
    ),
    feature="errors",
)
def test_shape_of_bias(problem: Problem, subject: Subject) -> None:
    """A bias for one head less than there are."""
    problem, inputs = subject.prepare(problem)
    assert inputs.bias is not None
    inputs.bias = inputs.bias[:, 1:].contiguous()
    _must_refuse(subject, problem, inputs, f"a bias for {problem.heads_q - 1} heads")
