"""What both runners make of a good target, in this process: gradients, layouts, complaints."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import FLASH
from attn_reference.problem import Problem
from attnproof.backend import Capabilities
from attnproof.inputs.make import make_inputs
from attnproof.plan import Call, CallResult, Outcome, Plan, Surroundings
from attnproof.targets import TargetSpec
from attnproof.worker.arena import Arena
from attnproof.worker.execute import Executor
from attnproof.worker.integrity import Watch
from attnproof.worker.mapped import MappedArena
from attnproof.worker.runners import InProcessRunner, IsolatedRunner

MISBEHAVING = Path(__file__).with_name("misbehaving.py")
PROBLEM = Problem(heads_q=2, seqlen_q=5, seqlen_k=7, head_dim=8, dtype="fp64")
GRADIENTS = PROBLEM.replace(gradients=("q", "k", "v"))


class Plain:
    """A backend in a few lines; what it declares can be chosen."""

    name = "plain"

    def __init__(self, attention=None, **declared):
        self.capabilities = Capabilities(**declared)
        if attention is not None:
            self.attention = attention

    def precision(self, device):
        return FLASH

    def availability(self, device):
        return None

    def attention(self, inputs: Inputs, problem: Problem) -> Attention:
        out, lse = dense(inputs, problem)
        if self.capabilities.lse_base == "2":
            lse = lse / math.log(2)
        if self.capabilities.lse_layout == "bsh":
            lse = lse.transpose(1, 2)
        return Attention(out=out, lse=lse)


def dense(inputs: Inputs, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    scores = problem.softmax_scale * inputs.q @ inputs.k.transpose(-1, -2)
    if inputs.bias is not None:
        scores = scores + inputs.bias
    return torch.softmax(scores, -1) @ inputs.v, torch.logsumexp(scores, -1)


def run(
    backend, problem: Problem, calls: int = 1, interruptible: bool = False, **options
) -> list[CallResult]:
    made = [Call(problem=problem, inputs=make_inputs(problem)) for _ in range(calls)]
    plan = Plan(calls=made, **options)
    arena = Arena(plan)
    executor = Executor(
        backend=backend, device="cpu", watch=Watch.begin(), interruptible=interruptible
    )

    def read(inputs):
        for call, given in zip(plan.calls, inputs, strict=True):
            call.inputs = given
        return plan

    try:
        done = executor.carry_out(arena.fileno(), arena.map, read)
    finally:
        arena.close()
    assert done.outcome is Outcome.ANSWERED, done.reason
    return done.results


def autograd(problem: Problem, with_lse: bool = False) -> dict[str, torch.Tensor]:
    inputs = make_inputs(problem)
    leaves = [getattr(inputs, n).requires_grad_() for n in problem.gradients]
    out, lse = dense(inputs, problem)
    outputs, incoming = [out], [inputs.grad_out]
    if with_lse:
        outputs.append(lse)
        incoming.append(inputs.grad_lse.double())
    return dict(zip(problem.gradients, torch.autograd.grad(outputs, leaves, incoming), strict=True))


def assert_gradients(result: CallResult, expected: dict[str, torch.Tensor]) -> None:
    assert result.complaints == []
    assert result.raised is None, result.traceback
    taken = result.gradients.tensors()
    assert taken.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(taken[name], gradient)


@pytest.mark.parametrize("names", [("q",), ("k", "v"), ("q", "k", "v")])
def test_the_gradients_asked_for_are_those_taken(names):
    problem = PROBLEM.replace(gradients=names)
    (result,) = run(Plain(), problem)

    assert_gradients(result, autograd(problem))


def test_without_gradients_nothing_requires_grad():
    seen = []

    def attention(inputs, problem):
        seen.extend(t.requires_grad for t in inputs.tensors().values())
        return Attention(out=dense(inputs, problem)[0])

    (result,) = run(Plain(attention), PROBLEM)
    assert not any(seen)
    assert result.gradients is None


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("layout", ["bhs", "bsh"])
def test_the_gradient_of_the_lse_follows_what_is_declared(base, layout):
    problem = GRADIENTS.replace(lse_gradient=True)
    backend = Plain(lse_base=base, lse_layout=layout, returns_lse=True)
    (result,) = run(backend, problem)

    assert_gradients(result, autograd(problem, with_lse=True))


def test_without_lse_gradient_the_lse_takes_no_part():
    (result,) = run(Plain(), GRADIENTS)
    assert_gradients(result, autograd(GRADIENTS))


@pytest.mark.parametrize("layout", ["expand", "bhsd", "bhds"])
def test_an_expanded_bias_has_the_gradient_of_the_one_that_is_stored(layout):
    problem = PROBLEM.replace(
        bias="normal", bias_shape="1hq1", gradients=("bias",), layouts=(("bias", layout),)
    )
    seen = []

    def attention(inputs, problem):
        seen.append((inputs.bias.shape, inputs.bias.stride()[3]))
        return Attention(out=dense(inputs, problem)[0])

    (result,) = run(Plain(attention), problem)

    assert seen == [((1, 2, 5, 7), 0)] if layout == "expand" else [((1, 2, 5, 1), seen[0][1])]
    assert_gradients(result, autograd(problem.replace(layouts=())))


def test_an_input_without_influence_has_gradient_zero():
    def attention(inputs, problem):
        return Attention(out=inputs.q.sum(-1, keepdim=True).expand(1, 2, 5, 8) * 1)

    (result,) = run(Plain(attention), GRADIENTS)
    assert result.gradients.v.eq(0).all()
    assert result.complaints == []


def test_out_that_does_not_require_grad_is_a_complaint():
    def attention(inputs, problem):
        return Attention(out=dense(inputs, problem)[0].detach())

    (result,) = run(Plain(attention), GRADIENTS)
    assert result.complaints == ["out does not require grad: no gradient goes through it"]
    assert result.attention is not None
    assert result.gradients is None


def test_lse_that_does_not_require_grad_is_a_complaint():
    def attention(inputs, problem):
        out, lse = dense(inputs, problem)
        return Attention(out=out, lse=lse.detach())

    (result,) = run(Plain(attention), GRADIENTS.replace(lse_gradient=True))
    assert result.complaints == ["lse does not require grad: no gradient goes through it"]
    assert result.gradients is not None


def test_out_of_a_wrong_shape_is_handed_on_without_gradients():
    def attention(inputs, problem):
        return Attention(out=dense(inputs, problem)[0].transpose(1, 2))

    (result,) = run(Plain(attention), GRADIENTS)
    assert result.attention.out.shape == (1, 5, 2, 8)
    assert (result.raised, result.gradients) == (None, None)


def test_something_else_than_an_attention_is_a_complaint():
    (result,) = run(Plain(lambda inputs, problem: inputs.q * 2), PROBLEM)
    assert result.complaints == ["returned a Tensor, not an Attention"]


def test_results_are_copies_with_the_strides_of_the_originals_told():
    def attention(inputs, problem):
        return Attention(out=dense(inputs, problem)[0].transpose(1, 2).contiguous().transpose(1, 2))

    (result,) = run(Plain(attention), PROBLEM)
    assert result.out_strides == (80, 8, 16, 1)
    assert result.attention.out.is_contiguous()


def test_the_target_sees_the_layouts_that_the_problem_names():
    problem = PROBLEM.replace(
        layouts=(("k", "bhds+gap"), ("q", "bshd+offset"), ("grad_out", "sbhd")),
        gradients=("q",),
    )
    seen = {}

    def attention(inputs, problem):
        for name in ("q", "k", "v", "grad_out"):
            tensor = getattr(inputs, name)
            seen[name] = (tensor.stride(), tensor.storage_offset())
        return Attention(out=dense(inputs, problem)[0])

    (result,) = run(Plain(attention), problem)
    assert seen == {
        "q": ((80, 8, 16, 1), 1),
        "k": ((368, 184, 1, 23), 0),
        "v": ((112, 56, 8, 1), 0),
        "grad_out": ((16, 8, 16, 1), 0),
    }
    assert_gradients(result, autograd(problem.replace(layouts=())))


def test_the_number_of_threads_is_that_of_the_plan_and_is_put_back():
    before = torch.get_num_threads()
    seen = []

    def attention(inputs, problem):
        seen.append(torch.get_num_threads())
        return Attention(out=dense(inputs, problem)[0])

    (result,) = run(Plain(attention), PROBLEM, threads=before + 2)
    assert seen == [before + 2]
    assert torch.get_num_threads() == before
    assert result.complaints == []


def test_a_gradient_that_is_the_one_that_came_in_is_no_complaint():
    def attention(inputs, problem):
        return Attention(out=inputs.v + inputs.q.sum() * 0)

    problem = PROBLEM.replace(seqlen_k=5, gradients=("v",))
    (result,) = run(Plain(attention), problem)
    assert torch.equal(result.gradients.v, make_inputs(problem).grad_out)
    assert result.complaints == []


def test_an_interrupt_of_the_user_is_not_the_targets():
    def attention(inputs, problem):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Plain(attention), PROBLEM, interruptible=True)


def test_an_interrupt_in_a_process_of_its_own_is_the_targets():
    def attention(inputs, problem):
        raise KeyboardInterrupt

    (result,) = run(Plain(attention), PROBLEM)
    assert result.raised == "KeyboardInterrupt: "


@pytest.fixture(params=[IsolatedRunner, InProcessRunner])
def runner(request):
    made = []

    def make(name: str):
        made.append(request.param(TargetSpec(f"{MISBEHAVING}:{name}"), "cpu"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def plan_of(problem: Problem, **options) -> Plan:
    return Plan(calls=[Call(problem=problem, inputs=make_inputs(problem))], **options)


@pytest.mark.parametrize("surroundings", list(Surroundings))
def test_both_runners_answer_alike(runner, surroundings):
    problem = GRADIENTS.replace(layouts=(("q", "bshd+gap"), ("v", "bhds")))
    one = runner("attention")
    assert one.describe().capabilities.returns_lse
    (result,) = one.run(plan_of(problem, surroundings=surroundings), 60).results

    assert_gradients(result, autograd(problem.replace(layouts=())))
    assert result.attention.lse.shape == (1, 2, 5)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("changes_one_element_of_k", "changed its input k: 1 of 112 elements"),
        ("out_is_q", "out shares memory with q"),
        ("changes_threads", "changed the number of threads"),
        ("uses_a_thread", None),
    ],
)
def test_both_runners_complain_alike(runner, name, complaint):
    threads = torch.get_num_threads()
    (result,) = runner(name).run(plan_of(PROBLEM.replace(dtype="fp32")), 60).results
    torch.set_num_threads(threads)

    assert len(result.complaints) == (complaint is not None)
    assert all(c.startswith(complaint) for c in result.complaints)


@pytest.mark.parametrize("name", ["side_stream", "graph_replay"])
def test_what_needs_a_gpu_is_refused_on_a_cpu(runner, name):
    plan = plan_of(PROBLEM)
    setattr(plan.calls[0], name, True)
    with pytest.raises(ValueError, match=f"{name}=True: accepted on cuda"):
        runner("attention").run(plan, 60)


def test_inputs_are_freed_when_the_plan_is_done():
    alive = []

    def attention(inputs, problem):
        alive.append(weakref.ref(inputs.q))
        return Attention(out=dense(inputs, problem)[0])

    run(Plain(attention), GRADIENTS)
    gc.collect()
    assert alive[0]() is None


def test_a_mapped_arena_of_one_plan_is_independent_of_the_next():
    plan = plan_of(PROBLEM)
    arena = Arena(plan)
    first = MappedArena(arena.fileno(), arena.map, "cpu").inputs[0].q
    arena.close()
    other = Arena(plan_of(PROBLEM.replace(seed=1)))
    assert torch.equal(first, plan.calls[0].inputs.q)
    other.close()
