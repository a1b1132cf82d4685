"""Which signature a function has, what it declares, and how an ``attnproof`` function is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.precision import EAGER, FLASH, Precision
from attn_reference.problem import Problem
from attnproof.backend import Capabilities
from attnproof.backends.eager import attention as eager
from attnproof.inputs.make import make_inputs
from attnproof.signatures import SIGNATURES, SignatureMismatch, adapt, detect
from attnproof.signatures.common import FEATURES

SMALL = Problem(batch=2, heads_q=4, heads_kv=2, seqlen_q=5, seqlen_k=7, head_dim=8)


def mismatch(function: Any, signature: str | None = None) -> str:
    with pytest.raises(SignatureMismatch) as caught:
        adapt(function, "target", signature)
    return str(caught.value)


def recording(
    parameters: str, returns: Callable[[Tensor], Any] = torch.zeros_like
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function with these parameters, and the arguments of its last call."""
    space: dict[str, Any] = {"seen": {}, "returns": returns}
    exec(f"def f({parameters}):\n    seen.update(locals())\n    return returns(q)", space)
    return space["f"], space["seen"]


def called(parameters: str, problem: Problem = SMALL) -> tuple[dict[str, Any], Inputs]:
    """What a function of signature attnproof with these parameters is given."""
    function, seen = recording(parameters)
    inputs = make_inputs(problem)
    adapt(function, "target", "attnproof").attention(inputs, problem)
    return seen, inputs


def test_the_list_of_features_is_that_of_problems() -> None:
    everything: dict[str, Any] = {
        "window": (1, 1),
        "softcap": 1.0,
        "alibi": True,
        "mask": "random",
        "bias": "normal",
        "sinks": True,
        "scale": 1.0,
        "heads_q": 2,
        "heads_kv": 1,
        "head_dim_v": 8,
        "dropout": 0.1,
        "gradients": ("q",),
        "lse_gradient": True,
    }
    dense = Problem(causal="top-left", key_lengths=(3,), **everything)
    packed = Problem(causal="bottom-right", packed=((1, 1),), **everything)
    paged = Problem(page_size=4)
    assert {*dense.features, *packed.features, *paged.features} == FEATURES


@pytest.mark.parametrize(
    ("parameters", "signature"),
    [
        ("q, k, v", "attnproof"),
        ("q, k, v, *, scale, causal, window", "attnproof"),
        ("q, k, v, causal='none'", "attnproof"),
        ("q, k, v, softcap=0.0, alibi_slopes=None, tile=64", "attnproof"),
        ("query, key, value", "sdpa"),
        ("query, key, value, attn_mask=None, is_causal=False", "sdpa"),
        ("q, k, v, softmax_scale=None, causal=False", "flash_attn"),
        ("q, k, v, causal=False, window_size=(-1, -1)", "flash_attn"),
        ("q, k_cache, v_cache, cache_seqlens=None", "flash_attn"),
    ],
)
def test_parameters_decide(parameters: str, signature: str) -> None:
    assert detect(recording(parameters)[0]) == signature


@pytest.mark.parametrize(
    "parameters",
    [
        "x",
        "q, k, v, causal=False",  # BHSD or BSHD, top left or bottom right: nothing tells
        "q, k, v, workspace",
        "query, key, value, block_mask",
        "q, kv",
        "q, kv, softmax_scale",
        "*, q, k, v",
    ],
)
def test_parameters_that_match_nothing(parameters: str) -> None:
    message = mismatch(recording(parameters)[0])
    assert f"its parameters ({parameters.split('=')[0].replace('*, ', '')})" in message
    assert all(f"{name}: (" in message for name in SIGNATURES)


def test_functions_without_parameters_need_a_named_signature() -> None:
    assert "shows no parameters" in mismatch(F.scaled_dot_product_attention)
    assert "shows no parameters" in mismatch(lambda *args, **kwargs: None)


def test_a_function_of_any_arguments_is_given_the_whole_contract() -> None:
    def attention(*args: Any, **kwargs: Any) -> Tensor:
        seen.update(kwargs)
        return torch.zeros_like(args[0])

    seen: dict[str, Any] = {}
    backend = adapt(attention, "target", "attnproof")
    assert backend.capabilities.features == FEATURES - {"gradients", "lse gradient"}
    backend.attention(make_inputs(SMALL), SMALL)
    assert {"scale", "causal", "sinks", "page_table", "return_lse"} <= set(seen)


