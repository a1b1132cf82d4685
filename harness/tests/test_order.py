"""Cases that share a kernel are neighbours."""

import itertools
from typing import Any

import pytest

from attn_reference.problem import Problem
from attnproof.cases import all_cases
from attnproof.order import kernel_key

PLAIN = Problem(batch=2, heads_q=4, heads_kv=2, seqlen_q=65, head_dim=64)
OF_NUMBERS: list[dict[str, Any]] = [
    {"seqlen_q": 33},
    {"seqlen_k": 100},
    {"batch": 3},
    {"scale": 0.5},
    {"seed": 7},
    {"distribution": "needles"},
]
OF_THE_KERNEL: list[dict[str, Any]] = [
    {"dtype": "bf16"},
    {"head_dim": 128},
    {"head_dim_v": 32},
    {"causal": "top-left"},
    {"window": (3, None)},
    {"softcap": 5.0},
    {"mask": "random"},
    {"gradients": ("q",)},
    {"heads_kv": 1},
    {"batch": 1},
    {"seqlen_q": 1},
    {"seqlen_q": 129},
    {"seqlen_k": 129},
    {"layouts": (("q", "bshd"),)},
]


@pytest.mark.parametrize("change", OF_NUMBERS, ids=str)
def test_numbers_make_no_other_kernel(change: dict[str, Any]) -> None:
    assert kernel_key(PLAIN.replace(**change)) == kernel_key(PLAIN)


@pytest.mark.parametrize("change", OF_THE_KERNEL, ids=str)
def test_what_is_compiled_in_makes_another_kernel(change: dict[str, Any]) -> None:
    assert kernel_key(PLAIN.replace(**change)) != kernel_key(PLAIN)


def test_every_case_can_be_ordered_and_kernels_are_met_once() -> None:
    keys = sorted(kernel_key(case.problem) for case in all_cases())
    assert len(list(itertools.groupby(keys))) == len(set(keys)) < len(keys) / 2
