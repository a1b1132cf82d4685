"""Mask rules, device functions of their user, equal the boolean masks that they mean."""

import pytest
import torch
import triton

from triton_attention import attention
from triton_attention.arguments import Arguments
from triton_attention.v2_launches import Launches

from . import dense
from .making import HQ, SK, SQ, B, arguments, everything, packed, paged, qkv, randn


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@triton.jit
def prefix(i, j, head, batch):
    """All see the first 30 keys, and behind these those up to their own position."""
    return (j < 30) | (j <= i)


@triton.jit
def dilated(i, j, head, batch):
    return (i - j) % 3 == 0


@triton.jit
def nothing(i, j, head, batch):
    return j < 0


@triton.jit
def of_heads(i, j, head, batch):
    """Every head and sequence has its own stride."""
    return (i + j) % (head + 2 * batch + 1) == 0


RULES = {
    prefix: lambda i, j, head, batch: (j < 30) | (j <= i),
    dilated: lambda i, j, head, batch: (i - j) % 3 == 0,
    nothing: lambda i, j, head, batch: (j < 0) & (i >= 0),
    of_heads: lambda i, j, head, batch: (i + j) % (head + 2 * batch + 1) == 0,
}


def mask_of(rule, b=B, sq=SQ, sk=SK):
    """The same as a boolean mask (B, Hq, Sq, Sk)."""
    batch, head = torch.arange(b)[:, None, None, None], torch.arange(HQ)[:, None, None]
    seen = RULES[rule](torch.arange(sq)[:, None], torch.arange(sk), head, batch)
    return seen.expand(b, HQ, sq, sk)


def held_against_the_mask(given, rule, mask):
    """V2 with the rule, against the formula with the mask: out, LSE and gradients."""
    seen = mask if given.get("mask") is None else mask & given["mask"].cpu()

    def with_the_rule(**leaves_and_others):
        return attention(**(leaves_and_others | {"mask": given.get("mask")}), mask_rule=rule)

    return dense.check(with_the_rule, given | {"mask": seen.to(given["q"].device)})


@pytest.mark.parametrize("options", [{}, {"causal": "top-left"}, {"window": (40, 9)}], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_is_a_mask(rule, options, device):
    found = held_against_the_mask(arguments(device, **qkv(), **options), rule, mask_of(rule))
    assert found["lse"].isneginf().all() == (rule is nothing)


@pytest.mark.parametrize("sq", [3, SQ], ids=["few-queries", "many-queries"])
@pytest.mark.parametrize("dtype", dense.TOLERANCE, ids=str)
def test_a_rule_beside_all_features(dtype, sq, device):
    given = arguments(device, dtype, **qkv(sq), **everything(sq=sq))
    held_against_the_mask(given, of_heads, mask_of(of_heads, sq=sq))


def test_a_rule_knows_packed_sequences_by_number(device):
    lens_q, lens_k = (40, 0, 33), (50, 20, 33)
    mask = torch.zeros(1, HQ, sum(lens_q), sum(lens_k), dtype=torch.bool)
    row = key = 0
    for n, (sq, sk) in enumerate(zip(lens_q, lens_k, strict=True)):
        mask[0, :, row : row + sq, key : key + sk] = mask_of(of_heads, 3, sq, sk)[n]
        row, key = row + sq, key + sk
    held_against_the_mask(arguments(device, **packed(lens_q, lens_k)), of_heads, mask)


def test_a_rule_over_pages(device):
    given = arguments(device, **paged((37, 80), 3, 40))
    held_against_the_mask(given, of_heads, mask_of(of_heads, 2, 40, 80))


def test_a_rule_over_splits(device):
    given = arguments(device, **qkv(2, 300))
    options = {name: given[name] for name in "qkv"}
    found = Launches(Arguments(**options, mask_rule=of_heads)).forward(splits=3).run()
    mask = mask_of(of_heads, sq=2, sk=300)
    expected = dense.attention(*(dense.exact(options[name]) for name in "qkv"), mask=mask)
    measured = dense.errors(found, dict(zip(("out", "lse"), expected, strict=True)))
    assert max(measured.values()) <= dense.TOLERANCE[torch.float32], measured


def even():
    @triton.jit
    def rule(i, j, head, batch):
        return (i + j) % 2 == 0

    return rule, lambda i, j: (i + j) % 2 == 0


def odd():
    @triton.jit
    def rule(i, j, head, batch):
        return (i + j) % 2 == 1

    return rule, lambda i, j: (i + j) % 2 == 1


def test_rules_of_one_name_are_told_apart(device):
    given = arguments(device, **qkv())
    grads = randn(*given["q"].shape).to(device), randn(B, HQ, SQ).to(device)
    found = []
    for rule, seen in (even(), odd(), even()):
        assert rule.__name__ == "rule"
        mask = seen(torch.arange(SQ)[:, None], torch.arange(SK)).expand(B, HQ, SQ, SK)
        held_against_the_mask(given, rule, mask)
        found.append(dense.results(attention, given | {"mask_rule": rule}, grads))
    for name in ("out", "lse", "q", "k", "v"):
        assert torch.equal(found[0][name], found[2][name]), name
        assert not torch.equal(found[0][name], found[1][name]), name