@pytest.mark.parametrize("signature", ["attnproof", "sdpa", "flash_attn"])
def test_a_parameter_that_is_not_passed_must_have_a_default(signature: str) -> None:
    assert "its parameter 'workspace' has no default" in mismatch(
        lambda q, k, v, workspace: q, signature
    )
    adapt(lambda q, k, v, workspace=None: q, "target", signature)


@pytest.mark.parametrize("signature", ["attnproof", "sdpa", "flash_attn"])
def test_three_tensors_must_be_taken_by_position(signature: str) -> None:
    assert "do not begin with three that can be passed by position" in mismatch(
        lambda q, k: q, signature
    )
    assert "do not begin with three" in mismatch(lambda *, q, k, v: q, signature)
    assert "do not begin with three" in mismatch(lambda q, kv, dropout_p=0.0: q, "flash_attn")
    adapt(lambda a, b, c, /: a, "target", signature)


def test_a_causal_flag_is_not_an_alignment() -> None:
    message = mismatch(lambda q, k, v, causal=False: q, "attnproof")
    assert "its parameter 'causal' is a bool" in message


def test_declared_parameters_are_the_capabilities() -> None:
    plain = adapt(lambda q, k, v: q, "target", None).capabilities
    assert plain.features == {"gqa", "head_dim_v"}
    assert plain.gradients == ("q", "k", "v")
    assert not plain.returns_lse

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: str,
        bias: Tensor | None,
        sinks: Tensor | None,
        cu_seqlens_q: Tensor | None,
        key_lengths: Tensor | None,
        dropout_p: float,
        return_lse: bool,
    ) -> Tensor:
        return q

    rich = adapt(attention, "target", None).capabilities
    assert rich.features - plain.features == {
        "causal top-left",
        "causal bottom-right",
        "bias",
        "sinks",
        "key lengths",
        "dropout",
    }
    assert rich.gradients == ("q", "k", "v", "bias", "sinks")
    assert rich.returns_lse
    assert rich.keep_mask


def test_pages_and_packing_need_all_of_their_parameters() -> None:
    def features(parameters: str) -> frozenset[str]:
        return adapt(recording(parameters)[0], "target", "attnproof").capabilities.features

    assert "paged" not in features("q, k, v, page_table=None")
    assert "paged" in features("q, k, v, page_table=None, key_lengths=None")
    assert "packed" not in features("q, k, v, cu_seqlens_q=None")
    assert "packed" in features("q, k, v, cu_seqlens_q=None, cu_seqlens_k=None")


def test_only_declared_parameters_are_passed() -> None:
    seen, inputs = called("q, k, v, causal='none'", SMALL.replace(causal="top-left"))
    assert seen["causal"] == "top-left"
    assert set(seen) == {"q", "k", "v", "causal"}
    assert seen["k"] is inputs.k


def test_the_scale_is_left_to_a_default_of_none() -> None:
    assert called("q, k, v, scale=None")[0]["scale"] is None
    assert called("q, k, v, *, scale")[0]["scale"] == pytest.approx(8**-0.5)
    assert called("q, k, v, scale=1.0")[0]["scale"] == pytest.approx(8**-0.5)
    assert called("q, k, v, scale=None", SMALL.replace(scale=0.3))[0]["scale"] == 0.3


def test_values_of_every_option() -> None:
    problem = SMALL.replace(
        window=(3, None),
        softcap=2.0,
        alibi=True,
        mask="random",
        bias="normal",
        sinks=True,
        key_lengths=(4, 7),
    )
    names = ("window", "softcap", "alibi_slopes", "mask", "bias", "sinks", "key_lengths")
    seen, inputs = called("q, k, v, *, dropout_p, causal, " + ", ".join(names), problem)
    assert (seen["window"], seen["softcap"], seen["dropout_p"]) == ((3, None), 2.0, 0.0)
    assert seen["causal"] == "none"
    for name in names[2:]:
        assert seen[name] is getattr(inputs, name) is not None
    neutral, _ = called("q, k, v, *, " + ", ".join(names))
    assert [neutral[name] for name in names] == [None, 0.0, None, None, None, None, None]


