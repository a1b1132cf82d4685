"""The signatures of torch's SDPA and of the flash-attention library: calls and refusals."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_reference.problem import Problem
from attnproof.inputs.make import make_inputs
from attnproof.signatures import FunctionBackend, SignatureMismatch, adapt

SMALL = Problem(batch=2, heads_q=4, heads_kv=2, seqlen_q=5, seqlen_k=7, head_dim=8)


def call(backend: FunctionBackend, problem: Problem) -> Any:
    return backend.attention(make_inputs(problem), problem)


def library(**functions: Any) -> types.ModuleType:
    module = types.ModuleType("library")
    vars(module).update(functions)
    return module


class Recorder:
    """Functions of the library that answer zeros and remember what they were given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        self.given = dict(vars_without_self(locals()))
        return q, q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), None

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        window_size: tuple[int | None, int | None] = (None, None),
        block_table: Tensor | None = None,
    ) -> Any:
        self.given = dict(vars_without_self(locals()))
        return q, q.new_zeros(q.shape[1], q.shape[0])

    def kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None = None,
        cache_seqlens: Tensor | None = None,
        block_table: Tensor | None = None,
        return_softmax_lse: bool = False,
    ) -> Any:
        self.given = dict(vars_without_self(locals()))
        return q


def vars_without_self(scope: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in scope.items() if name != "self"}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def test_dense_tensors_are_bshd(recorder: Recorder) -> None:
    result = call(adapt(recorder.dense, "t", None), SMALL.replace(causal="bottom-right"))
    assert recorder.given["q"].shape == (2, 5, 4, 8)
    assert recorder.given["k"].shape == (2, 7, 2, 8)
    assert recorder.given["causal"] is True
    assert recorder.given["softmax_scale"] is None
    assert recorder.given["window_size"] == (-1, -1)
    assert recorder.given["return_attn_probs"] is True
    assert recorder.given["deterministic"] is False  # not passed
    assert result.out.shape == (2, 4, 5, 8)
    assert result.lse.shape == (2, 4, 5)


def test_windows_use_the_librarys_word_for_unbounded(recorder: Recorder) -> None:
    call(adapt(recorder.dense, "t", None), SMALL.replace(window=(None, 3)))
    assert recorder.given["window_size"] == (-1, 3)
    packed = SMALL.replace(packed=((3, 5), (4, 2)), window=(2, None))
    call(adapt(recorder.varlen, "t", None), packed)
    assert recorder.given["window_size"] == (2, None)


def test_packed_tensors_are_thd(recorder: Recorder) -> None:
    result = call(adapt(recorder.varlen, "t", None), SMALL.replace(packed=((3, 5), (4, 2))))
    assert recorder.given["q"].shape == (7, 4, 8)
    assert recorder.given["v"].shape == (7, 2, 8)
    assert recorder.given["cu_seqlens_k"].tolist() == [0, 5, 7]
    assert (recorder.given["max_seqlen_q"], recorder.given["max_seqlen_k"]) == (4, 5)
    assert result.out.shape == (1, 4, 7, 8)
    assert result.lse.shape == (1, 4, 7)


def test_pages_of_the_cache(recorder: Recorder) -> None:
    backend = adapt(recorder.kvcache, "t", None)
    problem = SMALL.replace(page_size=256)
    result = call(backend, problem)
    pages = make_inputs(problem).k
    assert recorder.given["k_cache"].shape == (len(pages), 256, 2, 8)
    assert recorder.given["block_table"].dtype == torch.int32
    assert recorder.given["cache_seqlens"].tolist() == [7, 7]
    assert recorder.given["k"] is None  # nothing is appended
    assert result.lse is None  # this function returns none
    call(backend, SMALL)
    assert recorder.given["cache_seqlens"] is None
    assert recorder.given["block_table"] is None


def test_parameters_are_the_capabilities(recorder: Recorder) -> None:
    dense = adapt(recorder.dense, "t", "flash_attn").capabilities
    assert dense.features == {"gqa", "scale", "causal bottom-right", "window", "dropout"}
    assert dense.dtypes == ("fp16", "bf16")
    assert dense.head_dim_max == 256
    assert dense.returns_lse
    packed = adapt(recorder.varlen, "t", "flash_attn").capabilities
    assert packed.features == {"gqa", "packed", "window"}  # pages are the cache's alone
    cache = adapt(recorder.kvcache, "t", "flash_attn").capabilities
    assert cache.features == {"gqa", "key lengths", "paged"}
    assert cache.gradients == ()
    assert cache.page_size_multiple == 256


