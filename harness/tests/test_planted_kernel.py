"""The planted kernel: its correct copy equals the reference, and each fault changes the answer.

This shows that there is something to be caught; that it is, is in test_planted_faults.py.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_reference.backward import gradients
from attn_reference.forward import attention
from attn_reference.inputs import Inputs
from attn_reference.problem import Problem
from attnproof.inputs.make import make_inputs

PLANTED = Path(__file__).parent / "planted"


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A problem that excites a fault, and the tensors of its answer that must change."""

    problem: str
    changes: str = "out"


# Small problems, by fault; the harness's own cases are not consulted.
EXCITED_BY = {
    "scale_two_percent_off": Planted(problem="b1_h1x1_q64_k64_d32_fp32"),
    "exp2_without_log2e": Planted(problem="b1_h1x1_q64_k64_d32_fp32"),
    "last_key_dropped": Planted(problem="b1_h1x1_q8_k8_d32_fp32"),
    "last_key_dropped_when_long": Planted(
        problem="b1_h1x1_q8_k2000_d32_bf16_causal=bottom-right_dist=equal"
    ),
    "last_tile_not_rescaled": Planted(problem="b1_h1x1_q8_k128_d32_fp32_dist=rising"),
    "padded_keys_counted": Planted(problem="b1_h1x1_q65_k65_d32_fp32_causal=top-left"),
    "padded_keys_counted_unless_causal": Planted(problem="b1_h1x1_q65_k65_d32_fp32"),
    "query_grid_rounded_down": Planted(problem="b1_h1x1_q65_k65_d32_fp32"),
    "probabilities_in_e4m3": Planted(problem="b1_h1x1_q64_k64_d32_bf16"),
    "output_accumulated_in_bf16": Planted(problem="b1_h1x1_q64_k640_d32_bf16"),
    "window_left_exclusive": Planted(problem="b1_h1x1_q16_k16_d32_fp32_window=2,0"),
    "window_right_plus_one": Planted(problem="b1_h1x1_q16_k16_d32_fp32_window=2,0"),
    "bottom_right_for_top_left": Planted(problem="b1_h1x1_q8_k16_d32_fp32_causal=top-left"),
    "top_left_in_backward": Planted(
        problem="b1_h1x1_q8_k16_d32_fp32_causal=bottom-right_grad=q,k,v", changes="dq"
    ),
    "causal_ignored_in_backward": Planted(
        problem="b1_h1x1_q8_k8_d32_fp32_causal=top-left_grad=q,k,v", changes="dq"
    ),
    "mask_polarity": Planted(problem="b1_h1x1_q8_k8_d32_fp32_mask=random@bhqk"),
    "mask_read_as_contiguous": Planted(problem="b2_h2x2_q8_k8_d32_fp32_mask=random@11qk"),
    "softcap_after_mask": Planted(problem="b1_h1x1_q8_k8_d32_fp32_causal=top-left_softcap=5"),
    "bias_row_stride_lost_in_mqa": Planted(problem="b1_h2x1_q8_k8_d32_fp32_bias=normal@bhqk"),
    "alibi_distance_off_by_one": Planted(problem="b1_h2x2_q8_k8_d32_fp32_alibi"),
    "alibi_sign": Planted(problem="b1_h2x2_q8_k8_d32_fp32_alibi"),
    "sink_per_tile": Planted(problem="b1_h2x2_q8_k65_d32_fp32_sinks"),
    "fully_masked_rows_nan": Planted(problem="b1_h1x1_q9_k8_d32_fp32_mask=empty-rows@bhqk"),
    "hidden_first_tile_nan": Planted(problem="b1_h1x1_q8_k256_d32_fp32_mask=first-tile@bhqk"),
    "output_unwritten_without_keys": Planted(problem="b2_h1x1_q8_k8_d32_fp32_lens=8,0"),
    "head_by_modulo": Planted(problem="b1_h4x2_q8_k8_d32_fp32"),
    "head_times_group": Planted(problem="b1_h4x2_q8_k8_d32_fp32"),
    "head_tile_crosses_group": Planted(problem="b1_h6x2_q8_k8_d32_fp32"),
    "lse_in_base_two": Planted(problem="b1_h1x1_q8_k8_d32_fp32", changes="lse"),
    "dk_of_last_query_missing": Planted(problem="b1_h1x1_q8_k8_d32_fp32_grad=q,k,v", changes="dk"),
    "delta_omitted": Planted(problem="b1_h1x1_q8_k8_d32_fp32_grad=q,k,v", changes="dq dk"),
    "lse_gradient_ignored": Planted(
        problem="b1_h1x1_q8_k8_d32_fp32_grad=q,k,v_dlse", changes="dq dk"
    ),
    "grad_out_assumed_contiguous": Planted(
        problem="b1_h2x2_q8_k8_d32_fp32_grad=q,k,v_layout=grad-out:bshd", changes="dq dk dv"
    ),
    "out_read_with_strides_of_grad_out": Planted(
        problem="b1_h2x2_q8_k8_d32_fp32_grad=q,k,v_layout=grad-out:bshd", changes="dq dk"
    ),
    "v_indexed_with_head_dim": Planted(
        problem="b1_h1x1_q8_k8_d32_dv16_fp32_grad=q,k,v", changes="dq dk"
    ),
    "values_read_past_the_end": Planted(problem="b1_h1x1_q8_k8_d32_fp32"),
    "zeros_always": Planted(problem="b1_h1x1_q8_k8_d32_fp32"),
    "gc_search": Planted(problem="b1_h1x1_q8_k8_d32_fp32"),
}
# What these do is not in the numbers of one call; each has a test of its own below.
SHOWN_OTHERWISE = {
    "scale_of_first_call",
    "result_cached",
    "inputs_zeroed",
    "lazy_result",
    "reads_past_the_end",
    "writes_past_the_end",
}


