"""The backends that ship, and targets under each signature, against the reference in fp32.

How much error is honest is for the conformance runs to judge; here it matters that each
computes the right attention, and that what it declares is so.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from attn_reference.backward import gradients as true_gradients
from attn_reference.forward import attention as truth
from attn_reference.inputs import Inputs
from attn_reference.problem import Problem
from attnproof.backend import Backend, prepared
from attnproof.backends import flex
from attnproof.inputs.make import make_inputs
from attnproof.signatures.common import FunctionBackend
from attnproof.targets import TargetSpec, load

TARGETS = {
    "sdpa": TargetSpec("sdpa"),
    "sdpa-flash": TargetSpec("sdpa-flash"),
    "sdpa-math": TargetSpec("sdpa-math"),
    "eager": TargetSpec("eager"),
    "builtin": TargetSpec("torch.nn.functional:scaled_dot_product_attention", "sdpa"),
    "library": TargetSpec(str(Path(__file__).with_name("naive_flash_attn.py")), "flash_attn"),
    "transformers-sdpa": TargetSpec("transformers-sdpa"),
    "transformers-eager": TargetSpec("transformers-eager"),
}
# What the backend flex hands to the kernel that is compiled for it, given to torch's uncompiled
# function, which has no gradients on CPU.
UNCOMPILED = FunctionBackend(
    name="flex, uncompiled",
    capabilities=replace(flex.flex.capabilities, devices=("cpu",), gradients=()),
    call=partial(flex.attention, flex_attention),
)
BASE = Problem(batch=2, heads_q=6, heads_kv=2, seqlen_q=13, seqlen_k=17, head_dim=16)
TRAINED = BASE.replace(gradients=("q", "k", "v"))
PROBLEMS = {
    "plain": TRAINED,
    "top-left": TRAINED.replace(causal="top-left"),
    "bottom-right": TRAINED.replace(causal="bottom-right"),
    "bottom-right, empty rows": TRAINED.replace(causal="bottom-right", seqlen_q=20),
    "window": TRAINED.replace(window=(3, 2)),
    "window, one side": TRAINED.replace(window=(None, 2), causal="top-left"),
    "window, no right side": TRAINED.replace(window=(0, None)),
    "softcap": TRAINED.replace(softcap=2.0),
    "alibi": TRAINED.replace(alibi=True, causal="bottom-right"),
    "mask": TRAINED.replace(mask="random", mask_shape="b1qk"),
    "mask, empty rows": TRAINED.replace(mask="empty-rows"),
    "bias": TRAINED.replace(bias="normal", bias_shape="1hqk"),
    "bias gradient": BASE.replace(bias="normal", bias_shape="b11k", gradients=("q", "bias")),
    "bias and mask": TRAINED.replace(bias="normal", mask="random"),
    "bias of -inf": TRAINED.replace(bias="neginf-rows"),
    "sinks": BASE.replace(sinks=True, gradients=("q", "sinks"), lse_gradient=True),
    "scale": TRAINED.replace(scale=0.3),
    "one key head": TRAINED.replace(heads_kv=1),
    "head_dim_v": TRAINED.replace(head_dim_v=24),
    "key lengths": TRAINED.replace(key_lengths=(5, 17), causal="bottom-right"),
    "key lengths, forward": BASE.replace(key_lengths=(0, 16), window=(4, 0)),
    "key lengths, alibi": BASE.replace(key_lengths=(5, 16), alibi=True),
    "dropout": TRAINED.replace(dropout=0.3),
    "dropout and mask": TRAINED.replace(dropout=0.4, mask="empty-rows"),
    "no queries": TRAINED.replace(seqlen_q=0),
    "no keys": TRAINED.replace(seqlen_k=0),
    "packed": TRAINED.replace(packed=((3, 5), (4, 4), (0, 2), (2, 0)), causal="bottom-right"),
    "packed, dropout": TRAINED.replace(packed=((3, 5), (4, 4)), dropout=0.3),
    "pages": BASE.replace(page_size=4, causal="bottom-right"),
    "pages, key lengths": BASE.replace(page_size=4, key_lengths=(0, 17), alibi=True),
}
# What each takes, by the names above: a capability that is lost or gained shows here.
SDPA = {
    "plain", "top-left", "mask", "mask, empty rows", "bias", "bias gradient", "bias and mask",
    "bias of -inf", "scale", "one key head", "head_dim_v", "dropout", "dropout and mask",
    "no queries", "no keys",
}  # fmt: skip
DENSE = set(PROBLEMS) - {"packed", "packed, dropout", "pages", "pages, key lengths"}
FLASH_LACKS = {
    "bias gradient", "head_dim_v", "dropout", "dropout and mask", "no queries", "no keys"
}  # fmt: skip
TRANSFORMERS_LACK = {
    "softcap", "alibi", "sinks", "key lengths, alibi", "no queries", "no keys"
}  # fmt: skip
TAKEN = {
    "sdpa": SDPA,
    "sdpa-math": SDPA,
    "sdpa-flash": SDPA - FLASH_LACKS,
    "builtin": SDPA,
    "eager": DENSE,
    "transformers-sdpa": DENSE - TRANSFORMERS_LACK,
    "transformers-eager": DENSE - TRANSFORMERS_LACK,
    "library": {
        "plain", "bottom-right", "bottom-right, empty rows", "window", "window, no right side",
        "softcap", "alibi", "scale", "one key head", "key lengths, forward", "key lengths, alibi",
        "dropout", "no queries", "no keys", "packed", "packed, dropout", "pages",
        "pages, key lengths",
    },
}  # fmt: skip


def loaded(target: str) -> Backend:
    """The backend on CPU; the test is skipped when it is not installed."""
    backend = load(TARGETS[target], "cpu")
    if reason := backend.availability("cpu"):
        pytest.skip(reason)
    return backend


# What a backend declares and refuses when it is called: problems in which a query sees no key.
REFUSED = {
    "transformers-eager": {
        "bottom-right, empty rows", "mask, empty rows", "bias of -inf", "key lengths",
        "key lengths, forward", "dropout and mask",
    },
}  # fmt: skip


def with_gradients(inputs: Inputs, problem: Problem) -> Inputs:
    """The inputs, those with gradients as leaves that require them."""
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in problem.gradients}
    return replace(inputs, **leaves)


def close(found: Tensor | None, true: Tensor | None) -> None:
    assert found is not None
    assert true is not None
    torch.testing.assert_close(
        found.detach().double(), true.double(), rtol=2e-6, atol=2e-6, equal_nan=False
    )


def assert_right(backend: Backend, problem: Problem) -> None:
    inputs = make_inputs(problem)
    leaves = with_gradients(inputs, problem)
    result = backend.attention(leaves, problem)
    inputs.keep_mask = result.keep_mask
    true = truth(inputs, problem)
    close(result.out, true.out)
    if backend.capabilities.returns_lse:
        assert true.lse is not None
        empty = true.lse == float("-inf")
        close(result.lse, true.lse.masked_fill(empty, backend.capabilities.empty_row_lse))
    if not problem.gradients:
        return
    outputs, incoming = [result.out], [inputs.grad_out]
    if problem.lse_gradient:
        outputs, incoming = [result.out, result.lse], [inputs.grad_out, inputs.grad_lse]
    names = problem.gradients
    found = torch.autograd.grad(outputs, [getattr(leaves, name) for name in names], incoming)
    expected = true_gradients(inputs, problem).tensors()
    for name, gradient in zip(names, found, strict=True):
        close(gradient, expected[name])


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("target", TARGETS)
def test_it_computes_the_attention_that_it_says_it_takes(target: str, name: str) -> None:
    backend, problem = loaded(target), PROBLEMS[name]
    reasons = backend.capabilities.unsupported_reasons(problem)
    assert (not reasons) == (name in TAKEN[target]), reasons
    torch.manual_seed(0)
    if name in REFUSED.get(target, ()):
        with pytest.raises(NotImplementedError, match="a query that sees no key"):
            assert_right(backend, problem)
    elif not reasons:
        assert_right(backend, problem)


FLEX_LACKS = {
    "sinks", "dropout", "dropout and mask", "no queries", "no keys", "packed, dropout", "pages",
    "pages, key lengths",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", PROBLEMS)
def test_what_flex_attention_is_handed(name: str) -> None:
    declared = PROBLEMS[name].replace(lse_gradient=False)
    reasons = flex.flex.capabilities.unsupported_reasons(declared)
    assert (not reasons) == (name not in FLEX_LACKS), reasons
    if not reasons:
        assert_right(UNCOMPILED, declared.replace(gradients=()))


def test_no_key_is_seen_in_a_block_that_the_mask_of_flex_attention_skips() -> None:
    problem = BASE.replace(seqlen_q=300, seqlen_k=500, causal="bottom-right", window=(30, 0))
    inputs = make_inputs(problem)
    block_mask = flex.block_mask_of(inputs, problem, flex.diagonal_of(inputs, problem))
    assert block_mask is not None
    assert block_mask.sparsity() > 30


def test_flex_attention_does_not_compile_for_head_dims_below_those_of_triton() -> None:
    problem = BASE.replace(head_dim=8)
    with pytest.raises(NotImplementedError, match="head_dim 8 is below the 16 of Triton"):
        flex.flex.attention(make_inputs(problem), problem)


def test_flex_attention_is_timed_compiled_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for sizes in general, and however many there are; and once for each."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    flex._of_one_size.cache_clear()
    problems = [
        BASE.replace(seqlen_q=n, seqlen_k=n, causal=causal)
        for n in (32, 48, 64, 80)
        for causal in ("none", "top-left")
    ]
    for problem in problems:
        for _ in range(3):  # every turn prepares anew
            inputs = make_inputs(problem)
            call = prepared(flex.flex, inputs, problem)
            first, second = call(), call()
            assert torch.equal(first.out, second.out)
            torch.testing.assert_close(first.out, truth(inputs, problem).out.float())
            assert first.lse is None  # a second kernel makes it one of the natural logarithm
    assert len(graphs) == len(problems)
    for graph in graphs:
        values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        assert all(isinstance(size, int) for value in values for size in value.shape)
    flex._of_one_size.cache_clear()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("target", ["sdpa", "sdpa-flash", "sdpa-math", "eager"])
def test_dtypes_that_are_declared(target: str, dtype: str) -> None:
    backend = loaded(target)
    problem = TRAINED.replace(dtype=dtype, mask="random", head_dim=40, head_dim_v=40)
    assert backend.capabilities.unsupported_reasons(problem) == []
    leaves = with_gradients(make_inputs(problem), problem)
    out = backend.attention(leaves, problem).out
    out.backward(leaves.grad_out)
    assert out.dtype == leaves.q.grad.dtype == problem.torch_dtype  # type: ignore[union-attr]


@pytest.mark.parametrize("head_dim", [1, 8, 40, 512])
@pytest.mark.parametrize("target", ["sdpa", "sdpa-flash", "sdpa-math", "eager"])
def test_any_head_dim(target: str, head_dim: int) -> None:
    problem = TRAINED.replace(head_dim=head_dim, head_dim_v=head_dim)
    assert_right(loaded(target), problem)


@pytest.mark.parametrize("target", ["sdpa", "sdpa-math", "eager"])
def test_an_empty_batch(target: str) -> None:
    assert_right(loaded(target), TRAINED.replace(batch=0))


@pytest.mark.parametrize("gradients", [(), ("q",), ("k",), ("v",), ("q", "v"), ("k", "v")])
@pytest.mark.parametrize("target", ["sdpa", "sdpa-flash", "sdpa-math", "eager", "library"])
def test_any_set_of_gradients(target: str, gradients: tuple[str, ...]) -> None:
    assert_right(loaded(target), BASE.replace(gradients=gradients))


@pytest.mark.parametrize("name", sorted(FLASH_LACKS - {"no queries", "no keys"}))
def test_forced_flash_refuses_what_it_does_not_declare(name: str) -> None:
    problem = PROBLEMS[name]
    leaves = with_gradients(make_inputs(problem), problem)
    with pytest.raises(NotImplementedError, match="torch has no kernel for this: "):
        loaded("sdpa-flash").attention(leaves, problem)


def test_forced_flash_says_in_torchs_words_why_not() -> None:
    inputs = make_inputs(TRAINED)
    strided = replace(inputs, q=inputs.q.transpose(-1, -2).contiguous().transpose(-1, -2))
    with pytest.raises(NotImplementedError, match="last dimension"):
        loaded("sdpa-flash").attention(strided, BASE)
    close(loaded("sdpa").attention(strided, BASE).out, truth(inputs, BASE).out)


def test_other_errors_of_torch_are_not_taken_for_a_missing_kernel() -> None:
    inputs = make_inputs(BASE)
    with pytest.raises(RuntimeError, match="size"):
        loaded("sdpa-math").attention(replace(inputs, k=inputs.k[..., :-1]), BASE)


def test_the_forced_kernels_are_not_the_same() -> None:
    problem = BASE.replace(dtype="bf16", seqlen_k=300)
    inputs = make_inputs(problem)
    flash, math, dispatched = (
        loaded(name).attention(inputs, problem).out for name in ("sdpa-flash", "sdpa-math", "sdpa")
    )
    assert not torch.equal(flash, math)
    assert torch.equal(flash, dispatched)


def test_eager_reads_nothing_beyond_the_lengths() -> None:
    problem = TRAINED.replace(key_lengths=(5, 17))
    inputs = make_inputs(problem)
    assert inputs.k[0, :, 5:].isnan().all()
    assert_right(loaded("eager"), problem)


def test_eager_keeps_scores_in_the_dtype_of_its_inputs() -> None:
    problem = BASE.replace(dtype="bf16")
    inputs = make_inputs(problem)
    lse = loaded("eager").attention(inputs, problem).lse
    true = truth(inputs, problem).lse
    assert lse is not None
    assert true is not None
    assert lse.dtype == torch.float32
    assert (lse - true).abs().max() > 1e-4


def test_dropout_draws_anew_each_time() -> None:
    problem = BASE.replace(dropout=0.5)
    inputs = make_inputs(problem)
    for name in ("eager", "sdpa"):
        backend = loaded(name)
        first, second = (backend.attention(inputs, problem).keep_mask for _ in range(2))
        assert first is not None
        assert second is not None
        assert not torch.equal(first, second)
        assert 0.4 < first.double().mean() < 0.6