def test_a_module_gives_the_features_of_all_its_functions(recorder: Recorder) -> None:
    module = library(
        flash_attn_func=recorder.dense,
        flash_attn_varlen_func=recorder.varlen,
        flash_attn_with_kvcache=recorder.kvcache,
        attnproof_capabilities={"dtypes": ["bf16"]},
        attnproof_precision="flash-fp32-p",
    )
    backend = adapt(module, "t", "flash_attn")
    assert {"dropout", "packed", "paged", "key lengths"} <= backend.capabilities.features
    assert backend.capabilities.dtypes == ("bf16",)
    assert backend.precision("cpu").name == "flash-fp32-p"
    call(backend, SMALL.replace(key_lengths=(0, 7)))
    assert recorder.given["cache_seqlens"].tolist() == [0, 7]
    call(backend, SMALL.replace(packed=((3, 5),)))
    assert recorder.given["max_seqlen_k"] == 5
    with pytest.raises(NotImplementedError, match="flash_attn_varlen_func has no parameter softma"):
        call(backend, SMALL.replace(packed=((3, 5),), scale=0.5))


def test_a_problem_that_no_function_takes(recorder: Recorder) -> None:
    backend = adapt(recorder.varlen, "t", None)
    with pytest.raises(NotImplementedError, match="needs flash_attn_func; offered are flash_"):
        call(backend, SMALL)


def test_a_module_needs_the_dense_function(recorder: Recorder) -> None:
    with pytest.raises(SignatureMismatch, match="it offers flash_attn_varlen_func: name that with"):
        adapt(library(flash_attn_varlen_func=recorder.varlen), "t", "flash_attn")
    with pytest.raises(SignatureMismatch, match="flash_attn_func: its parameter 'x' has no d"):
        adapt(library(flash_attn_func=lambda q, k, v, x: q), "t", "flash_attn")


def test_a_function_without_parameters_is_known_by_its_name() -> None:
    def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
        return args[0]

    backend = adapt(flash_attn_varlen_func, "t", "flash_attn")
    assert "packed" in backend.capabilities.features
    assert "softcap" in adapt(lambda *a: a, "t", "flash_attn").capabilities.features


def test_what_the_library_may_not_return() -> None:
    backend = adapt(lambda q, k, v, softmax_scale=None: {"out": q}, "t", None)
    with pytest.raises(TypeError, match="returned a dict; accepted are out and"):
        call(backend, SMALL)


def test_sdpa_is_called_with_its_contract() -> None:
    given: dict[str, Any] = {}

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        given.update(options)
        return query

    def sdpa(*args: Any, **options: Any) -> Tensor:
        return attention(*args, **options)

    backend = adapt(sdpa, "t", "sdpa")
    call(backend, SMALL.replace(causal="top-left", scale=0.5))
    assert given == {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": True,
        "scale": 0.5,
        "enable_gqa": True,
    }
    call(backend, SMALL.replace(heads_kv=4, mask="random"))
    assert given["enable_gqa"] is False
    assert given["attn_mask"].dtype == torch.bool


def test_sdpa_has_one_mask_for_mask_and_bias() -> None:
    given = []

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
        given.append(attn_mask)
        return query

    problem = SMALL.replace(mask="random", mask_shape="b1qk", bias="normal", bias_shape="1hqk")
    inputs = make_inputs(problem)
    adapt(attention, "t", None).attention(inputs, problem)
    assert inputs.mask is not None
    assert inputs.bias is not None
    hidden = (~inputs.mask).expand(2, 4, 5, 7)
    assert given[0].dtype == torch.float32
    assert (given[0][hidden] == float("-inf")).all()
    assert torch.equal(given[0][~hidden], inputs.bias.expand_as(hidden)[~hidden])


def test_sdpa_features_follow_the_parameters() -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        return query

    assert adapt(attention, "t", None).capabilities.features == {"head_dim_v", "causal top-left"}
    whole = adapt(F.scaled_dot_product_attention, "t", "sdpa").capabilities
    assert {"boolean mask", "bias", "dropout", "scale", "gqa"} <= whole.features
    assert whole.unsupported_reasons(SMALL.replace(causal="top-left", mask="random")) == [
        "causal top-left together with boolean mask is not supported"
    ]


def test_sdpa_returns_a_tensor() -> None:
    backend = adapt(lambda query, key, value: (query, None), "t", None)
    with pytest.raises(TypeError, match="returned a tuple; accepted is out, a tensor"):
        call(backend, SMALL)