@pytest.fixture(scope="module")
def faulty() -> ModuleType:
    """The module of targets, imported as the harness imports a file: its siblings are found."""
    sys.path.insert(0, str(PLANTED))
    try:
        import faulty
    finally:
        sys.path.remove(str(PLANTED))
    return faulty


def prepared(problem: Problem) -> Inputs:
    """Inputs with NaN behind k and v, and what the layouts of this file's problems ask for."""
    inputs = make_inputs(problem)
    for name in ("k", "v"):
        values = getattr(inputs, name)
        surrounded = torch.full((values.numel() + 64 * values.shape[-1],), math.nan).to(values)
        setattr(inputs, name, surrounded[: values.numel()].view_as(values).copy_(values))
    if inputs.mask is not None and problem.mask_shape == "11qk":
        inputs.mask = inputs.mask.expand(problem.batch, problem.heads_q, -1, -1)
    if problem.layout("grad_out") == "bshd":
        assert inputs.grad_out is not None
        inputs.grad_out = inputs.grad_out.transpose(1, 2).contiguous().transpose(1, 2)
    return inputs


def answer(attend: Any, problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """What a target of the planted module gives: out, lse, and the gradients asked for."""
    leaves = {n: getattr(inputs, n).detach().requires_grad_() for n in problem.gradients}
    q, k, v = (leaves.get(name, getattr(inputs, name)) for name in "qkv")
    out, lse = attend(
        q,
        k,
        v,
        scale=problem.scale,
        causal=problem.causal,
        window=problem.window,
        softcap=problem.softcap,
        mask=inputs.mask,
        bias=leaves.get("bias", inputs.bias),
        alibi_slopes=inputs.alibi_slopes,
        sinks=leaves.get("sinks", inputs.sinks),
        key_lengths=inputs.key_lengths,
        return_lse=True,
    )
    outputs, incoming = [out], [inputs.grad_out]
    if problem.lse_gradient:
        outputs, incoming = [out, lse], [inputs.grad_out, inputs.grad_lse]
    if not leaves:
        return {"out": out, "lse": lse}
    grads = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


CORRECT_ON = (
    "b2_h6x6_q130_k70_d32_fp64_causal=top-left_alibi_grad=q,k,v",
    "b2_h6x2_q70_k130_d32_dv16_fp64_causal=bottom-right_window=20,inf_sinks_grad=q,k,v,sinks_dlse",
    "b2_h2x1_q65_k65_d32_fp64_window=5,9_softcap=2_bias=neginf-prefix@1h1k_grad=q,k,v,bias_dlse",
    "b2_h2x2_q65_k65_d32_fp64_scale=0.3_mask=empty-rows@bhqk_bias=normal@b1q1_grad=q,k,v,bias",
    "b3_h2x2_q9_k65_d32_fp64_lens=30,0,65_sinks_grad=q,k,v,sinks",
    "b1_h1x1_q4_k0_d32_fp64_grad=q,k,v",
    "b1_h1x1_q0_k4_d32_fp64_grad=q,k,v",
)


@pytest.mark.parametrize("problem_id", CORRECT_ON)
def test_the_correct_copy_equals_the_reference(faulty: ModuleType, problem_id: str) -> None:
    problem = Problem.from_id(problem_id)
    inputs = prepared(problem)
    given = answer(faulty.correct, problem, inputs)
    truth = attention(inputs, problem)
    expected = {"out": truth.out, "lse": truth.lse}
    for name, gradient in gradients(inputs, problem).tensors().items():
        expected[f"d{name}"] = gradient
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        # dsinks is summed in the dtype of the sinks, fp32.
        atol = 1e-6 if name == "dsinks" else 1e-12
        torch.testing.assert_close(given[name].double(), value, rtol=0, atol=atol)


@pytest.mark.parametrize("fault", EXCITED_BY)
def test_each_fault_changes_the_answer(faulty: ModuleType, fault: str) -> None:
    planted = EXCITED_BY[fault]
    problem = Problem.from_id(planted.problem)
    inputs = prepared(problem)
    right = answer(faulty.correct, problem, inputs)
    wrong = answer(getattr(faulty, fault), problem, inputs)
    changed = {name for name, value in right.items() if not torch.equal(value, wrong[name])}
    assert set(planted.changes.split()) <= changed
    # A fault of the backward leaves the forward alone: nobody could see it there.
    if "out" not in planted.changes:
        assert "out" not in changed


def test_every_fault_is_shown_to_matter(faulty: ModuleType) -> None:
    assert set(EXCITED_BY) | SHOWN_OTHERWISE == set(faulty.FAULTS)


SMALL = Problem(seqlen_q=9, seqlen_k=9, head_dim=16)


def test_a_kept_scale_shows_in_the_second_call(faulty: ModuleType) -> None:
    first, second = SMALL, SMALL.replace(scale=1.0)
    inputs = prepared(SMALL)
    for problem, same in ((first, True), (second, False)):
        kept = answer(faulty.scale_of_first_call, problem, inputs)
        assert torch.equal(kept["out"], answer(faulty.correct, problem, inputs)["out"]) == same


def test_a_cached_result_shows_in_the_second_call(faulty: ModuleType) -> None:
    for problem, same in ((SMALL, True), (SMALL.replace(seed=1), False)):
        inputs = prepared(problem)
        cached = answer(faulty.result_cached, problem, inputs)
        assert torch.equal(cached["out"], answer(faulty.correct, problem, inputs)["out"]) == same


def test_zeroed_inputs_show_in_the_inputs_only(faulty: ModuleType) -> None:
    inputs = prepared(SMALL)
    right = answer(faulty.correct, SMALL, inputs)
    assert torch.equal(answer(faulty.inputs_zeroed, SMALL, inputs)["out"], right["out"])
    assert not inputs.q.any()


def test_a_lazy_result_is_computed_when_it_is_looked_at(faulty: ModuleType) -> None:
    inputs = prepared(SMALL)
    right = answer(faulty.correct, SMALL, inputs)["out"]
    lazy = answer(faulty.lazy_result, SMALL, inputs)["out"]
    assert type(lazy) is not Tensor
    assert torch.equal(lazy + 0, right)
    inputs.v.zero_()
    assert torch.equal(lazy + 0, torch.zeros_like(right))


def test_reads_reach_behind_the_tensor(faulty: ModuleType) -> None:
    inputs = prepared(SMALL)  # NaN behind
    assert faulty.tiled.rows_behind(inputs.k, 3).isnan().all()
    reads = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulty.tiled, "rows_behind", lambda tensor, count: reads.append(count))
        answer(faulty.reads_past_the_end, SMALL, inputs)
    assert reads == [faulty.tiled.TILE_K - SMALL.keys]


def test_writes_reach_behind_the_output(faulty: ModuleType) -> None:
    writes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulty.tiled.ctypes, "memset", lambda *call: writes.append(call))
        out = answer(faulty.writes_past_the_end, SMALL, prepared(SMALL))["out"]
    assert writes == [(out.data_ptr() + out.nbytes, 0, SMALL.value_dim * out.itemsize)]