def test_packed_problems_come_with_their_bounds() -> None:
    seen, inputs = called(
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k",
        Problem(packed=((3, 5), (4, 2)), head_dim=8),
    )
    assert seen["cu_seqlens_q"] is inputs.cu_seqlens_q
    assert seen["cu_seqlens_k"].tolist() == [0, 5, 7]
    assert (seen["max_seqlen_q"], seen["max_seqlen_k"]) == (4, 5)


def test_pages_come_with_lengths_even_when_all_are_full() -> None:
    full = Problem(batch=2, seqlen_q=3, seqlen_k=7, head_dim=8, page_size=4)
    seen, inputs = called("q, k, v, page_table, key_lengths", full)
    assert seen["page_table"] is inputs.page_table
    assert seen["key_lengths"].tolist() == [7, 7]
    assert seen["key_lengths"].dtype == torch.int32
    seen, _ = called("q, k, v, page_table, key_lengths", full.replace(key_lengths=(0, 6)))
    assert seen["key_lengths"].tolist() == [0, 6]


@pytest.mark.parametrize(
    ("returns", "lse", "keep_mask"),
    [
        (lambda q: q, False, False),
        (lambda q: (q,), False, False),
        (lambda q: (q, q[..., 0]), True, False),
        (lambda q: [q, q[..., 0], q > 0], True, True),
        (lambda q: (q, None, q > 0), False, True),
    ],
)
def test_what_may_be_returned(returns: Any, lse: bool, keep_mask: bool) -> None:
    function, _ = recording("q, k, v", returns)
    result = adapt(function, "target", None).attention(make_inputs(SMALL), SMALL)
    assert (result.lse is not None, result.keep_mask is not None) == (lse, keep_mask)


@pytest.mark.parametrize(
    ("returns", "what"),
    [
        (lambda q: {}, "a dict;"),
        (lambda q: (q, q, q, q), "a tuple of 4;"),
        (lambda q: (), "a tuple of 0;"),
        (lambda q: 0.5, "a float;"),
    ],
)
def test_what_may_not_be_returned(returns: Any, what: str) -> None:
    function, _ = recording("q, k, v", returns)
    with pytest.raises(TypeError, match=f"the target returned {what}"):
        adapt(function, "target", None).attention(make_inputs(SMALL), SMALL)


def declaring(name: str, value: Any) -> Callable[..., Any]:
    def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: str = "none") -> Tensor:
        return q

    setattr(attention, name, value)
    return attention


def test_a_module_of_torch_has_the_parameters_of_its_forward() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, softcap: float = 0.0) -> Tensor:
            return torch.zeros_like(q)

    module = Attention()
    assert detect(module) == "attnproof"
    assert adapt(module, "target", None).capabilities.features == {"gqa", "head_dim_v", "softcap"}


def test_capabilities_can_be_replaced_field_by_field() -> None:
    declared = {"dtypes": ["bf16"], "gradients": [], "empty_row_lse": "inf", "head_dim_max": 64}
    found = adapt(declaring("attnproof_capabilities", declared), "target", None).capabilities
    assert found.dtypes == ("bf16",)
    assert found.gradients == ()
    assert found.empty_row_lse == float("inf")
    assert found.head_dim_max == 64
    assert "causal top-left" in found.features  # what is not replaced still follows the parameters


def test_capabilities_can_be_declared_whole() -> None:
    whole = Capabilities(features=frozenset({"softcap"}))
    assert adapt(declaring("attnproof_capabilities", whole), "t", None).capabilities == whole


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"dtype": ["bf16"]}, "unknown field 'dtype'; known are dtypes, devices, features,"),
        ({"features": ["windows"]}, "unknown feature 'windows'; known are alibi, bias,"),
        ({"excludes": ["window"]}, "attnproof_capabilities: too many values to unpack"),
        (
            {"dtypes": "bf16"},
            "attnproof_capabilities: dtypes is 'bf16'; accepted is a list of fp64",
        ),
        ({"dtypes": ["bfloat16"]}, "attnproof_capabilities: dtypes is ['bfloat16']; accepted is"),
        ({"gradients": ["dq"]}, "gradients is ['dq']; accepted is a list of q, k, v, bias, sinks"),
        ({"features": "window"}, "features is 'window'; accepted is a list of names"),
        ({"head_dim_max": "64"}, "head_dim_max is '64'; accepted is a whole number above 0"),
        ({"lse_base": 2}, "lse_base is 2; accepted is 'e' or '2'"),
        (["bf16"], "attnproof_capabilities is a list; accepted are a dict"),
    ],
)
def test_malformed_capabilities(declared: Any, said: str) -> None:
    assert said in mismatch(declaring("attnproof_capabilities", declared))


