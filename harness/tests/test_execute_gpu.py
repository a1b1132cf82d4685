"""What is done to a call, and found out about it, on a GPU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from attn_reference.problem import Problem
from attnproof.inputs.make import make_inputs
from attnproof.plan import Call, CallResult, Outcome, Plan
from attnproof.targets import TargetSpec
from attnproof.worker.runners import InProcessRunner, IsolatedRunner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

MISBEHAVING = Path(__file__).with_name("misbehaving.py")
PROBLEM = Problem(heads_q=2, seqlen_q=33, head_dim=16)
GRADIENTS = PROBLEM.replace(gradients=("q", "k", "v"))
WAYS = ({}, {"side_stream": True}, {"graph_replay": True})


def plan_of(problem: Problem = PROBLEM, *, calls: int = 1, canaries: bool = False, **way) -> Plan:
    made = [
        Call(problem=p, inputs=make_inputs(p), **way)
        for p in (problem.replace(seed=seed) for seed in range(calls))
    ]
    return Plan(calls=made, canary_allocations=canaries)


@pytest.fixture(scope="module")
def run():
    runners = {}

    def run_one(name: str, plan: Plan, kind=IsolatedRunner) -> list[CallResult]:
        key = (name, kind)
        if key not in runners:
            runners[key] = kind(TargetSpec(f"{MISBEHAVING}:{name}"), "cuda")
        reply = runners[key].run(plan, 120)
        assert reply.outcome is Outcome.ANSWERED, reply.reason
        return reply.results

    yield run_one
    for runner in runners.values():
        runner.close()


def expected(call: Call) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs, names = call.inputs, call.problem.gradients
    leaves = {n: getattr(inputs, n).detach().clone() for n in ("q", "k", "v")}
    for name in names:
        leaves[name].requires_grad_()
    out = torch.nn.functional.scaled_dot_product_attention(*leaves.values())
    wanted = [leaves[n] for n in names]
    taken = torch.autograd.grad(out, wanted, inputs.grad_out) if names else ()
    return out.detach(), dict(zip(names, taken, strict=True))


def assert_conforms(call: Call, result: CallResult) -> None:
    out, gradients = expected(call)
    assert result.raised is None, result.traceback
    assert result.complaints == []
    torch.testing.assert_close(result.attention.out, out)
    for name, gradient in gradients.items():
        torch.testing.assert_close(getattr(result.gradients, name), gradient)


@pytest.mark.parametrize("kind", [IsolatedRunner, InProcessRunner])
@pytest.mark.parametrize("canaries", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way), "plain"))
@pytest.mark.parametrize("problem", [PROBLEM, GRADIENTS], ids=["forward", "backward"])
def test_a_good_target_conforms_in_every_way(run, problem, way, canaries, kind):
    layouts = (("k", "bhds+gap"), ("q", "bshd+offset"))
    plan = plan_of(problem.replace(layouts=layouts), calls=2, canaries=canaries, **way)
    for call, result in zip(plan.calls, run("attention", plan, kind), strict=True):
        assert_conforms(call, result)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("changes_q", "changed its input q: 1056 of 1056 elements, first at (0, 0, 0, 0)"),
        (
            "writes_past_k_on_gpu",
            "wrote 4 bytes outside its inputs, the nearest of them 0 bytes behind k",
        ),
        ("out_is_q", "out shares memory with q"),
        ("leaves_a_thread", "left a thread running: straggler"),
    ],
)
def test_what_it_does_beside_computing_is_a_complaint(run, name, complaint):
    (result,) = run(name, plan_of())
    (said,) = result.complaints
    assert said.startswith(complaint)


def test_one_buffer_for_every_result_is_a_complaint(run):
    first, second = run("same_buffer", plan_of(calls=2))
    assert first.complaints[0].startswith("out of call 1 changed after call 2 returned")
    assert second.complaints == [
        "out of call 2 shares memory with out of call 1, which is still in use"
    ]


def test_what_lies_beside_an_input_is_nan(run):
    (result,) = run("uses_what_lies_before_v_on_gpu", plan_of())
    assert result.attention.out.isnan().all()


@pytest.mark.parametrize("length", [3, 100, 5000])
@pytest.mark.parametrize("canaries", [False, True])
def test_memory_that_is_never_written_is_nan(run, length, canaries):
    problem = PROBLEM.replace(seqlen_q=length, seqlen_k=4)
    (result,) = run("never_writes_the_last_row", plan_of(problem, canaries=canaries))
    assert result.attention.out[:, :, -1].isnan().all()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("writes_past_its_output_on_gpu", "wrote 4 elements past the end of a float32 tensor"),
        ("writes_before_its_gradient_on_gpu", "wrote 1 element before the start of a float32"),
    ],
)
def test_canaries_find_writes_beside_allocations(run, name, where):
    (result,) = run(name, plan_of(GRADIENTS, canaries=True))
    assert result.raised is None, result.traceback
    (said,) = result.complaints
    assert said.startswith(where)


def test_work_on_another_stream_computes_with_other_values(run):
    plan = plan_of(side_stream=True)
    (result,) = run("uses_the_default_stream", plan)
    assert not torch.allclose(result.attention.out, expected(plan.calls[0])[0], atol=1e-2)


def test_work_on_another_stream_that_waits_conforms(run):
    plan = plan_of(side_stream=True)
    (result,) = run("uses_a_stream_of_its_own_well", plan)
    assert_conforms(plan.calls[0], result)


def test_values_kept_from_the_capture_are_not_those_of_the_replay(run):
    plan = plan_of(graph_replay=True)
    (result,) = run("keeps_values_from_before", plan)
    assert result.raised is None, result.traceback
    assert not torch.allclose(result.attention.out, expected(plan.calls[0])[0], atol=1e-2)


def test_a_value_that_is_read_on_the_host_cannot_be_captured(run):
    (result,) = run("reads_on_the_host", plan_of(graph_replay=True))
    assert result.raised is not None
    assert "captur" in result.raised
    plan = plan_of(graph_replay=True)
    (result,) = run("attention", plan)
    assert_conforms(plan.calls[0], result)


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("loses_the_gpu", Outcome.CRASHED, "the GPU is lost to this process"),
        ("too_large_for_a_gpu", Outcome.OUT_OF_MEMORY, "OutOfMemoryError"),
        ("segfault", Outcome.CRASHED, "killed by SIGSEGV"),
    ],
)
def test_a_crash_costs_its_plan(tmp_path, name, outcome, reason):
    told = tmp_path / "told"
    source = tmp_path / "wayward.py"
    source.write_text(
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(MISBEHAVING.parent)!r})\n"
        "import misbehaving\n"
        "def attention(q, k, v):\n"
        f"    told = Path({str(told)!r}).exists()\n"
        f"    return (misbehaving.attention if told else misbehaving.{name})(q, k, v)\n"
    )
    runner = IsolatedRunner(TargetSpec(f"{source}:attention"), "cuda")
    reply = runner.run(plan_of(), 120)
    assert reply.outcome is outcome, reply.reason
    assert reason in reply.reason
    told.touch()
    start = time.monotonic()
    plan = plan_of()
    again = runner.run(plan, 120)
    print(f"next plan after {name}: {time.monotonic() - start:.2f} s")
    assert again.outcome is Outcome.ANSWERED, again.reason
    assert_conforms(plan.calls[0], again.results[0])
    runner.close()
