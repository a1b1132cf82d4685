"""Tensors that do not fit their problem are refused, by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from attn_reference import Problem, attention, gradients, validate
from attn_reference.validation import complaints

PLAIN = Problem(batch=2, heads_q=4, heads_kv=2, seqlen_q=3, seqlen_k=5, head_dim=6, head_dim_v=7)
FULL = PLAIN.replace(
    mask="random",
    mask_shape="1hqk",
    bias="random",
    bias_shape="b1qk",
    alibi=True,
    sinks=True,
    dropout=0.1,
    key_lengths=(5, 2),
    gradients=("q",),
    lse_gradient=True,
)
PACKED = Problem(packed=((3, 4), (2, 2)), heads_q=2, head_dim=6)
PAGED = PLAIN.replace(page_size=2, key_lengths=(5, 2))
FP64 = FULL.replace(dtype="fp64")


def test_what_fits_is_accepted(problem, random_inputs):
    assert validate(random_inputs(problem), problem) is None


@pytest.mark.parametrize("problem", [FULL, PACKED, PAGED, FP64], ids=lambda p: p.id)
def test_gradients_and_lengths_may_be_missing(problem, random_inputs):
    inputs = random_inputs(problem)
    inputs.grad_out = inputs.grad_lse = None
    inputs.key_lengths = inputs.cu_seqlens_q = inputs.cu_seqlens_k = None
    validate(inputs, problem)


def test_logits_of_fp64_problems_may_be_fp32(random_inputs):
    inputs = random_inputs(FP64)
    inputs.sinks, inputs.grad_lse = inputs.sinks.float(), inputs.grad_lse.float()
    validate(inputs, FP64)


@pytest.mark.parametrize(
    ("problem", "name", "value", "said"),
    [
        (PLAIN, "q", torch.zeros(2, 4, 3, 5), r"q has shape .*5\): expected is \(2, 4, 3, 6\)"),
        (PLAIN, "q", torch.zeros(2, 4, 6), r"q has shape \(2, 4, 6\): expected is \(2, 4, 3, 6\)"),
        (PLAIN, "k", torch.zeros(2, 4, 5, 6), r"k has shape .*: expected is \(2, 2, 5, 6\)"),
        (PLAIN, "v", torch.zeros(2, 2, 5, 6), r"v has shape .*: expected is \(2, 2, 5, 7\)"),
        (
            PLAIN,
            "q",
            torch.zeros(2, 4, 3, 6).half(),
            "q has dtype torch.float16: expected is torch.float32",
        ),
        (PLAIN, "q", np.zeros((2, 4, 3, 6)), "q is a ndarray: expected is a torch.Tensor"),
        (
            PLAIN,
            "k",
            torch.zeros(2, 2, 5, 6, device="meta"),
            "k is on meta: expected is cpu, where q is",
        ),
        (FULL, "mask", None, "mask is missing: the problem has mask='random'"),
        (FULL, "bias", None, "bias is missing: the problem has bias='random'"),
        (FULL, "alibi_slopes", None, "alibi_slopes is missing: the problem has alibi=True"),
        (FULL, "sinks", None, "sinks is missing: the problem has sinks=True"),
        (FULL, "keep_mask", None, "keep_mask is missing: the problem has dropout=0.1"),
        (PAGED, "page_table", None, "page_table is missing: the problem has page_size=2"),
        (
            PLAIN,
            "mask",
            torch.ones(2, 4, 3, 5, dtype=torch.bool),
            r"mask is given, torch.bool \(2, 4, 3, 5\), but the problem has mask=None",
        ),
        (PLAIN, "bias", torch.ones(1), "bias is given, .*but the problem has bias=None"),
        (PLAIN, "sinks", torch.ones(4), "sinks is given, .*but the problem has sinks=False"),
        (PLAIN, "keep_mask", torch.ones(1), "keep_mask is given, .*has dropout=0.0"),
        (PLAIN, "key_lengths", torch.ones(2).int(), "key_lengths is given, .*has key_lengths=None"),
        (PLAIN, "cu_seqlens_q", torch.ones(2).int(), "cu_seqlens_q is given, .*has packed=None"),
        (
            FULL,
            "mask",
            torch.ones(2, 1, 3, 5, dtype=torch.bool),
            r"mask has shape \(2, 1, 3, 5\): expected is \(1, 4, 3, 5\)",
        ),
        (
            FULL,
            "mask",
            torch.ones(1, 4, 3, 5),
            "mask has dtype torch.float32: expected is torch.bool",
        ),
        (FULL, "bias", torch.ones(2, 1, 3, 5).double(), "bias has dtype torch.float64"),
        (FULL, "alibi_slopes", torch.ones(2, 4), r"alibi_slopes has shape .*expected is \(4\)"),
        (FULL, "sinks", torch.ones(4).half(), "sinks has dtype torch.float16: expected is "),
        (FULL, "keep_mask", torch.ones(2, 4, 3, 5), "keep_mask has dtype torch.float32"),
        (FULL, "grad_out", torch.ones(2, 4, 3, 6), r"grad_out has shape .*\(2, 4, 3, 7\)"),
        (FULL, "grad_lse", torch.ones(2, 4, 3).half(), "grad_lse has dtype torch.float16"),
        (
            FP64,
            "sinks",
            torch.ones(4).half(),
            "sinks has dtype torch.float16: expected is torch.float32 or torch.float64",
        ),
        (
            FULL,
            "key_lengths",
            torch.tensor([5, 3], dtype=torch.int32),
            r"key_lengths holds \(5, 3\): the problem has \(5, 2\)",
        ),
        (FULL, "key_lengths", torch.tensor([5, 2]), "key_lengths has dtype torch.int64"),
        (PACKED, "q", torch.zeros(1, 2, 6, 6), r"q has shape .*: expected is \(1, 2, 5, 6\)"),
        (
            PACKED,
            "cu_seqlens_k",
            torch.tensor([0, 4, 7], dtype=torch.int32),
            r"cu_seqlens_k holds \(0, 4, 7\): the problem has \(0, 4, 6\)",
        ),
        (PAGED, "k", torch.zeros(9, 2, 3, 6), r"k has shape .*: expected is \(any, 2, 2, 6\)"),
        (
            PAGED,
            "page_table",
            torch.zeros(2, 2, dtype=torch.int32),
            "page_table has 2 pages per entry: 5 keys need 3 of 2",
        ),
        (
            PAGED,
            "page_table",
            torch.tensor([[1, 2, 7], [1, 0, 0]], dtype=torch.int32),
            "page_table names page 7: k has pages 0 to 6",
        ),
        (
            PAGED,
            "page_table",
            torch.tensor([[1, 2, 0], [-1, 0, 0]], dtype=torch.int32),
            "page_table names page -1",
        ),
        (PAGED, "page_table", torch.zeros(2).int(), r"page_table has shape .*\(2, any\)"),
        (PAGED, "v", torch.zeros(3, 2, 2, 7), "v has 3 pages: expected is 7, as k has"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 13 else "",
)
def test_what_does_not_fit_is_named(problem, name, value, said, random_inputs):
    inputs = replace(random_inputs(problem), **{name: value})
    with pytest.raises(ValueError, match=said):
        attention(inputs, problem)
    with pytest.raises(ValueError, match=said):
        gradients(inputs, problem)


def test_what_broadcasts_may_come_expanded(random_inputs):
    problem = FULL.replace(gradients=("bias",))
    inputs = random_inputs(problem)
    whole, grad = attention(inputs, problem).out, gradients(inputs, problem).bias
    inputs.mask = inputs.mask.expand(2, 4, 3, 5)
    inputs.bias = inputs.bias.expand(2, 4, 3, 5)
    assert torch.equal(attention(inputs, problem).out, whole)
    torch.testing.assert_close(gradients(inputs, problem).bias.sum(1, keepdim=True), grad)


def test_pages_behind_the_length_may_name_nothing(random_inputs):
    inputs = random_inputs(PAGED)
    inputs.page_table[1, 1:] = -1  # two keys need one page
    validate(inputs, PAGED)


def test_all_complaints(random_inputs):
    inputs = random_inputs(FULL)
    inputs.mask = inputs.sinks = None
    inputs.q = inputs.q[:1]
    said = list(complaints(inputs, FULL))
    assert [sentence.split()[0] for sentence in said] == ["mask", "sinks", "q"]