@pytest.mark.parametrize(
    ("declared", "precision"),
    [
        ("eager", EAGER),
        (EAGER, EAGER),
        ({"scores": "fp16"}, Precision(name="declared", scores="fp16")),
        ({"name": "mine", "exp_error": 1e-3}, Precision(name="mine", exp_error=1e-3)),
    ],
)
def test_the_precision_can_be_declared(declared: Any, precision: Precision) -> None:
    backend = adapt(declaring("attnproof_precision", declared), "target", None)
    assert backend.precision("cpu") == backend.precision("cuda") == precision


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ("flesh", "unknown profile 'flesh'; known are flash,"),
        ({"score": "fp16"}, "unexpected keyword argument 'score'"),
        ({"scores": "fp8"}, "scores='fp8': accepted are input, fp64,"),
        (16, "attnproof_precision is a int; accepted are the name of a profile"),
    ],
)
def test_a_malformed_precision(declared: Any, said: str) -> None:
    assert said in mismatch(declaring("attnproof_precision", declared))


def test_a_plain_function_is_taken_for_a_flash_kernel() -> None:
    assert adapt(lambda q, k, v: q, "target", None).precision("cuda") == FLASH


def dropping(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, mask: Tensor | None) -> Tensor:
    """Eager attention that keeps to itself what its dropout kept."""
    problem = Problem(
        batch=q.shape[0],
        heads_q=q.shape[1],
        heads_kv=k.shape[1],
        seqlen_q=q.shape[2],
        seqlen_k=k.shape[2],
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        dropout=dropout_p,
    )
    return eager(Inputs(q=q, k=k, v=v, mask=mask), problem).out


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("seqlen_k", [0, 1, 7, 8, 21])
def test_what_dropout_kept_is_recovered(dtype: str, seqlen_k: int) -> None:
    problem = SMALL.replace(
        dropout=0.4, mask="empty-rows", seqlen_k=seqlen_k, dtype=dtype, gradients=("q",)
    )
    inputs = make_inputs(problem)
    inputs.q.requires_grad_()
    torch.manual_seed(3)
    known = eager(inputs, problem)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    result = adapt(dropping, "target", None).attention(inputs, problem)
    assert torch.equal(result.out, known.out)
    assert result.out.requires_grad
    assert torch.equal(torch.get_rng_state(), state)  # as if called once
    assert known.keep_mask is not None
    assert result.keep_mask is not None
    assert result.keep_mask.shape == known.keep_mask.shape
    assert inputs.mask is not None
    visible = inputs.mask.expand(known.keep_mask.shape)
    assert torch.equal(result.keep_mask[visible], known.keep_mask[visible])


def test_what_dropout_kept_stays_unknown_when_calls_cannot_be_repeated() -> None:
    private = torch.Generator().manual_seed(0)

    def attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0) -> Tensor:
        return q * torch.rand(q.shape, generator=private)

    problem = SMALL.replace(dropout=0.5)
    with pytest.raises(NotImplementedError, match="what dropout kept is not known"):
        adapt(attention, "target", None).attention(make_inputs(problem), problem)


def test_a_keep_mask_that_is_returned_is_taken() -> None:
    calls = []

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, return_keep_mask: bool
    ) -> tuple[Tensor, None, Tensor]:
        calls.append(return_keep_mask)
        return q, None, torch.ones(2, 4, 5, 7, dtype=torch.bool)

    problem = SMALL.replace(dropout=0.5)
    result = adapt(attention, "target", None).attention(make_inputs(problem), problem)
    assert result.keep_mask is not None
    assert result.keep_mask.all()
    assert calls == [True]
