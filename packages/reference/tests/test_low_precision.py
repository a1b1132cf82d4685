"""The reference rounded as a Precision declares: each declaration rounds what it names."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from attn_reference import (
    EAGER,
    FLASH,
    FLASH_FP32_P,
    FLASH_TF32,
    Inputs,
    Precision,
    Problem,
    attention,
    gradients,
)
from attn_reference import sequences as sequences_module
from attn_reference.precision import UNIT_ROUNDOFF
from attn_reference.problem import GRADIENT_NAMES

ONE_HEAD = Problem(seqlen_q=9, seqlen_k=33, head_dim=16, dtype="bf16", gradients=("q", "k", "v"))


def step_by_step(
    inputs: Inputs, problem: Problem, *, stored_p: bool = False
) -> dict[str, torch.Tensor]:
    """What a flash kernel computes for one head, written out: fp32 inside, P and dS in 16 bits.

    ``stored_p``: dS too is formed from the P in 16 bits.
    """
    low = problem.torch_dtype
    q, k, v, grad_out = (t[0, 0].float() for t in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    scores = problem.softmax_scale * (q @ k.T)
    largest = scores.max(-1, keepdim=True).values
    weights = torch.exp(scores - largest)
    row_sum = weights.sum(-1, keepdim=True)
    out = (weights.to(low).float() @ v / row_sum).to(low)
    lse = largest + row_sum.log()
    p = torch.exp(scores - lse)
    delta = (grad_out * out.float()).sum(-1, keepdim=True)
    of_ds = p.to(low).float() if stored_p else p
    ds = (of_ds * (grad_out @ v.T - delta)).to(low).float()
    return {
        "out": out,
        "lse": lse[:, 0],
        "q": (ds @ k * problem.softmax_scale).to(low),
        "k": (ds.T @ q * problem.softmax_scale).to(low),
        "v": (p.to(low).float().T @ grad_out).to(low),
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_flash_is_what_a_flash_kernel_computes(dtype, random_inputs, device):
    problem = ONE_HEAD.replace(dtype=dtype)
    inputs = random_inputs(problem, device)
    expected = step_by_step(inputs, problem)
    result = attention(inputs, problem, FLASH)
    found = {"out": result.out, "lse": result.lse, **gradients(inputs, problem, FLASH).tensors()}
    for name, tensor in found.items():
        # Equal but for the order of fp32 sums, which moves few numbers across a rounding.
        mine, other = tensor[0, 0], expected[name]
        assert mine.dtype == other.dtype
        assert (mine == other).float().mean() > 0.9, name
        torch.testing.assert_close(mine, other, rtol=4 * UNIT_ROUNDOFF[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_gradients_formed_from_a_stored_p(dtype, random_inputs, device):
    """As declared: dQ and dK are those of the P in 16 bits, and dV is what it was."""
    problem = ONE_HEAD.replace(dtype=dtype, seqlen_q=64, scale=1.0)
    inputs = random_inputs(problem, device)
    declared = dataclasses.replace(FLASH, gradient_probabilities="input")
    found, plain = (gradients(inputs, problem, one).tensors() for one in (declared, FLASH))
    expected = step_by_step(inputs, problem, stored_p=True)
    assert torch.equal(found["v"], plain["v"])
    for name in ("q", "k"):
        mine, other = found[name][0, 0], expected[name]
        assert (mine == other).float().mean() > 0.9, name
        assert (plain[name][0, 0] == other).float().mean() < 0.9, name


@pytest.mark.parametrize("precision", [EAGER, FLASH])
def test_unfused_gradients_have_one_p(precision, random_inputs):
    """Unfused, dS is formed from the P that was stored, whatever is declared for a fused kernel."""
    inputs = random_inputs(ONE_HEAD)
    declared = dataclasses.replace(precision, gradient_probabilities="bf16")
    one, other = (gradients(inputs, ONE_HEAD, p).q for p in (precision, declared))
    assert torch.equal(one, other) == (precision is EAGER)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_dropout_of_a_stored_p(dtype, random_inputs):
    """As declared: P, the factor and their product are rounded, for out and for dV alone."""
    problem = ONE_HEAD.replace(dtype=dtype, seqlen_q=64, scale=1.0, dropout=0.3)
    inputs = random_inputs(problem)
    declared = dataclasses.replace(FLASH, drops_stored_probabilities=True)
    found, plain = (attention(inputs, problem, one).out for one in (declared, FLASH))
    mine, other = (gradients(inputs, problem, one).tensors() for one in (declared, FLASH))

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(problem.torch_dtype).float()

    q, k, v, grad_out = (t[0, 0].float() for t in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    scores = q @ k.T
    factor = stored(torch.tensor(1 / 0.7)) * inputs.keep_mask[0, 0]
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = stored(stored(stored(weights) * factor) @ v / weights.sum(-1, keepdim=True))
    dv = stored(stored(stored(torch.softmax(scores, -1)) * factor).T @ grad_out)
    for name, one, by_default, expected in (
        ("out", found, plain, out),
        ("dv", mine["v"], other["v"], dv),
    ):
        assert (one[0, 0] == expected).float().mean() > 0.9, name
        assert (by_default[0, 0] == expected).float().mean() < 0.9, name


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_of_a_stored_p_that_rounds_nothing(dropout, random_inputs):
    """Without dropout, or with a factor that is a power of two, nothing else is computed."""
    problem = ONE_HEAD.replace(dtype="bf16", dropout=dropout)
    inputs = random_inputs(problem)
    declared = dataclasses.replace(FLASH, drops_stored_probabilities=True)
    one, other = (attention(inputs, problem, p).out for p in (declared, FLASH))
    assert torch.equal(one, other)


def eager_step_by_step(inputs: Inputs, problem: Problem) -> dict[str, torch.Tensor]:
    """Unfused attention of one head, written out: every matrix is stored in 16 bits."""

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(problem.torch_dtype).float()

    q, k, v, grad_out = (t[0, 0].float() for t in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    raw = stored(problem.softmax_scale * (q @ k.T))
    tanh = torch.tanh(raw / problem.softcap)
    scores = stored(stored(problem.softcap * tanh) + inputs.bias[0, 0].float())
    lse = scores.logsumexp(-1, keepdim=True)
    p = stored(torch.softmax(scores, -1))
    out = stored(p @ v)
    dp = stored(grad_out @ v.T)
    ds = stored(stored(torch.exp(scores - lse)) * (dp - (grad_out * out).sum(-1, keepdim=True)))
    draw = stored(ds * (1 - tanh.square()))
    return {
        "out": out,
        "lse": lse[:, 0],
        "q": stored(draw @ k * problem.softmax_scale),
        "k": stored(draw.T @ q * problem.softmax_scale),
        "v": stored(p.T @ grad_out),
        "bias": ds,
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_eager_stores_every_matrix(dtype, random_inputs, device):
    problem = ONE_HEAD.replace(
        dtype=dtype, softcap=3.0, bias="random", gradients=("q", "k", "v", "bias")
    )
    inputs = random_inputs(problem, device)
    expected = eager_step_by_step(inputs, problem)
    result = attention(inputs, problem, EAGER)
    found = {"out": result.out, "lse": result.lse, **gradients(inputs, problem, EAGER).tensors()}
    assert set(found) == set(expected)
    for name, tensor in found.items():
        # The order of fp32 sums moves few numbers across a rounding.
        assert (tensor[0, 0] == expected[name]).float().mean() > 0.9, name


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_eager_is_what_unfused_torch_computes(dtype, random_inputs):
    """Products, softmax and autograd of torch in 16 bits: the same errors, not only small ones."""
    problem = Problem(
        heads_q=4, seqlen_q=64, head_dim=32, dtype=dtype, scale=0.5, gradients=("q", "k", "v")
    )
    inputs = random_inputs(problem)
    exact, mine = attention(inputs, problem).out, attention(inputs, problem, EAGER).out
    found = gradients(inputs, problem, EAGER)
    exact_gradients = gradients(inputs, problem)
    q, k, v = (t.clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    torchs = torch.softmax((q @ k.mT) * 0.5, -1) @ v
    torchs_gradients = torch.autograd.grad(torchs, (q, k, v), inputs.grad_out)

    def correlation(one: torch.Tensor, other: torch.Tensor, true: torch.Tensor) -> float:
        errors = torch.stack([(one - true).flatten(), (other - true).flatten()])
        return errors.corrcoef()[0, 1].item()

    assert correlation(mine, torchs.detach(), exact) > 0.95
    for name, torchs_gradient in zip("qkv", torchs_gradients, strict=True):
        one = getattr(found, name), torchs_gradient
        assert correlation(*one, getattr(exact_gradients, name)) > 0.8, name
    # A flash kernel makes other errors: the comparison can tell.
    flash = attention(inputs, problem, FLASH).out
    assert correlation(flash, torchs.detach(), exact) < 0.7


def test_every_feature_in_low_precision(problem, random_inputs, device):
    """Close to the oracle, by a few roundings of the magnitudes that are added up."""
    names = [n for n in GRADIENT_NAMES if n not in ("bias", "sinks") or getattr(problem, n)]
    if problem.page_size is not None:
        names = ["q"]
    problem = problem.replace(dtype="bf16", gradients=tuple(names), lse_gradient=True)
    inputs = random_inputs(problem, device)
    result, exact = attention(inputs, problem, FLASH), attention(inputs, problem)
    assert result.out.dtype == torch.bfloat16
    assert result.lse.dtype == torch.float32
    torch.testing.assert_close(result.out.double(), exact.out, rtol=0, atol=6 * 2.0**-8)
    torch.testing.assert_close(result.lse.double(), exact.lse, rtol=1e-6, atol=1e-5)
    expected = gradients(inputs, problem).tensors()
    for name, found in gradients(inputs, problem, FLASH, result).tensors().items():
        assert found.dtype == getattr(inputs, name).dtype
        scale = expected[name].abs().max().item() + 1
        torch.testing.assert_close(
            found.double(), expected[name], rtol=0, atol=12 * scale * 2.0**-8
        )


@pytest.mark.parametrize("precision", [FLASH, EAGER, FLASH_TF32])
def test_fp64_inputs_are_computed_in_fp64(precision, random_inputs):
    problem = ONE_HEAD.replace(dtype="fp64", softcap=2.0)
    inputs = random_inputs(problem)
    exact, found = attention(inputs, problem), attention(inputs, problem, precision)
    assert torch.equal(found.out, exact.out)
    assert torch.equal(found.lse, exact.lse)


def one(count: int) -> torch.Tensor:
    return torch.ones(1, 1, count, 1)


def all_ones(len_q: int, len_k: int) -> tuple[Problem, Inputs]:
    """Equal scores, V, dOut and dLSE of 1: every product sums equal terms."""
    problem = Problem(
        seqlen_q=len_q, seqlen_k=len_k, head_dim=1, gradients=("q", "k", "v"), lse_gradient=True
    )
    inputs = Inputs(
        q=one(len_q),
        k=one(len_k),
        v=one(len_k),
        grad_out=one(len_q),
        grad_lse=one(len_q)[..., 0],
    )
    return problem, inputs


@pytest.mark.parametrize("chunk_elements", [sequences_module.CHUNK_ELEMENTS, 1])
@pytest.mark.parametrize(
    ("role", "lengths", "full", "stalled"),
    [
        # bf16 has 8 bits: 256 + 1 is 256 again, and a sum of equal terms stalls after 256.
        ("accumulate_out", (1, 1024), 1.0, 0.25),
        ("accumulate_dq", (1, 1024), 1.0, 0.25),
        ("accumulate_dk", (1024, 1), 1024.0, 256.0),
        ("accumulate_dv", (1024, 1), 1024.0, 256.0),
    ],
)
def test_sixteen_bit_accumulators(role, lengths, full, stalled, chunk_elements, monkeypatch):
    monkeypatch.setattr(sequences_module, "CHUNK_ELEMENTS", chunk_elements)
    problem, inputs = all_ones(*lengths)

    def answer(precision: Precision) -> float:
        result = attention(inputs, problem, precision)
        named = gradients(inputs, problem, precision, result).tensors() | {"out": result.out}
        return named[role.removeprefix("accumulate_").removeprefix("d")].flatten()[0].item()

    one_by_one = dataclasses.replace(FLASH, accumulate_rows=1)
    assert answer(one_by_one) == full
    assert answer(dataclasses.replace(one_by_one, **{role: "bf16"})) == stalled
    # Blocks of 32 are summed in fp32 first, and their sums are multiples that bf16 holds.
    assert answer(dataclasses.replace(FLASH, **{role: "bf16"})) == full


def test_accumulator_of_out_holds_for_its_role_alone():
    problem, inputs = all_ones(1, 1024)
    precision = dataclasses.replace(FLASH, accumulate_rows=1, accumulate_dv="bf16")
    assert attention(inputs, problem, precision).out.item() == 1.0


def test_probabilities_are_cast(random_inputs):
    """With V the identity, out * l is the cast P itself."""
    problem = Problem(seqlen_q=5, seqlen_k=16, head_dim=16, dtype="fp32")
    inputs = random_inputs(problem)
    inputs.v = torch.eye(16)[None, None]
    scores = attention(inputs, problem)  # for the row sums
    for dtype, cast in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        precision = dataclasses.replace(FLASH, probabilities=dtype)
        out = attention(inputs, problem, precision).out.double()
        product = 0.25 * inputs.q.double() @ inputs.k.double().mT
        largest = product.amax(-1, keepdim=True)
        p = out * (scores.lse[..., None] - largest).exp()
        torch.testing.assert_close(p.to(cast).double(), p, rtol=1e-6, atol=0)
        assert (p - (product - largest).exp()).abs().max() > 2.0**-14


def test_fp32_probabilities_of_sixteen_bit_inputs(random_inputs):
    inputs = random_inputs(ONE_HEAD)
    exact = attention(inputs, ONE_HEAD).out
    once = attention(inputs, ONE_HEAD, FLASH_FP32_P).out
    twice = attention(inputs, ONE_HEAD, FLASH).out
    assert torch.equal(once, exact.bfloat16())
    assert not torch.equal(twice, once)


def test_products_in_tf32():
    problem = Problem(seqlen_q=1, seqlen_k=2, head_dim=1, scale=1.0)
    finer = 1 + 2.0**-12  # lost in tf32, which has 10 bits after the point
    keys = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1)
    inputs = Inputs(q=torch.full((1, 1, 1, 1), finer), k=keys, v=keys)

    def lse(precision: Precision | None) -> float:
        return attention(inputs, problem, precision).lse.item()

    assert lse(FLASH_TF32) == pytest.approx(math.log(math.e + 1), abs=1e-7)
    assert lse(FLASH) == pytest.approx(lse(None), abs=1e-7)
    assert lse(FLASH) - lse(FLASH_TF32) > 1e-4


def test_scores_in_sixteen_bits():
    problem = Problem(seqlen_q=1, seqlen_k=2, head_dim=1, scale=1.0, dtype="bf16")
    q, k = torch.tensor([[[[17.0]]]]), torch.tensor([[[[17.0], [0.0]]]])
    inputs = Inputs(q=q.bfloat16(), k=k.bfloat16(), v=torch.zeros(1, 1, 2, 1).bfloat16())
    assert attention(inputs, problem, FLASH).lse.item() == 289.0
    assert attention(inputs, problem, EAGER).lse.item() == 288.0


def test_flushed_subnormals():
    problem = Problem(seqlen_q=1, seqlen_k=2, head_dim=1, scale=1.0)
    inputs = Inputs(
        q=torch.ones(1, 1, 1, 1),
        k=torch.tensor([[[[0.0], [-90.0]]]]),  # exp(-90) is below 2^-126
        v=torch.tensor([[[[0.0], [1e38]]]]),
    )
    flushed = dataclasses.replace(FLASH, flushes_subnormals=True)
    assert attention(inputs, problem, flushed).out.item() == 0.0
    assert attention(inputs, problem, FLASH).out.item() == pytest.approx(0.0819, rel=1e-2)


def test_settings_for_fast_products_do_not_reach_the_reference(random_inputs, device):
    problem = Problem(heads_q=2, seqlen_q=64, seqlen_k=256, head_dim=128, gradients=("k",))
    inputs = random_inputs(problem, device)
    slow = gradients(inputs, problem, FLASH).k
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        fast = gradients(inputs, problem, FLASH).k
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(fast, slow)


def test_fp16_overflow_of_a_gradient_is_infinite():
    """The final store overflows as it does in a kernel: dV of 2 * 65,504."""
    problem = Problem(seqlen_q=2, seqlen_k=1, head_dim=1, dtype="fp16", gradients=("v",))
    ones = torch.ones(1, 1, 2, 1, dtype=torch.float16)
    inputs = Inputs(q=ones, k=ones[:, :, :1], v=ones[:, :, :1], grad_out=ones * 65504)
    assert gradients(inputs, problem, FLASH).v.item() == math.inf
    assert gradients(inputs, problem).v.item() == 2 * 65504
