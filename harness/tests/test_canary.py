from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from attn_reference.problem import Problem
from attnproof.inputs.make import make_inputs
from attnproof.plan import Call, Plan
from attnproof.targets import TargetSpec
from attnproof.worker import canary
from attnproof.worker.canary import CanaryAllocations
from attnproof.worker.runners import InProcessRunner, IsolatedRunner

MISBEHAVING = Path(__file__).with_name("misbehaving.py")
LIKE = torch.ones(2, 3)
FACTORIES = {
    "empty": lambda: torch.empty(2, 3),
    "empty_like": lambda: torch.empty_like(LIKE),
    "new_empty": lambda: LIKE.new_empty(2, 3),
    "empty_strided": lambda: torch.empty_strided((2, 3), (1, 2)),
    "new_empty_strided": lambda: LIKE.new_empty_strided((2, 3), (3, 1)),
    "zeros": lambda: torch.zeros(2, 3),
    "zeros_like": lambda: torch.zeros_like(LIKE),
    "new_zeros": lambda: LIKE.new_zeros(2, 3),
    "ones": lambda: torch.ones(2, 3),
    "full": lambda: torch.full((2, 3), 7.0),
    "full_like": lambda: torch.full_like(LIKE, 7.0),
    "new_full": lambda: LIKE.new_full((2, 3), 7.0),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_write_beside_what_a_factory_gave_is_seen(name):
    with CanaryAllocations() as canaries:
        made = FACTORIES[name]()
    ctypes.memset(made.data_ptr() + 24, 0, 8)
    ctypes.memset(made.data_ptr() - 1, 0, 1)

    told = "of a float32 tensor of shape (2, 3) that it allocated"
    assert canaries.complaints() == [
        f"wrote 1 element before the start {told}",
        f"wrote 2 elements past the end {told}",
    ]
    assert canaries.complaints() == []


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_gives_what_it_gives_without(name):
    plain = FACTORIES[name]()
    with CanaryAllocations() as canaries:
        made = FACTORIES[name]()
        made_again = made.clone()

    assert type(made) is torch.Tensor
    assert (made.shape, made.stride(), made.dtype) == (plain.shape, plain.stride(), plain.dtype)
    if "empty" in name:
        assert made_again.isnan().all()
    else:
        assert torch.equal(made, plain)
    made.fill_(0)
    assert canaries.complaints() == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool])
def test_elements_are_counted_in_their_own_size(dtype):
    with CanaryAllocations() as canaries:
        made = torch.empty(5, dtype=dtype)
    ctypes.memset(made.data_ptr() + 5 * dtype.itemsize, 0, 3 * dtype.itemsize)

    (complaint,) = canaries.complaints()
    assert complaint.startswith("wrote 3 elements past the end")


def test_empty_tensors_can_still_be_resized():
    with CanaryAllocations() as canaries:
        made = torch.empty(0).resize_(1000)
        made.fill_(1)
        torch.add(torch.ones(4), 1, out=torch.empty(0))
    assert canaries.complaints() == []


def test_a_resized_allocation_is_no_false_alarm():
    with CanaryAllocations() as canaries:
        made = torch.empty(3).resize_(100_000)
        made.fill_(1)
    assert canaries.complaints() == []


def test_many_allocations_are_looked_at_and_let_go(monkeypatch):
    monkeypatch.setattr(canary, "HELD_BYTES", 100_000)
    with CanaryAllocations() as canaries:
        for i in range(50):
            made = torch.empty(10)
            if i == 3:
                ctypes.memset(made.data_ptr() + 40, 0, 4)
    assert len(canaries._held) < 20
    assert len(canaries.complaints()) == 1


@pytest.fixture(params=[IsolatedRunner, InProcessRunner])
def run(request):
    def run_one(name: str, *, canaries: bool = True, **changes):
        runner = request.param(TargetSpec(f"{MISBEHAVING}:{name}"), "cpu")
        problem = Problem(heads_q=2, seqlen_q=8, head_dim=16).replace(**changes)
        call = Call(problem=problem, inputs=make_inputs(problem))
        reply = runner.run(Plan(calls=[call], canary_allocations=canaries), 60)
        runner.close()
        return reply.results[0]

    return run_one


def test_a_target_that_writes_past_its_output_is_found_out(run):
    assert run("writes_past_its_output").complaints == [
        "wrote 4 elements past the end of a float32 tensor of shape (1, 2, 8, 16) that it allocated"
    ]


def test_the_backward_is_surrounded_too(run):
    result = run("writes_before_its_gradient", gradients=("q",))

    assert result.raised is None, result.traceback
    assert result.complaints == [
        "wrote 1 element before the start of a float32 tensor of shape (1, 2, 8, 16) "
        "that it allocated"
    ]


def test_rows_that_are_never_written_are_nan(run):
    result = run("never_writes_the_last_row")

    assert result.attention.out[:, :, -1].isnan().all()
    assert result.attention.out[:, :, :-1].isfinite().all()


def test_a_good_target_is_not_accused(run):
    result = run("attention", gradients=("q", "k", "v"))
    plain = run("attention", canaries=False, gradients=("q", "k", "v"))

    assert result.complaints == []
    assert torch.equal(result.attention.out, plain.attention.out)
    assert torch.equal(result.gradients.k, plain.gradients.k)
