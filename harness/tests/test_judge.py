"""The judge: what it accepts, what it accuses, and how it says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_reference.backward import gradients
from attn_reference.forward import attention
from attn_reference.inputs import Attention, Gradients, Inputs
from attn_reference.precision import EAGER, FLASH, FLASH_FP32_P, FLASH_TF32, Precision
from attn_reference.problem import Problem
from attnproof.backend import Capabilities
from attnproof.inputs.make import make_inputs, make_keep_mask
from attnproof.judge.judging import DROPOUT_UNSEEN, canonical_lse, judge
from attnproof.plan import CallResult
from attnproof.verdict import Status, Verdict

PLAIN = Capabilities(returns_lse=True)
TEXT = "b1_h2x1_q33_k40_d32_bf16_causal=bottom-right_grad=q,k,v"


def computed(text: str, precision: Precision = FLASH) -> tuple[Problem, Inputs, CallResult]:
    problem = Problem.from_id(text)
    inputs = make_inputs(problem)
    if problem.dropout:
        inputs.keep_mask = make_keep_mask(problem)
    result = attention(inputs, problem, precision)
    found = gradients(inputs, problem, precision, result) if problem.gradients else None
    return problem, inputs, CallResult(attention=result, gradients=found)


def parts(result: CallResult) -> tuple[Attention, Gradients]:
    assert result.attention is not None
    assert result.gradients is not None
    return result.attention, result.gradients


def rules(verdict: Verdict) -> set[tuple[str, str]]:
    return {(finding.tensor, finding.rule) for finding in verdict.findings}


def test_a_correct_result_conforms() -> None:
    problem, inputs, result = computed(TEXT)
    verdict = judge(problem, inputs, result, FLASH, PLAIN)
    assert verdict.status is Status.CONFORMS
    assert verdict.findings == []
    assert verdict.reason == ""
    assert set(verdict.worst) == {"out", "lse", "dq", "dk", "dv"}
    assert all(0 < worst <= 1 for worst in verdict.worst.values())
    assert verdict.statistics["z_row"] < verdict.statistics["z_row_limit"]


def spoil_scale(problem: Problem, inputs: Inputs) -> CallResult:
    wrong = problem.replace(scale=1.02 * problem.softmax_scale)
    result = attention(inputs, wrong, FLASH)
    return CallResult(attention=result, gradients=gradients(inputs, wrong, FLASH, result))


def change(name: str, how: Callable[[Tensor], Tensor]) -> Callable[[CallResult], None]:
    def changed(result: CallResult) -> None:
        attention_, gradients_ = parts(result)
        owner: object = attention_ if name in ("out", "lse") else gradients_
        field = name if name in ("out", "lse") else name[1:]
        setattr(owner, field, how(getattr(owner, field).clone()))

    return changed


def one(value: float) -> Callable[[Tensor], Tensor]:
    def changed(tensor: Tensor) -> Tensor:
        tensor.view(-1)[7] = value
        return tensor

    return changed


@pytest.mark.parametrize(
    ("spoil", "tensor", "rule"),
    [
        (change("out", one(3.0)), "out", "bound"),
        (change("lse", one(3.7)), "lse", "bound"),
        (change("dq", one(9.0)), "dq", "bound"),
        (change("dk", one(9.0)), "dk", "bound"),
        (change("dv", one(9.0)), "dv", "bound"),
        (change("out", one(math.nan)), "out", "non-finite pattern"),
        (change("dk", one(math.inf)), "dk", "non-finite pattern"),
        (change("out", lambda t: t.float()), "out", "dtype"),
        (change("out", lambda t: t[:, :, :-1]), "out", "shape"),
        (change("lse", lambda t: t.transpose(1, 2)), "lse", "shape"),
        (change("dv", lambda t: t.double()), "dv", "dtype"),
        (change("dq", lambda t: t.new_zeros(t.shape)), "dq", "bound"),
        (change("lse", lambda t: t / math.log(2)), "lse", "bound"),
    ],
)
def test_what_is_wrong_is_found(
    spoil: Callable[[CallResult], None], tensor: str, rule: str
) -> None:
    problem, inputs, result = computed(TEXT)
    spoil(result)
    verdict = judge(problem, inputs, result, FLASH, PLAIN)
    assert verdict.status is Status.DEVIATES
    assert (tensor, rule) in rules(verdict)
    assert tensor in verdict.reason


def test_a_scale_two_percent_off_deviates() -> None:
    problem, inputs, _ = computed(TEXT)
    verdict = judge(problem, inputs, spoil_scale(problem, inputs), FLASH, PLAIN)
    assert {"out", "lse", "dk"} <= {tensor for tensor, _ in rules(verdict)}


def test_a_finding_says_where_and_how_much() -> None:
    problem, inputs, result = computed(TEXT)
    attention_, _ = parts(result)
    attention_.out[0, 1, 5, 9] = 3.0
    (finding,) = (
        f
        for f in judge(problem, inputs, result, FLASH, PLAIN).findings
        if f.tensor == "out" and f.rule == "bound"
    )
    assert finding.index == (0, 1, 5, 9)
    assert finding.count == 1
    assert finding.elements == attention_.out.numel()
    assert finding.worst is not None
    assert finding.worst > 10
    assert "1 of 2112 elements of out is beyond the error budget" in finding.message
    assert "[0, 1, 5, 9]: 3, expected" in finding.message


@pytest.mark.parametrize("missing", ["attention", "lse", "gradients", "k"])
def test_what_is_missing_is_a_finding(missing: str) -> None:
    problem, inputs, result = computed(TEXT)
    attention_, gradients_ = parts(result)
    match missing:
        case "attention":
            result.attention = None
        case "lse":
            attention_.lse = None
        case "gradients":
            result.gradients = None
        case _:
            gradients_.k = None
    verdict = judge(problem, inputs, result, FLASH, PLAIN)
    assert verdict.status is Status.DEVIATES
    assert "missing" in {finding.rule for finding in verdict.findings}


def test_an_lse_that_nobody_promised_may_be_missing_but_not_wrong() -> None:
    problem, inputs, result = computed(TEXT)
    attention_, _ = parts(result)
    silent = Capabilities(returns_lse=False)
    lse, attention_.lse = attention_.lse, None
    assert judge(problem, inputs, result, FLASH, silent).status is Status.CONFORMS
    assert lse is not None
    attention_.lse = lse + 1
    assert judge(problem, inputs, result, FLASH, silent).status is Status.DEVIATES


def test_the_declared_lse_is_read() -> None:
    problem, inputs, result = computed(TEXT)
    attention_, _ = parts(result)
    assert attention_.lse is not None
    attention_.lse = attention_.lse.transpose(1, 2) / math.log(2)
    declared = Capabilities(returns_lse=True, lse_base="2", lse_layout="bsh")
    assert judge(problem, inputs, result, FLASH, declared).status is Status.CONFORMS
    assert judge(problem, inputs, result, FLASH, PLAIN).status is Status.DEVIATES
    torch.testing.assert_close(
        canonical_lse(attention_.lse, declared).float(), attention(inputs, problem, FLASH).lse
    )


EMPTY = "b1_h1x1_q9_k4_d8_fp32_causal=bottom-right_grad=q,k,v"


def test_empty_rows_are_zero_and_minus_infinity() -> None:
    problem, inputs, result = computed(EMPTY)
    assert judge(problem, inputs, result, FLASH, PLAIN).status is Status.CONFORMS
    attention_, _ = parts(result)
    attention_.out[0, 0, 0] = 1e-30
    assert ("out", "structural zero") in rules(judge(problem, inputs, result, FLASH, PLAIN))


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_empty_rows_as_declared(value: float) -> None:
    problem, inputs, result = computed(EMPTY)
    attention_, gradients_ = parts(result)
    attention_.out[0, 0, :5] = value
    assert attention_.lse is not None
    attention_.lse[0, 0, :5] = math.inf
    if math.isnan(value):
        gradients_.k = torch.full_like(inputs.k, math.nan)
    declared = Capabilities(returns_lse=True, empty_row_out=value, empty_row_lse=math.inf)
    assert judge(problem, inputs, result, FLASH, declared).status is Status.CONFORMS
    assert judge(problem, inputs, result, FLASH, PLAIN).status is Status.DEVIATES


def test_an_exact_answer_is_compared_exactly() -> None:
    problem, inputs, result = computed("b1_h1x1_q8_k8_d16_bf16_mask=one-key@bhqk")
    assert judge(problem, inputs, result, FLASH, PLAIN).status is Status.CONFORMS
    assert result.attention is not None
    out = result.attention.out
    out[0, 0, 0, 0] = (out[0, 0, 0, 0].float() * (1 + 2.0**-7)).bfloat16()
    assert ("out", "exact") in rules(judge(problem, inputs, result, FLASH, PLAIN))


def test_a_finite_answer_may_overflow_in_fp16() -> None:
    problem, inputs, _ = computed("b1_h1x1_q8_k4_d8_fp16_grad=q,k,v")
    assert inputs.grad_out is not None
    inputs.grad_out.fill_(60000.0)
    inputs.v.zero_()
    result = attention(inputs, problem, FLASH)
    found = gradients(inputs, problem, FLASH, result)
    assert found.v is not None
    assert bool(found.v.isinf().any())  # 8 rows of 60000 P
    call = CallResult(attention=result, gradients=found)
    assert judge(problem, inputs, call, FLASH, PLAIN).status is Status.CONFORMS
    found.v = found.v.clamp_max(65504)
    assert ("dv", "non-finite pattern") in rules(judge(problem, inputs, call, FLASH, PLAIN))


def test_complaints_are_findings() -> None:
    problem, inputs, result = computed(TEXT)
    result.complaints.append("q was changed")
    verdict = judge(problem, inputs, result, FLASH, PLAIN)
    assert verdict.status is Status.DEVIATES
    assert "q was changed" in verdict.reason
    assert verdict.conforms_under is None


def test_a_call_that_did_not_answer_is_no_deviation() -> None:
    problem, inputs, _ = computed(TEXT)
    unsupported = judge(problem, inputs, CallResult(unsupported="no window"), FLASH, PLAIN)
    assert (unsupported.status, unsupported.reason) == (Status.UNSUPPORTED, "no window")
    raised = judge(problem, inputs, CallResult(raised="ValueError: no"), FLASH, PLAIN)
    assert raised.status is Status.CRASHED


DROPOUT = "b1_h2x2_q20_k40_d16_bf16_dropout=0.25_grad=q,k,v"


def test_dropout_is_judged_by_what_was_kept() -> None:
    problem, inputs, result = computed(DROPOUT)
    inputs.keep_mask = None
    assert judge(problem, inputs, result, FLASH, PLAIN).status is Status.CONFORMS
    attention_, _ = parts(result)
    assert attention_.keep_mask is not None
    attention_.keep_mask = ~attention_.keep_mask
    assert ("out", "bound") in rules(judge(problem, inputs, result, FLASH, PLAIN))


def test_dropout_that_nobody_saw_is_said() -> None:
    problem, inputs, result = computed(DROPOUT)
    inputs.keep_mask = None
    attention_, _ = parts(result)
    attention_.keep_mask = None
    verdict = judge(problem, inputs, result, FLASH, PLAIN)
    assert verdict.status is Status.CONFORMS
    assert DROPOUT_UNSEEN in verdict.reason
    assert verdict.worst["out"] == 0
    assert attention_.lse is not None
    attention_.lse += 1  # the LSE does not depend on dropout
    assert ("lse", "bound") in rules(judge(problem, inputs, result, FLASH, PLAIN))


def test_dropout_without_lse_and_keep_mask_is_vacuous() -> None:
    problem, inputs, result = computed(DROPOUT)
    inputs.keep_mask = None
    attention_, _ = parts(result)
    attention_.keep_mask = attention_.lse = None
    verdict = judge(problem, inputs, result, FLASH, Capabilities())
    assert verdict.status is Status.VACUOUS
    assert DROPOUT_UNSEEN in verdict.reason


def test_a_keep_mask_of_the_wrong_form_is_a_finding() -> None:
    problem, inputs, result = computed(DROPOUT)
    attention_, _ = parts(result)
    assert attention_.keep_mask is not None
    attention_.keep_mask = attention_.keep_mask.float()
    assert ("keep_mask", "dtype") in rules(judge(problem, inputs, result, FLASH, PLAIN))


def test_scores_beyond_their_declared_dtype_are_left_out_and_said() -> None:
    problem, inputs, _ = computed("b1_h1x1_q4_k4_d8_fp16_scale=1")
    inputs.q.fill_(200)
    inputs.k[:, :, 0] = 50
    nan = torch.full((1, 1, 4, 8), math.nan, dtype=torch.float16)
    call = CallResult(attention=Attention(out=nan))
    verdict = judge(problem, inputs, call, EAGER, Capabilities())
    assert verdict.status is Status.VACUOUS
    assert "not determined under the declared precision (eager)" in verdict.reason
    assert judge(problem, inputs, call, FLASH, Capabilities()).status is Status.DEVIATES


@pytest.mark.parametrize(
    ("text", "declared", "actual", "named"),
    [
        ("b1_h2x2_q64_k64_d64_bf16_dist=normal:2", FLASH, EAGER, "eager"),
        ("b1_h2x2_q64_k64_d64_bf16", FLASH_FP32_P, FLASH, "flash"),
        ("b1_h2x2_q64_k64_d64_fp32", FLASH, FLASH_TF32, "flash-tf32"),
    ],
)
def test_the_true_declaration_is_named(
    text: str, declared: Precision, actual: Precision, named: str
) -> None:
    problem, inputs, result = computed(text, actual)
    verdict = judge(problem, inputs, result, declared, PLAIN)
    assert verdict.status is Status.DEVIATES
    assert verdict.conforms_under == named


def test_no_declaration_excuses_a_wrong_answer() -> None:
    problem, inputs, _ = computed("b1_h2x2_q64_k64_d64_bf16")
    zeros = CallResult(attention=Attention(out=torch.zeros(1, 2, 64, 64, dtype=torch.bfloat16)))
    verdict = judge(problem, inputs, zeros, FLASH, Capabilities())
    assert verdict.status is Status.DEVIATES
    assert verdict.conforms_under is None


def test_a_small_error_everywhere_is_seen_by_the_statistics_alone() -> None:
    """Padded keys in the denominator: 2.4 % more mass, within the bound of each element."""
    problem, inputs, result = computed("b1_h1x1_q64_k1000_d64_bf16")
    truth = attention(inputs, problem)
    assert truth.lse is not None
    padded = truth.out / (1 + 24 * torch.exp(-truth.lse)[..., None])
    assert result.attention is not None
    call = CallResult(attention=replace(result.attention, out=padded.bfloat16(), lse=None))
    verdict = judge(problem, inputs, call, FLASH, Capabilities())
    assert ("out", "row statistic") in rules(verdict)
    assert ("out", "bound") not in rules(verdict)


@pytest.mark.parametrize(
    "text",
    ["b0_h1x1_q4_k4_d8_fp32_grad=q,k,v", "b1_h1x1_q0_k4_d8_fp32", "b1_h1x1_q4_k0_d8_fp32"],
)
def test_empty_problems_conform(text: str) -> None:
    problem, inputs, result = computed(text)
    assert judge(problem, inputs, result, FLASH, PLAIN).status is Status.CONFORMS


def test_verdicts_are_plain_values() -> None:
    problem, inputs, result = computed(TEXT)
    attention_, _ = parts(result)
    attention_.out.zero_()
    values = judge(problem, inputs, result, FLASH, PLAIN).as_dict()
    assert isinstance(values["worst"]["out"], float)
    assert all(isinstance(i, int) for f in values["findings"] for i in f["index"] or ())
