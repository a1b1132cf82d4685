"""Vacuity: a case whose feature changes nothing beyond the noise proves nothing."""

from __future__ import annotations

import pytest

from attn_reference.precision import EAGER, FLASH
from attn_reference.problem import Problem
from attnproof.inputs.make import make_inputs
from attnproof.judge.vacuity import WITHOUT, vacuous_features

SHOWN = {
    "causal top-left": "b1_h1x1_q16_k16_d16_bf16_causal=top-left",
    "causal bottom-right": "b1_h1x1_q12_k16_d16_bf16_causal=bottom-right",
    "window": "b1_h1x1_q16_k16_d16_bf16_window=3,2",
    "softcap": "b1_h1x1_q16_k16_d16_bf16_softcap=1_dist=normal:3",
    "alibi": "b1_h2x2_q16_k16_d16_bf16_alibi",
    "boolean mask": "b1_h1x1_q16_k16_d16_bf16_mask=random@bhqk",
    "bias": "b1_h1x1_q16_k16_d16_bf16_bias=normal@bhqk_grad=q,k,v,bias",
    "sinks": "b1_h2x2_q16_k16_d16_bf16_sinks_grad=q,k,v,sinks",
    "scale": "b1_h1x1_q16_k16_d16_bf16_scale=0.5",
    "gqa": "b1_h4x2_q16_k16_d16_bf16_grad=q,k,v",
    "key lengths": "b2_h1x1_q16_k16_d16_bf16_lens=9,16",
    "packed": "packed=9x16,5x3_h1x1_d16_bf16",
    "paged": "b2_h1x1_q4_k16_d16_bf16_page=4",
    "dropout": "b1_h1x1_q16_k16_d16_bf16_dropout=0.5",
    "gradients": "b1_h1x1_q16_k16_d16_bf16_grad=q,k,v",
    "lse gradient": "b1_h1x1_q16_k16_d16_bf16_grad=q,k,v_dlse",
}
IDLE = {
    "causal top-left": "b1_h1x1_q16_k1_d16_bf16_causal=top-left",
    "causal bottom-right": "b1_h1x1_q1_k16_d16_bf16_causal=bottom-right",
    "window": "b1_h1x1_q16_k16_d16_bf16_window=16,16",
    "softcap": "b1_h1x1_q16_k16_d16_bf16_softcap=50_dist=normal:0.1",
    "alibi": "b1_h2x2_q1_k1_d16_bf16_alibi",
    "boolean mask": "b1_h1x1_q16_k1_d16_fp32_mask=last-tile@bhqk",
    "sinks": "b1_h1x1_q16_k16_d16_bf16",  # it has none
    "scale": "b1_h1x1_q16_k16_d16_bf16_scale=0.25",
    "gqa": "b1_h4x2_q16_k0_d16_bf16",
    "key lengths": "b2_h1x1_q16_k16_d16_bf16_lens=16,16",
    "packed": "packed=9x16_h1x1_d16_bf16",
    "gradients": "b1_h1x1_q4_k1_d16_bf16_grad=q,k,v",  # one key: dq and dk are 0
    "lse gradient": "b1_h1x1_q4_k0_d16_bf16_grad=q,k,v_dlse",
}


def idle(text: str, *shows: str) -> list[str]:
    problem = Problem.from_id(text)
    return vacuous_features(problem, make_inputs(problem), shows, FLASH)


def test_every_feature_is_tried() -> None:
    assert WITHOUT.keys() < SHOWN.keys()


@pytest.mark.parametrize("feature", SHOWN)
def test_a_feature_that_matters_is_shown(feature: str) -> None:
    assert idle(SHOWN[feature], feature) == []


@pytest.mark.parametrize("feature", IDLE)
def test_a_feature_that_does_nothing_is_vacuous(feature: str) -> None:
    assert idle(IDLE[feature], feature) == [feature]


def test_only_the_idle_ones_are_named() -> None:
    text = "b1_h1x1_q16_k16_d16_bf16_causal=top-left_window=40,5"
    assert idle(text, "causal top-left", "window") == ["window"]
    assert idle(text) == []


def test_bottom_right_must_differ_from_top_left_too() -> None:
    """Where queries see (nearly) all keys under one alignment, the other one must be told apart."""
    assert idle("b1_h1x1_q8_k64_d16_bf16_causal=bottom-right", "causal bottom-right") == []
    # Two queries and two thousand keys: hiding one key of them is within the noise.
    problem = Problem.from_id("b1_h1x1_q2_k2000_d16_bf16_causal=bottom-right")
    found = vacuous_features(problem, make_inputs(problem), ["causal bottom-right"], EAGER)
    assert found == ["causal bottom-right"]


def test_head_dim_v_and_one_kv_head_have_no_other_reading() -> None:
    assert idle("b1_h1x1_q4_k4_d16_dv8_bf16", "head_dim_v") == []
    assert idle("b1_h4x1_q4_k4_d16_bf16", "gqa") == []


def test_the_statistics_count() -> None:
    """A dropped key among many: far below four times the bound, far above a row's statistic."""
    problem = Problem.from_id("b1_h1x1_q64_k64_d64_bf16_mask=last-tile@bhqk_bias=constant@bhqk")
    inputs = make_inputs(problem)
    assert inputs.mask is not None
    inputs.mask.fill_(True)
    inputs.mask[..., -1] = False
    assert vacuous_features(problem, inputs, ["boolean mask"], FLASH) == []
    inputs.mask.fill_(True)
    assert vacuous_features(problem, inputs, ["boolean mask"], FLASH) == ["boolean mask"]
