"""What the library is given and what is made of its answer, over the library in plain torch.

In fp64, so that out, LSE and gradients are those of the reference to rounding: a wrong layout,
corner, side of a window or order of heads is no rounding.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

import flash_attn_backend as library
from attn_reference import Inputs, Problem
from attn_reference import attention as reference
from attnproof.inputs.make import make_inputs
from flash_attn_backend.attnproof_backend import flash_attn_2, flash_attn_3, flash_attn_4

from .library_in_torch import CALLS

pytestmark = pytest.mark.usefixtures("in_torch")

BACKENDS = {backend.name: backend for backend in (flash_attn_2, flash_attn_3, flash_attn_4)}
SMALL = Problem(batch=2, heads_q=4, heads_kv=2, seqlen_q=5, seqlen_k=7, head_dim=8, dtype="fp64")
PROBLEMS = {
    "plain": SMALL,
    "scale": SMALL.replace(scale=0.3),
    "bottom-right": SMALL.replace(causal="bottom-right"),
    "more queries": SMALL.replace(seqlen_k=3, causal="bottom-right"),
    "top-left": SMALL.replace(seqlen_k=5, causal="top-left"),
    "window": SMALL.replace(window=(2, 1)),
    "left": SMALL.replace(window=(2, None)),
    "right": SMALL.replace(window=(None, 1)),
    "both": SMALL.replace(window=(3, None), causal="bottom-right"),
    "softcap": SMALL.replace(softcap=1.5, distribution="normal:4"),
    "alibi": SMALL.replace(alibi=True),
    "sinks": SMALL.replace(sinks=True),
    "head_dim_v": SMALL.replace(head_dim_v=16),
    "packed": SMALL.replace(packed=((3, 5), (4, 2), (0, 3)), causal="bottom-right"),
    "packed top-left": SMALL.replace(packed=((3, 3), (4, 4)), causal="top-left"),
    "key lengths": SMALL.replace(key_lengths=(7, 2), causal="bottom-right"),
    "no keys": SMALL.replace(key_lengths=(7, 0)),
    "paged": SMALL.replace(page_size=256, seqlen_k=300, key_lengths=(300, 4)),
    "pages alone": SMALL.replace(page_size=256, seqlen_k=512),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", PROBLEMS)
def test_the_answer_is_that_of_the_reference(name: str, case: str) -> None:
    backend, problem = BACKENDS[name], PROBLEMS[case]
    # The library in torch takes fp64, that of the GPU does not.
    taken = replace(backend.capabilities, dtypes=("fp64",))
    if reasons := taken.unsupported_reasons(problem):
        assert set(reasons) <= {f"{feature} is not supported" for feature in problem.features}
        pytest.skip(f"{name}: {reasons[0]}")
    inputs = make_inputs(problem)
    result = backend.attention(inputs, problem)
    expected = reference(inputs, problem)
    assert CALLS
    torch.testing.assert_close(result.out, expected.out)
    assert result.lse is not None
    assert expected.lse is not None
    wanted = expected.lse.masked_fill(expected.lse == -torch.inf, taken.empty_row_lse)
    torch.testing.assert_close(result.lse, wanted)


def test_every_form_is_asked_something_it_lacks() -> None:
    """What the test above skips is what the forms are known to lack, and no more."""
    lacking = {
        (name, case)
        for name, backend in BACKENDS.items()
        for case, problem in PROBLEMS.items()
        if replace(backend.capabilities, dtypes=("fp64",)).unsupported_reasons(problem)
    }
    assert lacking == {
        ("flash-attn-2", "sinks"),
        ("flash-attn-2", "head_dim_v"),
        ("flash-attn-3", "alibi"),
        ("flash-attn-3", "sinks"),
        ("flash-attn-4", "alibi"),
    }


@pytest.mark.parametrize("name", BACKENDS)
def test_top_left_is_refused_where_it_is_another_corner(name: str) -> None:
    for problem in (
        SMALL.replace(causal="top-left"),
        SMALL.replace(causal="top-left", packed=((3, 3), (2, 4))),
        SMALL.replace(causal="top-left", seqlen_k=5, key_lengths=(5, 5)),
    ):
        with pytest.raises(NotImplementedError, match="aligns causality from the bottom right"):
            BACKENDS[name].attention(make_inputs(problem), problem)


def test_each_form_has_its_word_for_unbounded() -> None:
    q = torch.randn(1, 2, 4, 8)
    words = {}
    for name in BACKENDS:
        library.attention(q, q, q, form=name, window=(2, None))
        words[name] = CALLS[-1][1]["window_size"]
    assert words == {"flash-attn-2": (2, -1), "flash-attn-3": (2, -1), "flash-attn-4": (2, None)}


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_left_out_keeps_the_default_of_the_library(name: str) -> None:
    q = torch.randn(1, 2, 4, 8)
    library.attention(q, q, q, form=name)
    given = CALLS[-1][1]
    assert given["softmax_scale"] is None
    assert given["window_size"] in ((-1, -1), (None, None))
    assert given["causal"] is False
    assert given["deterministic"] is False


def test_memory_in_the_order_of_the_library_is_not_copied() -> None:
    stored = torch.randn(2, 5, 4, 8)  # BSHD
    q = stored.transpose(1, 2)
    library.attention(q, q, q, form="flash-attn-2")
    assert CALLS[-1][1]["q"].data_ptr() == stored.data_ptr()
    assert CALLS[-1][1]["q"].is_contiguous()


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients(name: str) -> None:
    """Through the layouts, and through the LSE where the library has that gradient."""
    q, k, v = (torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    out, lse = library.attention(q, k, v, form=name)
    assert lse.requires_grad == (name == "flash-attn-4")
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    expected = torch.autograd.grad((weights @ v).square().sum(), (q, k, v))
    torch.testing.assert_close(found, expected)


def test_one_tensor_for_keys_and_values() -> None:
    q, kv = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 2, 7, 8)
    packed = library.attention_kvpacked(q, kv, form="flash-attn-2", causal="bottom-right")
    options = {"form": "flash-attn-2", "causal": "bottom-right"}
    assert_same(packed, library.attention(q, kv[:, 0], kv[:, 1], **options))
    with pytest.raises(NotImplementedError, match="FlashAttention-4 has no flash_attn_kvpacked"):
        library.attention_kvpacked(q, kv, form="flash-attn-4")


@pytest.mark.parametrize("name", ["flash-attn-2", "flash-attn-3"])
def test_one_tensor_for_all(name: str) -> None:
    qkv = torch.randn(2, 3, 4, 5, 8)
    packed = library.attention_qkvpacked(qkv, form=name, causal="top-left")
    assert_same(packed, library.attention(*qkv.unbind(1), form=name, causal="bottom-right"))


def test_packed_sequences_in_one_tensor() -> None:
    qkv, bounds = torch.randn(1, 3, 4, 7, 8), torch.tensor([0, 3, 7], dtype=torch.int32)
    options = {"form": "flash-attn-2", "causal": "bottom-right"}
    lengths = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 4, "max_seqlen_k": 4}
    separate = library.attention_varlen(*qkv.unbind(1), **lengths, **options)
    assert separate[0].shape == (1, 4, 7, 8)
    assert separate[1].shape == (1, 4, 7)
    kv = library.attention_varlen_kvpacked(qkv[:, 0], qkv[:, 1:], **lengths, **options)
    assert_same(kv, separate)
    every = library.attention_varlen_qkvpacked(qkv, cu_seqlens=bounds, max_seqlen=4, **options)
    assert_same(every, separate)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["flash-attn-2", "flash-attn-3"])
def test_what_goes_into_a_cache(name: str) -> None:
    q, new, cache = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16), torch.randn(2, 2, 9, 16)
    cos, batch = torch.ones(9, 8), torch.tensor([1, 0], dtype=torch.int32)
    library.attention_with_kvcache(
        q,
        cache,
        cache,
        form=name,
        k=new,
        v=new,
        rotary_cos=cos,
        rotary_sin=cos,
        rotary_interleaved=False,
        cache_seqlens=4,
        cache_batch_idx=batch,
        cache_leftpad=batch,
        num_splits=3,
        window=(3, None),
    )
    called, given = CALLS[-1]
    assert called == "flash_attn_with_kvcache"
    assert given["k"].shape == given["v"].shape == (2, 3, 2, 16)
    assert given["k_cache"].shape == (2, 9, 2, 16)
    assert given["k_cache"].data_ptr() == cache.data_ptr()  # it is written to
    assert given["rotary_cos"] is cos
    assert given["rotary_interleaved"] is False
    assert given["cache_seqlens"].tolist() == [4, 4]
    assert given["cache_seqlens"].dtype == torch.int32
    assert given["cache_batch_idx"] is batch
    assert given["cache_leftpad"] is batch
    assert given["num_splits"] == 3
    assert given["window_size"] == (3, -1)


def test_a_cache_that_would_be_copied_is_not_written_to() -> None:
    q, cache = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 16, 9).mT
    with pytest.raises(ValueError, match="last dimension has stride 1"):
        library.attention_with_kvcache(
            q, cache, cache, form="flash-attn-2", k=q, v=q, cache_seqlens=4
        )
    out, _ = library.attention_with_kvcache(q, cache, cache, form="flash-attn-2", cache_seqlens=4)
    plain, _ = library.attention(q, cache[:, :, :4], cache[:, :, :4], form="flash-attn-2")
    torch.testing.assert_close(out, plain)


def test_flash_attention_4_appends_nothing() -> None:
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match="no flash_attn_with_kvcache, hence no k, v"):
        library.attention_with_kvcache(q, q, q, form="flash-attn-4", k=q, v=q, cache_seqlens=0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("flash-attn-3", {"dropout_p": 0.1}, "flash_attn_func has no parameter for dropout_p"),
        ("flash-attn-4", {"alibi_slopes": torch.ones(2)}, "no parameter for alibi_slopes"),
        ("flash-attn-2", {"sinks": torch.ones(2)}, "no parameter for sinks"),
        ("flash-attn-2", {"num_splits": 2}, "no parameter for num_splits"),
    ],
)
def test_what_a_form_lacks_is_a_sentence(name: str, options: dict, said: str) -> None:
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match=said):
        library.attention(q, q, q, form=name, **options)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"causal": True}, ValueError, "causal=True: accepted are none, bottom-right, top-left"),
        ({"window": 3}, ValueError, "window=3: accepted are None and a pair"),
        ({"window": (-1, 3)}, ValueError, "accepted on a side are None and 0 or more"),
        ({"softmax_scale": 1.0}, TypeError, "unknown option 'softmax_scale'; known are scale"),
    ],
)
def test_bad_options_are_named(options: dict, error: type[Exception], said: str) -> None:
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(error, match=said):
        library.attention(q, q, q, form="flash-attn-2", **options)


def test_inputs_of_a_problem_all_arrive() -> None:
    """No tensor of a problem is left behind, but those that no form takes."""
    taken = {"q", "k", "v", "alibi_slopes", "sinks", "key_lengths", "page_table"}
    taken |= {"cu_seqlens_q", "cu_seqlens_k"}
    rest = {f.name for f in fields(Inputs)} - taken
    assert rest == {"mask", "bias", "keep_mask", "grad_out", "grad_lse"}
