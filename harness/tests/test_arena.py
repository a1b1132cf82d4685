from __future__ import annotations

import errno
import itertools
import json
import os

import numpy as np
import pytest
import torch

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem
from attnproof.plan import Call, Plan, Surroundings
from attnproof.worker import arena as arena_module
from attnproof.worker.arena import MARGIN, PAGE, Arena, ArenaMap, draw_map
from attnproof.worker.mapped import MappedArena

LAYOUTS = (("k", "bshd+gap"), ("q", "bhds+offset"), ("bias", "expand"))


def plan_of(surroundings: Surroundings = Surroundings.NAN, calls: int = 1) -> Plan:
    problem = Problem(
        batch=2, heads_q=3, seqlen_q=5, seqlen_k=7, head_dim=4, dtype="fp16", layouts=LAYOUTS,
        mask="any", mask_shape="b1qk", bias="any", bias_shape="11qk",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    made = [
        Inputs(
            q=normal(2, 3, 5, 4),
            k=normal(2, 3, 7, 4),
            v=normal(2, 3, 7, 4),
            mask=normal(2, 1, 5, 7) > 0,
            bias=normal(1, 1, 5, 7),
            key_lengths=torch.tensor([3, 7], dtype=torch.int32),
        )
        for _ in range(calls)
    ]
    return Plan(calls=[Call(problem=problem, inputs=i) for i in made], surroundings=surroundings)


@pytest.fixture(params=list(Surroundings))
def opened(request):
    plan = plan_of(request.param, calls=2)
    arena = Arena(plan)
    mapped = MappedArena(arena.fileno(), arena.map, "cpu")
    yield plan, arena, mapped
    arena.close()


def test_every_tensor_arrives_with_its_values_strides_and_offset(opened):
    plan, arena, mapped = opened
    for call, inputs in zip(plan.calls, mapped.inputs, strict=True):
        for name, tensor in call.inputs.tensors().items():
            arrived = getattr(inputs, name)
            assert torch.equal(arrived, tensor)
            assert arrived.dtype == tensor.dtype
            assert not arrived._is_view()
        assert inputs.q.stride() == (60, 20, 1, 5)
        assert inputs.q.storage_offset() == 1
        assert inputs.k.stride() == (420, 20, 60, 1)
        assert inputs.bias.stride() == (0, 0, 7, 1)
    assert arena.changes() == [[], []]


def test_no_two_tensors_share_a_storage(opened):
    _, _, mapped = opened
    storages = [t.untyped_storage().data_ptr() for i in mapped.inputs for t in i.tensors().values()]
    assert len(set(storages)) == len(storages)


def test_everything_around_and_between_is_nan():
    arena = Arena(plan_of())
    everything = np.frombuffer(arena._mapping, dtype=np.uint8).copy()
    for block in arena.map.blocks:
        used = torch.zeros(block.nbytes, dtype=torch.uint8)
        block.view(used).copy_(torch.ones(block.shape).to(block.torch_dtype))
        inside = everything[block.start : block.start + block.nbytes]
        if "gap" in dict(LAYOUTS).get(block.name, ""):
            view = block.view(torch.from_numpy(inside))
            row = view.as_strided((4 + 16,), (1,), 0)
            assert row[4:].isnan().all()
        around = everything[block.start - MARGIN : block.start]
        assert (around == 0xFF).sum() >= PAGE
        inside[:] = 0xFF
    assert (everything == 0xFF).all()
    arena.close()


def test_guard_pages_touch_the_tensors():
    for surroundings in (Surroundings.GUARD_AFTER, Surroundings.GUARD_BEFORE):
        arena = draw_map(plan_of(surroundings))
        for block, (start, length) in zip(arena.blocks, arena.guards, strict=True):
            touching = {
                Surroundings.GUARD_AFTER: start == block.start + block.nbytes,
                Surroundings.GUARD_BEFORE: start + length == block.start,
            }
            assert touching[surroundings]
            assert start % PAGE == 0
            assert length >= PAGE


def test_blocks_and_guards_do_not_overlap():
    for surroundings in Surroundings:
        arena = draw_map(plan_of(surroundings, calls=3))
        spans = [(b.start, b.start + b.nbytes) for b in arena.blocks]
        spans = sorted(spans + [(s, s + n) for s, n in arena.guards])
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert spans[-1][1] <= arena.size


def test_a_changed_element_is_named(opened):
    _, arena, mapped = opened
    mapped.inputs[1].k[1, 2, 3, 0] = 5
    mapped.inputs[1].k[1, 2, 3, 1] = 5

    assert arena.changes() == [
        [],
        ["changed its input k: 2 of 168 elements, first at (1, 2, 3, 0)"],
    ]


def test_a_change_of_sign_of_zero_is_a_change(opened):
    plan, arena, mapped = opened
    mapped.inputs[0].v[0, 0, 0, 0].zero_()
    plan.calls[0].inputs.v[0, 0, 0, 0] = -0.0

    assert "changed its input v: 1 of 168" in arena.changes()[0][0]


def test_nan_that_stays_is_no_change():
    plan = plan_of()
    plan.calls[0].inputs.v.fill_(float("nan"))
    arena = Arena(plan)

    assert arena.changes() == [[]]
    arena.close()


def test_a_write_into_a_gap_is_seen(opened):
    _, arena, mapped = opened
    k = mapped.inputs[0].k
    k.as_strided((1,), (1,), 4).zero_()

    assert arena.changes()[0] == ["wrote 2 bytes into the gaps between the rows of k"]


def test_a_write_before_a_tensor_that_starts_inside_its_storage_is_seen(opened):
    _, arena, mapped = opened
    q = mapped.inputs[0].q
    q.as_strided((1,), (1,), 0).zero_()

    assert arena.changes()[0] == ["wrote 2 bytes into the gaps between the rows of q"]


@pytest.mark.parametrize(("name", "side"), [("v", "behind"), ("mask", "before")])
def test_a_write_beside_a_tensor_is_seen(name, side):
    arena = Arena(plan_of())
    block = next(b for b in arena.map.blocks if b.name == name)
    everything = np.frombuffer(arena._mapping, dtype=np.uint8)
    at = block.start + block.nbytes + 5 if side == "behind" else block.start - 6
    everything[at] = 0

    assert arena.changes() == [
        [f"wrote 1 bytes outside its inputs, the nearest of them 5 bytes {side} {name}"]
    ]
    del everything
    arena.close()


def test_empty_tensors_have_their_shape_and_strides():
    problem = Problem(seqlen_q=3, seqlen_k=0, head_dim=4)
    inputs = Inputs(q=torch.ones(1, 1, 3, 4), k=torch.ones(1, 1, 0, 4), v=torch.ones(1, 1, 0, 4))
    for surroundings in Surroundings:
        arena = Arena(Plan(calls=[Call(problem=problem, inputs=inputs)], surroundings=surroundings))
        mapped = MappedArena(arena.fileno(), arena.map, "cpu")
        assert mapped.inputs[0].k.shape == (1, 1, 0, 4)
        assert arena.changes() == [[]]
        arena.close()


def test_a_far_tensor_has_its_values_in_memory_of_its_own():
    plan = plan_of()
    plan.calls[0].problem = plan.calls[0].problem.replace(layouts=(("k", "hbsd+far"),))
    arena = Arena(plan)
    assert arena.map.size < 1 << 26
    mapped = MappedArena(arena.fileno(), ArenaMap.from_dict(arena.map.as_dict()), "cpu")
    k = mapped.inputs[0].k

    assert torch.equal(k, plan.calls[0].inputs.k)
    assert 2 * k.stride(1) >= 1 << 31
    assert arena.changes() == [[]]
    arena.close()


def test_the_map_survives_json():
    arena = draw_map(plan_of(Surroundings.GUARD_AFTER))

    assert ArenaMap.from_dict(json.loads(json.dumps(arena.as_dict()))) == arena


def full_disks(monkeypatch, count: int) -> None:
    """The next ``count`` files have no room; those after them do."""
    reserve = os.posix_fallocate
    refused = []

    def posix_fallocate(descriptor, offset, size):
        if len(refused) < count:
            refused.append(descriptor)
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(descriptor, offset, size)

    monkeypatch.setattr(arena_module.os, "posix_fallocate", posix_fallocate)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no shared memory to be full")
def test_a_full_shared_memory_falls_back_to_disk(monkeypatch):
    full_disks(monkeypatch, 1)
    arena = Arena(plan_of())
    assert arena.changes() == [[]]
    arena.close()


def test_a_full_disk_is_said(monkeypatch):
    full_disks(monkeypatch, 2)
    with pytest.raises(OSError, match=r"no room for \d+ bytes of inputs: No space left"):
        Arena(plan_of())


def test_an_unknown_layout_is_refused_before_anything_is_written():
    plan = plan_of()
    plan.calls[0].problem = plan.calls[0].problem.replace(layouts=(("v", "zigzag"),))
    with pytest.raises(ValueError, match="layout 'zigzag'"):
        Arena(plan)
