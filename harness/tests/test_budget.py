"""The budget: its oracle is the reference, and its bounds hold for whatever rounding may do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attn_reference.backward import gradients
from attn_reference.forward import attention
from attn_reference.inputs import Inputs
from attn_reference.precision import (
    EAGER,
    FLASH,
    FLASH_FP32_P,
    FLASH_TF32,
    PROFILES,
    Precision,
)
from attn_reference.problem import Problem
from attnproof.budget.expectation import expectation
from attnproof.budget.expected import Expected, compare
from attnproof.inputs.make import make_inputs, make_keep_mask
from attnproof.judge.statistics import statistics

FEATURES = (
    "b2_h2x2_q17_k33_d16_{}_causal=top-left_grad=q,k,v",
    "b1_h2x2_q33_k17_d16_{}_causal=bottom-right_grad=q,k,v",
    "b1_h6x2_q9_k40_d24_dv8_{}_window=7,3_grad=q,k,v",
    "b1_h2x1_q20_k30_d16_{}_softcap=2_alibi_grad=q,k,v_dist=normal:4",
    "b2_h4x2_q12_k30_d16_{}_sinks_grad=q,k,v,sinks_dlse",
    "b2_h3x1_q12_k30_d16_{}_mask=empty-rows@b1qk_bias=normal@1h1k_grad=q,k,v,bias",
    "b1_h2x2_q20_k40_d16_{}_bias=large@11qk_grad=q,k,v,bias",
    "b3_h2x2_q9_k20_d16_{}_lens=20,0,7_grad=q,k,v",
    "packed=5x9,0x4,8x0,6x6_h2x2_d16_{}_causal=bottom-right_grad=q,k,v",
    "b2_h2x1_q5_k21_d16_{}_lens=21,10_page=4_grad=q",
    "b1_h2x2_q20_k40_d16_{}_dropout=0.25_sinks_grad=q,k,v,sinks_dlse",
    "b1_h2x2_q40_k40_d16_{}_grad=q,k,v_dist=large",
    "b1_h2x2_q40_k40_d16_{}_grad=q,k,v_dist=tiny",
    "b1_h1x1_q4_k0_d8_{}_grad=q,k,v",
    "b1_h1x1_q0_k4_d8_{}_grad=q,k,v",
    "b0_h1x1_q4_k4_d8_{}_grad=q,k,v",
)


def prepared(problem: Problem) -> Inputs:
    inputs = make_inputs(problem)
    if problem.dropout:
        inputs.keep_mask = make_keep_mask(problem)
    return inputs


def answers(
    problem: Problem, inputs: Inputs, precision: Precision | None = None
) -> dict[str, Tensor]:
    result = attention(inputs, problem, precision)
    assert result.lse is not None
    named = {"out": result.out, "lse": result.lse}
    if problem.gradients:
        found = gradients(inputs, problem, precision, result).tensors()
        named |= {f"d{name}": tensor for name, tensor in found.items()}
    return named


def case(text: str) -> tuple[Problem, Inputs]:
    problem = Problem.from_id(text)
    return problem, prepared(problem)


@pytest.mark.parametrize("text", FEATURES)
def test_the_value_is_that_of_the_reference(text: str) -> None:
    problem, inputs = case(text.format("fp32"))
    expected = expectation(problem, inputs, FLASH)
    truth = answers(problem, inputs)
    assert expected.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(expected[name].value, value, rtol=1e-9, atol=1e-12)
        assert expected[name].bound.shape == value.shape
        assert not bool((expected[name].bound < 0).any())
        assert bool(expected[name].bound.isfinite().all())


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("text", FEATURES)
def test_the_reference_in_low_precision_conforms(text: str, profile: str, dtype: str) -> None:
    problem, inputs = case(text.format(dtype))
    precision = PROFILES[profile]
    expected = expectation(problem, inputs, precision)
    for name, actual in answers(problem, inputs, precision).items():
        comparison = compare(expected[name], actual)
        assert comparison.conforms, (name, comparison.worst)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dropout", [0.05, 0.25, 0.9])
@pytest.mark.parametrize("spread", ["", "_dist=normal:4", "_dist=tiny"])
def test_a_kernel_that_drops_a_stored_p_conforms(spread: str, dropout: float, dtype: str) -> None:
    problem, inputs = case(
        f"b1_h2x2_q20_k40_d16_{dtype}_dropout={dropout}_sinks_grad=q,k,v,sinks_dlse{spread}"
    )
    precision = replace(FLASH, drops_stored_probabilities=True)
    expected = expectation(problem, inputs, precision)
    for name, actual in answers(problem, inputs, precision).items():
        comparison = compare(expected[name], actual)
        assert comparison.conforms, (name, comparison.worst)


@pytest.mark.parametrize("text", FEATURES[:6])
def test_the_terms_add_up_to_the_bound(text: str) -> None:
    problem, inputs = case(text.format("bf16"))
    whole = expectation(problem, inputs, EAGER)
    for name, expected in expectation(problem, inputs, EAGER, terms=True).items():
        total = torch.stack(list(expected.terms.values())).sum(0)
        judged = ~expected.exact & expected.value.isfinite()
        torch.testing.assert_close(total[judged], expected.bound[judged])
        torch.testing.assert_close(whole[name].bound, expected.bound)
        assert whole[name].terms == {}


def perturbed(scores: Tensor, delta: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores + delta, -1) @ v


@pytest.mark.parametrize("size", [1e-4, 0.3, 5.0])
def test_the_score_term_holds_for_the_worst_signs(size: float) -> None:
    """The softmax bound is no linearisation: it holds for score errors of any size."""
    from attn_reference.rounding import Rounding
    from attn_reference.scores import KeyHead
    from attn_reference.sequences import sequences
    from attnproof.budget.forward import forward_chunk
    from attnproof.budget.units import Units

    problem, inputs = case("b1_h1x1_q6_k12_d8_fp32_dist=normal:3")
    units = Units(problem, replace(FLASH, exp_error=0.0))
    units.exp = size  # every score may be off by that much
    (sequence,) = sequences(inputs, problem)
    head = KeyHead(sequence, problem, 0, Rounding(problem, None))
    forward = forward_chunk(head, slice(0, 6), units, iid=False)
    scores, v = forward.chunk.scores[0], head.v
    bound = forward.terms["scores"][0]
    worst = torch.zeros_like(bound)
    generator = torch.Generator().manual_seed(0)
    for column in range(v.shape[1]):
        # What pulls one column up most: the sign of V - out; and random signs.
        sign = (v[:, column] - forward.out[0, :, column, None]).sign()
        moved = perturbed(scores, size * sign, v) - forward.out[0]
        worst[:, column] = moved[:, column].abs()
    for _ in range(200):
        sign = torch.randint(0, 2, scores.shape, generator=generator) * 2.0 - 1
        worst = torch.maximum(worst, (perturbed(scores, size * sign, v) - forward.out[0]).abs())
    assert bool((worst <= bound).all())
    assert (worst / bound).max() > (0.5 if size < 1 else 0.3)  # and is not far above


def test_probabilities_rounded_against_the_output_stay_below() -> None:
    problem, inputs = case("b1_h1x1_q8_k16_d8_bf16")
    expected = expectation(problem, inputs, FLASH)["out"]
    q, k, v = (t[0, 0].double() for t in (inputs.q, inputs.k, inputs.v))
    p = torch.softmax(problem.softmax_scale * q @ k.T, -1)
    adverse = (p[:, :, None] * (1 + 2.0**-8 * v.sign()[None])) * v[None]
    error = (adverse.sum(1).to(torch.bfloat16).double() - expected.value[0, 0]).abs()
    ratio = error / expected.bound[0, 0]
    assert bool((ratio <= 1).all())
    assert ratio.max() > 0.8


def in_16_bits(problem: Problem, inputs: Inputs, rows: int) -> Tensor:
    """dV of a fused kernel that adds it up in bf16 over blocks of rows."""
    q, k, grad = (t[0, 0].double() for t in (inputs.q, inputs.k, inputs.grad_out) if t is not None)
    p = torch.softmax(problem.softmax_scale * q @ k.T, -1)
    total = torch.zeros(k.shape[0], grad.shape[1], dtype=torch.bfloat16)
    for start in range(0, len(q), rows):
        part = p[start : start + rows].T @ grad[start : start + rows]
        total = (total.double() + part).to(torch.bfloat16)
    return total[None, None]


def test_a_16_bit_accumulator_must_be_declared() -> None:
    problem, inputs = case("b1_h1x1_q512_k4_d16_bf16_grad=q,k,v_dist=normal:0.25")
    actual = in_16_bits(problem, inputs, 32)
    declared = replace(FLASH, accumulate_dv="bf16")
    assert not compare(expectation(problem, inputs, FLASH_FP32_P)["dv"], actual).conforms
    assert compare(expectation(problem, inputs, declared)["dv"], actual).conforms


def test_the_blocks_of_an_accumulator_count() -> None:
    problem, inputs = case("b1_h1x1_q256_k4_d16_bf16_grad=q,k,v")
    bounds = [
        expectation(problem, inputs, replace(FLASH, accumulate_dv="input", accumulate_rows=rows))[
            "dv"
        ].bound.mean()
        for rows in (256, 64, 16)
    ]
    assert bounds[0] < bounds[1] < bounds[2]


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, inputs = case("b1_h2x1_q130_k20_d16_bf16_bias=normal@11qk_sinks_grad=q,k,v,bias,sinks")
    precision = replace(FLASH, accumulate_dk="input", accumulate_dv="input")
    whole = expectation(problem, inputs, precision)
    monkeypatch.setattr("attn_reference.sequences.CHUNK_ELEMENTS", 40 * 2 * 20)
    for name, expected in expectation(problem, inputs, precision).items():
        torch.testing.assert_close(expected.value, whole[name].value)
        torch.testing.assert_close(expected.bound, whole[name].bound)


def test_looser_declarations_give_larger_bounds() -> None:
    problem, inputs = case("b1_h2x2_q20_k40_d16_bf16_softcap=5_grad=q,k,v")
    plain = expectation(problem, inputs, FLASH)
    for changes in (
        {"exp_error": 2.0**-10},
        {"tanh_error": 2.0**-10},
        {"scores": "bf16"},
        {"accumulate_out": "bf16"},
    ):
        looser = expectation(problem, inputs, replace(FLASH, **changes))
        assert bool((looser["out"].bound > plain["out"].bound).all()), changes
    stricter = expectation(problem, inputs, FLASH_FP32_P)
    assert bool((stricter["out"].bound < plain["out"].bound).all())


def test_the_error_of_exp_is_that_of_16_bit_inputs() -> None:
    problem, inputs = case("b1_h1x1_q8_k16_d8_fp32")
    loose = replace(FLASH, exp_error=2.0**-10)
    plain, declared = (expectation(problem, inputs, p)["out"].bound for p in (FLASH, loose))
    torch.testing.assert_close(declared, plain)


def test_tf32_needs_its_profile() -> None:
    problem, inputs = case("b1_h1x1_q20_k40_d32_fp32_grad=q,k,v")
    got = answers(problem, inputs, FLASH_TF32)
    assert not compare(expectation(problem, inputs, FLASH)["out"], got["out"]).conforms
    assert compare(expectation(problem, inputs, FLASH_TF32)["out"], got["out"]).conforms


def test_a_saturated_softcap_keeps_an_absolute_error() -> None:
    """Where tanh is 1 in fp32, J = 1 - tanh² is 0 in the kernel and tiny in the oracle, or off by
    a rounding of tanh: that error does not shrink with J."""
    problem, inputs = case("b1_h1x1_q8_k16_d8_fp32_softcap=1_grad=q,k,v_dist=normal:40")
    expected = expectation(problem, inputs, FLASH, terms=True)["dq"]
    got = answers(problem, inputs, FLASH)["dq"]
    assert compare(expected, got).conforms
    assert bool((expected.terms["softcap slope"] > 0.5 * expected.bound).any())


def test_one_key_is_exact_in_16_bits() -> None:
    problem, inputs = case("b1_h2x2_q8_k16_d8_bf16_mask=one-key@bhqk")
    expected = expectation(problem, inputs, FLASH)["out"]
    assert bool(expected.exact.all())
    assert not bool(expected.bound.any())
    assert compare(expected, attention(inputs, problem, FLASH).out).conforms
    off = attention(inputs, problem, FLASH).out
    off[0, 0, 0, 0] = torch.nextafter(off[0, 0, 0, 0].float(), torch.tensor(9.0)).bfloat16() + 0.01
    assert bool(compare(expected, off).wrong_exact[0, 0, 0, 0])


def test_a_dominating_key_is_exact_and_a_near_one_is_not() -> None:
    far, inputs = case("b1_h1x1_q16_k16_d16_fp16_dist=integers")
    assert bool(expectation(far, inputs, FLASH)["out"].exact.all())
    near, inputs = case("b1_h1x1_q16_k16_d16_fp16_dist=needles")
    assert not bool(expectation(near, inputs, FLASH)["out"].exact.any())


@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 2**11), ("bf16", 2**14)])
def test_a_dominating_key_is_exact_while_the_rounding_of_its_score_does_not_show(
    dtype: str, limit: int
) -> None:
    """exp2(x c - m c) in one multiply-add: P is 1 + e for the key of the maximum m, with |e| up to
    u |m|; the row sum has it in fp32, P is rounded with it."""
    problem = Problem(seqlen_q=1, seqlen_k=2, head_dim=1, scale=1.0, dtype=dtype)
    inputs = make_inputs(problem)
    # A score, a little below the limit and above it; the other key is a thousand below.
    for score, exact in ((0.9 * limit, True), (1.1 * limit, False)):
        side = math.sqrt(score)
        inputs.q[:], inputs.k[..., 0, :], inputs.k[..., 1, :] = side, side, side - 1000 / side
        assert bool(expectation(problem, inputs, FLASH)["out"].exact.all()) is exact


@pytest.mark.parametrize("declared", [{"exp_error": 2.0**-11}, {"flushes_subnormals": True}])
def test_nothing_is_exact_where_a_declaration_spoils_it(declared: dict[str, float]) -> None:
    problem, inputs = case("b1_h2x2_q8_k16_d8_fp16_mask=one-key@bhqk")
    precision = replace(FLASH, **declared)
    assert not bool(expectation(problem, inputs, precision)["out"].exact.any())


def test_structural_zeros() -> None:
    problem, inputs = case(
        "b1_h2x2_q9_k8_d8_fp32_mask=empty-rows@bhqk_bias=normal@bhqk_grad=q,k,v,bias"
    )
    expected = expectation(problem, inputs, FLASH)
    assert inputs.mask is not None
    empty = ~inputs.mask.any(-1)
    assert bool(empty.any())
    for name in ("out", "dq"):
        assert torch.equal(expected[name].zero, empty[..., None].expand(expected[name].value.shape))
    assert torch.equal(expected["dbias"].zero, ~inputs.mask)
    assert not bool(expected["lse"].zero.any())
    assert bool((expected["lse"].value[empty] == -torch.inf).all())


def test_a_zero_of_cancellation_is_not_structural() -> None:
    """With one visible key dS is P (dP - dP) = 0, but a kernel gets there by rounding."""
    problem, inputs = case("b1_h1x1_q4_k1_d8_fp32_grad=q,k,v")
    dq = expectation(problem, inputs, FLASH)["dq"]
    assert not bool(dq.zero.any())
    assert bool((dq.bound > 0).all())
    torch.testing.assert_close(dq.value, torch.zeros_like(dq.value), rtol=0, atol=1e-12)


def test_keys_that_nobody_sees_have_zero_gradients() -> None:
    problem, inputs = case("b1_h1x1_q4_k12_d8_fp32_causal=top-left_grad=q,k,v")
    expected = expectation(problem, inputs, FLASH)
    seen = torch.arange(12) < 4
    for name in ("dk", "dv"):
        assert torch.equal(~expected[name].zero[0, 0, :, 0], seen)


def test_scores_that_overflow_as_declared_are_not_judged() -> None:
    problem, inputs = case("b1_h1x1_q4_k4_d8_fp16_scale=1_grad=q,k,v")
    inputs.q.fill_(200)
    inputs.k[:, :, 0] = 50  # 8 · 200 · 50 > 65504 for the first key, and so for every row
    assert bool(expectation(problem, inputs, FLASH)["out"].judged.all())
    expected = expectation(problem, inputs, EAGER)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert not bool(expected[name].judged.any()), name
        actual = torch.full_like(expected[name].value, torch.nan)
        assert compare(expected[name], actual).conforms


def test_scores_may_overflow_downwards_where_they_have_no_weight() -> None:
    problem, inputs = case("b1_h1x1_q4_k4_d8_fp16_scale=1")
    inputs.q.fill_(200)
    inputs.k[:, :, 0] = -50  # its P is 0, in fp16 as in fp64
    assert bool(expectation(problem, inputs, EAGER)["out"].judged.all())
    inputs.k.fill_(-50)  # all are lost: the row becomes an empty one
    assert not bool(expectation(problem, inputs, EAGER)["out"].judged.any())


def test_products_may_overflow_before_they_are_scaled() -> None:
    problem, inputs = case("b1_h1x1_q4_k4_d8_fp16_scale=0.001")
    inputs.q.fill_(200)
    inputs.k[:, :, 0] = -50  # q·k = -80000, and scaled only -80
    inputs.k[:, :, 1:] = -40
    assert not bool(expectation(problem, inputs, EAGER)["out"].judged.any())
    assert bool(expectation(problem, inputs, FLASH)["out"].judged.all())


def test_sigma_is_for_iid_inputs_only() -> None:
    problem, inputs = case("b1_h1x1_q8_k16_d16_bf16")
    assert expectation(problem, inputs, FLASH)["out"].sigma is not None
    assert expectation(problem, inputs, FLASH, iid=False)["out"].sigma is None
    structured, inputs = case("b1_h1x1_q8_k16_d16_bf16_dist=duplicated")
    assert expectation(structured, inputs, FLASH)["out"].sigma is None


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("profile", ["flash", "flash-fp32-p", "eager"])
def test_sigma_is_the_size_of_the_error(profile: str, dtype: str) -> None:
    problem, inputs = case(f"b2_h4x4_q64_k96_d64_{dtype}")
    precision = PROFILES[profile]
    expected = expectation(problem, inputs, precision)["out"]
    assert expected.sigma is not None
    z = (attention(inputs, problem, precision).out.double() - expected.value) / expected.sigma
    assert 0.7 < z.square().mean().sqrt() < 1.1


def test_inputs_of_infinity_propagate() -> None:
    problem, inputs = case("b1_h1x1_q4_k4_d8_fp32")
    inputs.v[0, 0, 2, 3] = torch.inf
    expected = expectation(problem, inputs, FLASH)["out"]
    assert bool((expected.value[..., 3] == torch.inf).all())
    assert compare(expected, attention(inputs, problem, FLASH).out).conforms
    assert not compare(expected, torch.zeros(1, 1, 4, 8)).conforms


def whole(value: float, dtype: torch.dtype, bound: float) -> Expected:
    return Expected(
        value=torch.tensor([value], dtype=torch.float64),
        bound=torch.tensor([bound], dtype=torch.float64),
        zero=torch.tensor([False]),
        exact=torch.tensor([False]),
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("value", "bound", "actual", "conforms"),
    [
        (185185.0, 100.0, torch.inf, True),  # beyond fp16: rounded once it is infinite
        (185185.0, 100.0, 65504.0, False),
        (-185185.0, 100.0, -torch.inf, True),
        (-185185.0, 100.0, torch.inf, False),
        (65510.0, 40.0, torch.inf, True),  # near the threshold, 65520, either
        (65510.0, 40.0, 65504.0, True),
        (65510.0, 40.0, 65440.0, False),
        (65400.0, 40.0, torch.inf, False),
        (1.0, 0.1, torch.nan, False),
        (1.0, 0.1, 1.05, True),
        (1.0, 0.1, 1.2, False),
        (float("nan"), float("nan"), torch.nan, True),
        (float("nan"), float("nan"), 0.0, False),
        (float("inf"), float("inf"), torch.inf, True),
        (float("inf"), float("inf"), 65504.0, False),
        (1.0, float("inf"), torch.nan, True),  # not determined
        (0.0, 0.0, -0.0, True),
    ],
)
def test_overflow_and_not_finite(value: float, bound: float, actual: float, conforms: bool) -> None:
    expected = whole(value, torch.float16, bound)
    assert compare(expected, torch.tensor([actual]).half()).conforms is conforms


def test_the_worst_ratio() -> None:
    comparison = compare(whole(1.0, torch.float32, 0.5), torch.tensor([2.0]))
    assert comparison.worst == pytest.approx(2.0)
    assert compare(whole(1.0, torch.float32, 0.5), torch.tensor([torch.nan])).worst == torch.inf


@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dropout_of_a_stored_p_must_be_declared(dtype: str, dropout: float) -> None:
    """Two more roundings of P show in the statistics, unless 1 / (1 - p) is a power of two."""
    problem, inputs = case(f"b1_h4x4_q128_k128_d64_{dtype}_dropout={dropout}")
    declared = replace(FLASH, drops_stored_probabilities=True)
    out = attention(inputs, problem, declared).out
    worst = {
        precision: max(s.ratio for s in statistics(expectation(problem, inputs, p)["out"], out))
        for precision, p in (("plain", FLASH), ("declared", declared))
    }
    assert worst["declared"] < 1
    assert (worst["plain"] > 1) == (dropout != 0.5)


def with_p_in_16_bits(problem: Problem, inputs: Inputs) -> Tensor:
    """dK of a fused kernel that forms dS from P as it was stored for dV."""
    assert inputs.grad_out is not None
    q, k, v, grad = (t[0, 0].double() for t in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    p = torch.softmax(problem.softmax_scale * q @ k.T, -1)
    delta = (grad * (p @ v).to(problem.torch_dtype).double()).sum(-1, keepdim=True)
    ds = p.to(problem.torch_dtype).double() * (grad @ v.T - delta)
    dk = problem.softmax_scale * ds.to(problem.torch_dtype).double().T @ q
    return dk.to(problem.torch_dtype)[None, None]


def test_gradients_formed_from_a_stored_p_must_be_declared() -> None:
    """A subnormal P of fp16 is off by far more than the dS that comes of it."""
    problem, inputs = case("b1_h1x1_q139_k139_d72_fp16_scale=1_grad=q,k,v_dist=normal:4_seed=27")
    actual = with_p_in_16_bits(problem, inputs)
    declared = replace(FLASH, gradient_probabilities="input")
    assert not compare(expectation(problem, inputs, FLASH)["dk"], actual).conforms
    assert compare(expectation(problem, inputs, declared)["dk"], actual).conforms


def test_gradients_may_underflow_where_they_are_stored() -> None:
    """dV of the second key is e^-40 2^-100 = 2^-157.7, for which fp32 has nothing but 0."""
    problem, inputs = case("b1_h1x1_q1_k2_d1_fp32_scale=1_grad=q,k,v")
    assert inputs.grad_out is not None
    inputs.q[:], inputs.grad_out[:] = 1.0, 2.0**-100
    inputs.k[..., 0, :], inputs.k[..., 1, :] = 0.0, -40.0
    expected, actual = expectation(problem, inputs, FLASH)["dv"], answers(problem, inputs, FLASH)
    assert 0 < expected.value[..., 1, :].item() < 2.0**-150
    assert actual["dv"][..., 1, :].item() == 0
    assert compare(expected, actual["dv"]).conforms


def test_shares_of_a_bias_may_underflow_where_they_are_stored() -> None:
    problem, inputs = case("b2_h1x1_q1_k2_d1_fp32_bias=normal@11qk_grad=bias")
    inputs.grad_out = torch.zeros_like(inputs.q)
    terms = expectation(problem, inputs, FLASH, terms=True)["dbias"].terms
    # Two shares; the gradient that is stored may be 2^-126 by the underflow of dS.
    one = 2.0**-24 * 2.0**-126 + 2.0**-150
    assert terms["16-bit sums and stores"].flatten().tolist() == pytest.approx([2 * one] * 2, abs=0)


def test_a_recomputed_p_may_underflow_in_fp64() -> None:
    """The P of the second key is e^-720, which is subnormal, and multiplied by 2^60."""
    problem, inputs = case("b1_h1x1_q1_k2_d1_fp64_scale=1_grad=q,k,v")
    assert inputs.grad_out is not None
    inputs.q[:], inputs.grad_out[:] = 1.0, 2.0**60
    inputs.k[..., 0, :], inputs.k[..., 1, :] = 0.0, -720.0
    inputs.v[..., 0, :], inputs.v[..., 1, :] = 0.0, 1.0
    expected = expectation(problem, inputs, FLASH)["dk"]
    flushed = expected.value.clone()
    flushed[..., 1, :] = 0.0
    assert compare(expected, expected.value).conforms
    assert compare(expected, flushed).conforms
    flushed[..., 1, :] = 2.0**-900
    assert not compare(expected, flushed).conforms
