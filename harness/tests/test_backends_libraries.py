"""How the libraries are called, against functions of torch that keep to their documented contract.

The libraries themselves need a GPU; there the harness judges them.
"""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_reference.forward import attention as truth
from attn_reference.inputs import Attention
from attn_reference.problem import Problem
from attnproof.backends import flashinfer, xformers
from attnproof.backends.library import LibraryBackend
from attnproof.inputs.make import make_inputs
from attnproof.targets import TargetSpec, load

BASE = Problem(batch=2, heads_q=6, heads_kv=2, seqlen_q=5, seqlen_k=9, head_dim=64)
SEQUENCES = ((3, 5), (4, 4), (0, 2), (2, 0))


def softmax(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Out and LSE; a row of -inf gives 0 and -inf."""
    lse = scores.logsumexp(-1)
    weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return weights @ v, lse


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    kv_layout: str,
    sm_scale: float,
    window_left: int,
    logits_soft_cap: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """q (Sq, Hq, D), k and v (Sk, Hkv, D); causal from the bottom right; the LSE to the base 2."""
    assert kv_layout == "NHD"
    assert return_lse
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * sm_scale
    if logits_soft_cap:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    i = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    j = torch.arange(k.shape[0])
    if causal:
        scores = scores.masked_fill(j > i, -math.inf)
    if window_left >= 0:
        scores = scores.masked_fill(j < i - window_left, -math.inf)
    out, lse = softmax(scores, v.transpose(0, 1))
    return out.transpose(0, 1), lse.T / math.log(2)


def assert_right(result: Attention, problem: Problem, *, base: float = math.e) -> None:
    true = truth(make_inputs(problem), problem)
    assert true.out is not None
    torch.testing.assert_close(result.out.double(), true.out.double(), rtol=1e-5, atol=1e-5)
    if result.lse is not None:
        assert true.lse is not None
        lse = result.lse.double() * math.log(base)
        torch.testing.assert_close(lse, true.lse.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "problem",
    [
        BASE,
        BASE.replace(causal="bottom-right"),
        BASE.replace(causal="bottom-right", seqlen_q=11),
        BASE.replace(window=(2, 0)),
        BASE.replace(window=(2, None), causal="bottom-right"),
        BASE.replace(softcap=2.0),
        BASE.replace(scale=0.3),
        BASE.replace(key_lengths=(0, 7), causal="bottom-right"),
        BASE.replace(packed=SEQUENCES, causal="bottom-right", batch=4),
    ],
    ids=lambda problem: problem.id,
)
def test_flashinfer(problem: Problem) -> None:
    reasons = flashinfer.flashinfer.capabilities.unsupported_reasons(problem)
    assert reasons == ["dtype fp32 is not one of fp16, bf16"]
    result = flashinfer.call(single_prefill_with_kv_cache, make_inputs(problem), problem)
    assert_right(result, problem, base=2)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (BASE.replace(window=(2, 3)), "only the left side can be bounded"),
        (BASE.replace(head_dim=192), "head_dim 192 is not one of"),
    ],
)
def test_what_flashinfer_has_no_kernel_for(problem: Problem, said: str) -> None:
    with pytest.raises(NotImplementedError, match=said):
        flashinfer.call(single_prefill_with_kv_cache, make_inputs(problem), problem)


class Rule:
    """What is visible, (Sq, Sk), in words of the documentation of xformers.ops.fmha.attn_bias."""

    def __init__(self, corner: str | None = None, left: int = 1 << 30, right: int = 1 << 30):
        self.corner, self.left, self.right = corner, left, right

    def visible(self, len_q: int, len_k: int) -> Tensor:
        distance = torch.arange(len_k) - torch.arange(len_q)[:, None]
        if self.corner == "bottom-right":
            distance = distance - (len_k - len_q)
        return (distance >= -self.left) & (distance <= self.right)


class BlockDiagonalMask(Rule):
    """Sequences side by side."""

    @classmethod
    def from_seqlens(cls, lengths_q: list[int], lengths_k: list[int]) -> BlockDiagonalMask:
        rule = cls()
        rule.lengths = list(zip(lengths_q, lengths_k, strict=True))
        return rule

    lengths: list[tuple[int, int]]

    def make_causal(self) -> BlockDiagonalMask:
        self.corner, self.right = "top-left", 0
        return self

    def make_causal_from_bottomright(self) -> BlockDiagonalMask:
        if any(keys < queries for queries, keys in self.lengths):
            raise ValueError("Expected `num_keys >= num_queries`")
        self.corner, self.right = "bottom-right", 0
        return self

    def visible(self, len_q: int, len_k: int) -> Tensor:
        return torch.block_diag(*(Rule.visible(self, *pair).float() for pair in self.lengths)) > 0


RULES = SimpleNamespace(
    BlockDiagonalMask=BlockDiagonalMask,
    LowerTriangularMask=lambda: Rule("top-left", right=0),
    LowerTriangularFromBottomRightMask=lambda: Rule("bottom-right", right=0),
    LocalAttentionFromBottomRightMask=lambda window_left, window_right: Rule(
        "bottom-right", window_left, window_right
    ),
)


def memory_efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Any, scale: float
) -> Tensor:
    """(B, S, H, D), or with groups (B, S, Hkv, group, D), as which a bias has them too."""
    q, k, v = (t.movedim(1, -2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if isinstance(attn_bias, Tensor):
        assert attn_bias.shape == scores.shape
        scores = scores + attn_bias
    elif attn_bias is not None:
        scores = scores.masked_fill(~attn_bias.visible(*scores.shape[-2:]), -math.inf)
    return softmax(scores, v)[0].movedim(-2, 1)


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize(
    "problem",
    [
        BASE,
        BASE.replace(causal="top-left"),
        BASE.replace(causal="bottom-right", seqlen_q=11),
        BASE.replace(window=(2, 3)),
        BASE.replace(window=(None, 1)),
        BASE.replace(window=(3, None), causal="bottom-right"),
        BASE.replace(mask="random", mask_shape="b1qk"),
        BASE.replace(mask="random", bias="normal", bias_shape="1hqk"),
        BASE.replace(scale=0.3),
        BASE.replace(packed=SEQUENCES, batch=4),
        BASE.replace(packed=SEQUENCES, batch=4, causal="top-left"),
        BASE.replace(packed=SEQUENCES[:3], batch=3, causal="bottom-right"),
    ],
    ids=lambda problem: problem.id,
)
def test_xformers(problem: Problem, heads: tuple[int, int]) -> None:
    problem = problem.replace(heads_q=heads[0], heads_kv=heads[1])
    assert xformers.xformers.capabilities.unsupported_reasons(problem) == []
    result = xformers.call(memory_efficient_attention, RULES, make_inputs(problem), problem)
    assert_right(result, problem)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (BASE.replace(window=(2, None), causal="top-left"), "measured from the top left"),
        (
            BASE.replace(packed=SEQUENCES, batch=4, causal="bottom-right"),
            "fewer keys than queries",
        ),
    ],
)
def test_what_xformers_has_no_rule_for(problem: Problem, said: str) -> None:
    with pytest.raises(NotImplementedError, match=said):
        xformers.call(memory_efficient_attention, RULES, make_inputs(problem), problem)


def test_a_library_that_is_not_installed_is_named_with_the_remedy() -> None:
    backend = LibraryBackend(
        name="x",
        module="no_such_library",
        install="pip install no-such-library",
        capabilities=xformers.xformers.capabilities,
        call=truth,
    )
    for device in ("cpu", "cuda"):
        assert backend.availability(device) == (
            "no_such_library is not installed: pip install no-such-library"
        )


def test_no_library_is_imported_by_listing_its_backend() -> None:
    code = (
        "import sys; from attnproof.targets import TargetSpec, describe, load\n"
        "for name in 'flashinfer', 'xformers', 'transformers-sdpa', 'transformers-eager', 'flex':\n"
        "    describe(load(TargetSpec(name), 'cpu'), 'cpu')\n"
        "print({'flashinfer', 'xformers', 'transformers', 'torch._inductor'} & set(sys.modules))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()", ran.stdout
    assert load(TargetSpec("flashinfer")).name == "flashinfer"
