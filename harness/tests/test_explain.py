"""Explain: is the difference in a file honest, and why; and files that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attn_reference.backward import gradients
from attn_reference.forward import attention
from attn_reference.inputs import Inputs
from attn_reference.precision import EAGER, FLASH, FLASH_FP32_P, Precision
from attn_reference.problem import Problem
from attnproof.backend import Capabilities
from attnproof.computation import load_computation
from attnproof.explain import ExplainError, explain, save_computation
from attnproof.inputs.make import make_inputs, make_keep_mask
from attnproof.plan import CallResult

EVERYTHING = (
    "b2_h4x2_q9_k13_d8_dv5_bf16_scale=0.75_causal=bottom-right_window=6,inf_softcap=3_alibi"
    "_mask=random@bhqk_bias=normal@1h1k_sinks_lens=13,8_dropout=0.25"
    "_grad=q,k,v,bias,sinks_dlse"
)
PLAIN = "b1_h2x2_q33_k40_d32_bf16"


def computed(text: str, precision: Precision = FLASH) -> tuple[Problem, Inputs, CallResult]:
    problem = Problem.from_id(text)
    inputs = make_inputs(problem)
    if problem.dropout:
        inputs.keep_mask = make_keep_mask(problem)
    result = attention(inputs, problem, precision)
    found = gradients(inputs, problem, precision, result) if problem.gradients else None
    return problem, inputs, CallResult(attention=result, gradients=found)


def saved(path: Path, text: str, precision: Precision = FLASH) -> Path:
    file = path / "saved.safetensors"
    save_computation(file, *computed(text, precision))
    return file


def edited(file: Path, metadata: dict[str, str] | None, **tensors: torch.Tensor | None) -> Path:
    """The file with other metadata and tensors; None takes one away."""
    found = {**load_file(file), **tensors}
    save_file({n: t for n, t in found.items() if t is not None}, file, metadata=metadata)
    return file


def test_an_honest_computation(tmp_path: Path) -> None:
    explanation = explain(saved(tmp_path, EVERYTHING))
    assert explanation.honest
    names = [account.name for account in explanation.accounts]
    assert names == ["out", "lse", "dq", "dk", "dv", "dbias", "dsinks"]
    for account in explanation.accounts:
        assert account.worst <= 1
        assert sum(account.shares.values()) == pytest.approx(1, abs=0.05)
    assert "Honest: rounding under the precision 'flash' explains every error." in explanation.text
    assert Problem.from_id(EVERYTHING).id in explanation.text


def test_the_numbers_are_those_of_the_errors(tmp_path: Path) -> None:
    file = saved(tmp_path, PLAIN)
    problem, inputs, result = computed(PLAIN)
    assert result.attention is not None
    error = (result.attention.out.double() - attention(inputs, problem).out).abs()
    out = explain(file).accounts[0]
    assert out.largest == pytest.approx(error.max().item())
    assert out.mean == pytest.approx(error.mean().item())
    assert out.eager is not None
    assert out.eager < 1
    assert next(iter(out.shares)) in ("P rounding", "store")


def test_a_dishonest_one_and_the_profile_that_would_explain_it(tmp_path: Path) -> None:
    explanation = explain(saved(tmp_path, "b1_h2x2_q64_k64_d64_bf16_dist=normal:2", EAGER))
    assert not explanation.honest
    assert "Not honest under the precision 'flash'" in explanation.text
    assert "The precision 'eager' would explain it." in explanation.text


def test_a_wrong_answer_has_no_excuse(tmp_path: Path) -> None:
    file = saved(tmp_path, PLAIN)
    out = load_file(file)["out"]
    out[0, 1, 3] = 0
    edited(file, {"problem": Problem.from_id(PLAIN).id}, out=out)
    explanation = explain(file)
    assert not explanation.honest
    assert explanation.accounts[0].index is not None
    assert explanation.accounts[0].index[:3] == (0, 1, 3)
    assert "would explain it" not in explanation.text


@pytest.mark.parametrize("form", ["name", "fields", "argument"])
def test_a_precision_may_be_declared(tmp_path: Path, form: str) -> None:
    file = saved(tmp_path, "b1_h2x2_q64_k64_d64_bf16_dist=normal:2", EAGER)
    metadata = {"problem": Problem.from_id("b1_h2x2_q64_k64_d64_bf16_dist=normal:2").id}
    if form != "argument":
        metadata["precision"] = "eager" if form == "name" else json.dumps(EAGER.as_dict())
    edited(file, metadata)
    explanation = explain(file, precision=EAGER if form == "argument" else None)
    assert explanation.precision == EAGER
    assert explanation.honest


def test_save_keeps_precision_and_reads_the_lse_as_declared(tmp_path: Path) -> None:
    problem, inputs, result = computed(PLAIN, FLASH_FP32_P)
    assert result.attention is not None
    assert result.attention.lse is not None
    lse = result.attention.lse.transpose(1, 2) / torch.tensor(2.0).log()
    call = replace(result, attention=replace(result.attention, lse=lse))
    declared = Capabilities(returns_lse=True, lse_base="2", lse_layout="bsh")
    file = tmp_path / "lse.safetensors"
    save_computation(file, problem, inputs, call, FLASH_FP32_P, declared)
    explanation = explain(file)
    assert explanation.precision == FLASH_FP32_P
    assert explanation.honest


def test_without_metadata_the_tensors_show_the_problem(tmp_path: Path) -> None:
    file = edited(saved(tmp_path, "b2_h4x2_q9_k13_d8_fp16_bias=normal@1h1k_sinks_grad=q"), None)
    loaded = load_computation(file)
    shown = loaded.problem
    assert (shown.batch, shown.heads_q, shown.kv_heads) == (2, 4, 2)
    assert (shown.seqlen_q, shown.keys, shown.head_dim, shown.dtype) == (9, 13, 8, "fp16")
    assert (shown.bias_shape, shown.sinks, shown.gradients) == ("1h1k", True, ("q",))
    explanation = explain(file)
    assert explanation.honest
    assert "the metadata has no problem" in explanation.text


def test_without_metadata_a_problem_may_be_given(tmp_path: Path) -> None:
    text = "b1_h1x1_q9_k13_d8_bf16_causal=bottom-right"
    file = edited(saved(tmp_path, text), None)
    assert explain(file, problem=Problem.from_id(text)).honest
    assert not explain(file).honest  # nothing in the tensors says that it is causal


@pytest.mark.parametrize(
    "text",
    [
        "packed=9x13,5x4_h2x1_d8_bf16",
        "b2_h2x1_q4_k16_d8_bf16_lens=16,9_page=4",
        "b2_h2x2_q4_k16_d8_bf16_lens=16,9_mask=random@b1qk_alibi",
    ],
)
def test_lengths_and_pages_show_in_the_tensors(tmp_path: Path, text: str) -> None:
    assert explain(edited(saved(tmp_path, text), None)).honest


def test_wider_tensors_are_compared_as_they_are(tmp_path: Path) -> None:
    file = saved(tmp_path, PLAIN)
    problem, inputs, _ = computed(PLAIN)
    edited(file, {"problem": problem.id}, out=attention(inputs, problem).out)
    explanation = explain(file)
    assert explanation.honest
    assert "compared as they are, in another dtype: out float64" in explanation.text


def test_gradients_that_are_not_there_are_said(tmp_path: Path) -> None:
    text = "b1_h1x1_q9_k13_d8_bf16_grad=q,k,v"
    file = edited(saved(tmp_path, text), {"problem": Problem.from_id(text).id}, dk=None)
    explanation = explain(file)
    assert [account.name for account in explanation.accounts] == ["out", "lse", "dq", "dv"]
    assert "not in the file: dk" in explanation.text


def test_dropout_without_a_keep_mask_is_said(tmp_path: Path) -> None:
    text = "b1_h1x1_q9_k13_d8_bf16_dropout=0.5"
    file = edited(saved(tmp_path, text), {"problem": Problem.from_id(text).id}, keep_mask=None)
    explanation = explain(file)
    assert [account.name for account in explanation.accounts] == ["lse"]
    assert "what dropout kept was not returned" in explanation.text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"out": None}, "holds no tensor 'out'"),
        ({"k": torch.zeros(1, 2, 40, 16, dtype=torch.bfloat16)}, "k has shape"),
        ({"v": torch.zeros(1, 2, 40, 32)}, "v has dtype"),
        ({"sinks": torch.zeros(2)}, "sinks is given"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], says: str
) -> None:
    file = edited(saved(tmp_path, PLAIN), {"problem": Problem.from_id(PLAIN).id}, **changes)
    with pytest.raises(ExplainError, match=says):
        explain(file)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"problem": "b1_what"}, "part 'what' is not understood"),
        ({"problem": PLAIN, "precision": "sloppy"}, "precision 'sloppy'"),
        ({"problem": PLAIN, "precision": '{"nme": 1}'}, "nme"),
        ({"problem": "b1_h1x1_q4_k4_d8_bf16"}, "q has shape"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, metadata: dict[str, str], says: str) -> None:
    with pytest.raises(ExplainError, match=says):
        explain(edited(saved(tmp_path, PLAIN), metadata))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ExplainError, match="does not exist"):
        explain(tmp_path / "none.safetensors")
    with pytest.raises(ExplainError, match="is a folder"):
        explain(tmp_path)
    torch.save({}, tmp_path / "saved.pt")
    with pytest.raises(ExplainError, match="cannot be read as safetensors"):
        explain(tmp_path / "saved.pt")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        save_computation(tmp_path / "no" / "where.safetensors", *computed(PLAIN))
