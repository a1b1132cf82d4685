"""The library itself, where it and a GPU are: the forms of a call that a Problem cannot express.

What one call of the library must give again in another form is compared to the bit; what it rounds
on the way is held against fp64, within the error that its kernels were measured to have. That its
plain forms are right is the harness's to judge.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn_backend as library
from flash_attn_backend import FORMS, LibraryUnusable

# Of the largest magnitude: out rounds P and itself to the dtype of q.
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
B, H, HKV, D, CAPACITY, NEW = 3, 4, 2, 64, 300, 5
LENGTHS = (200, 7, 0)


def usable(name: str) -> str:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    try:
        library.load(name)
    except LibraryUnusable as error:
        pytest.skip(str(error))
    return name


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


@pytest.fixture(params=[name for name in FORMS if name != "flash-attn-4"])
def cache_form(request: pytest.FixtureRequest) -> str:
    """One that appends to a cache."""
    return usable(request.param)


@pytest.fixture
def two() -> str:
    return usable("flash-attn-2")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def truth(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """In fp64; causal from the bottom right, every row sees a key."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones_like(s, dtype=torch.bool).triu(1 + s.shape[3] - s.shape[2])
        s = s.masked_fill(hidden, -torch.inf)
    return s.softmax(-1) @ v


def assert_near(found: Tensor, expected: Tensor) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[found.dtype]


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("causal", ["none", "bottom-right"])
def test_dense(form: str, dtype: torch.dtype, causal: str) -> None:
    q = randn(2, H, 33, D, dtype=dtype)
    k, v = (randn(2, HKV, 65, D, dtype=dtype) for _ in "kv")
    out, lse = library.attention(q, k, v, form=form, causal=causal)
    assert_near(out, truth(q, k, v, causal != "none"))
    assert lse.shape == (2, H, 33)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("name", ["flash-attn-2", "flash-attn-3"])
def test_one_tensor_for_all(name: str, dtype: torch.dtype) -> None:
    """The same bits, and the gradients in one tensor too."""
    form = usable(name)
    qkv = randn(2, 3, H, 65, D, dtype=dtype).requires_grad_()
    options: dict[str, Any] = {"form": form, "causal": "bottom-right", "deterministic": True}
    packed = library.attention_qkvpacked(qkv, **options)
    separate = library.attention(*qkv.unbind(1), **options)
    assert_same(packed, separate)
    weight = torch.randn_like(packed[0])
    (one,) = torch.autograd.grad(packed[0], qkv, weight)
    (other,) = torch.autograd.grad(separate[0], qkv, weight)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_one_tensor_for_keys_and_values(two: str, dtype: torch.dtype) -> None:
    q, kv = randn(2, H, 33, D, dtype=dtype), randn(2, 2, HKV, 65, D, dtype=dtype)
    packed = library.attention_kvpacked(q, kv, form=two, window=(9, 0))
    assert_same(packed, library.attention(q, *kv.unbind(1), form=two, window=(9, 0)))


def test_packed_sequences_in_one_tensor(two: str, dtype: torch.dtype) -> None:
    qkv, bounds = randn(1, 3, H, 97, D, dtype=dtype), integers(0, 30, 30, 97)
    options: dict[str, Any] = {"form": two, "causal": "bottom-right"}
    lengths: dict[str, Any] = {"max_seqlen_q": 67, "max_seqlen_k": 67}
    lengths |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    separate = library.attention_varlen(*qkv.unbind(1), **lengths, **options)
    assert_near(separate[0][:, :, 30:], truth(*qkv[..., 30:, :].unbind(1), True))
    kv = library.attention_varlen_kvpacked(qkv[:, 0], qkv[:, 1:], **lengths, **options)
    assert_same(kv, separate)
    every = library.attention_varlen_qkvpacked(qkv, cu_seqlens=bounds, max_seqlen=67, **options)
    assert_same(every, separate)


class Cache:
    """Keys and values of known lengths, NaN behind them, and new ones to be appended."""

    def __init__(self, dtype: torch.dtype, causal: str = "bottom-right") -> None:
        self.q = randn(B, H, NEW, D, dtype=dtype)
        self.k, self.v = (randn(B, HKV, CAPACITY, D, dtype=dtype) for _ in "kv")
        self.new_k, self.new_v = (randn(B, HKV, NEW, D, dtype=dtype) for _ in "kv")
        self.lengths = integers(*LENGTHS)
        self.options: dict[str, Any] = {"causal": causal, "num_splits": 1}
        for b, length in enumerate(LENGTHS):
            self.k[b, :, length:] = self.v[b, :, length:] = torch.nan

    def appended(self, k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The cache as it must be after a call, with these new keys."""
        k = self.new_k if k is None else k
        after = self.k.clone(), self.v.clone()
        for b, length in enumerate(LENGTHS):
            after[0][b, :, length : length + NEW] = k[b]
            after[1][b, :, length : length + NEW] = self.new_v[b]
        return after


def test_append(cache_form: str, dtype: torch.dtype) -> None:
    """New keys lie behind the old ones, nothing else changes, and they are seen."""
    cache = Cache(dtype)
    after = cache.appended()
    expected = library.attention_with_kvcache(
        cache.q,
        *after,
        form=cache_form,
        cache_seqlens=cache.lengths + NEW,
        cache_batch_idx=integers(0, 1, 2),  # the kernel that appends runs for this too
        **cache.options,
    )
    found = library.attention_with_kvcache(
        cache.q,
        cache.k,
        cache.v,
        form=cache_form,
        k=cache.new_k,
        v=cache.new_v,
        cache_seqlens=cache.lengths,
        **cache.options,
    )
    torch.testing.assert_close((cache.k, cache.v), after, rtol=0, atol=0, equal_nan=True)
    assert_same(found, expected)
    for b, length in enumerate(LENGTHS):
        k, v = (t[b : b + 1, :, : length + NEW] for t in after)
        assert_near(found[0][b : b + 1], truth(cache.q[b : b + 1], k, v, True))


def test_append_to_pages(cache_form: str, dtype: torch.dtype) -> None:
    cache = Cache(dtype)
    after = cache.appended()
    table = integers(4, 1, 3, 0, 2, 5).view(B, 2)

    def paged(tensor: Tensor) -> Tensor:
        pages = tensor.new_full((6, HKV, 256, D), torch.nan)
        for b, (first, second) in enumerate(table.tolist()):
            pages[first] = tensor[b, :, :256]
            pages[second, :, : CAPACITY - 256] = tensor[b, :, 256:]
        return pages

    k, v = paged(cache.k), paged(cache.v)
    found, _ = library.attention_with_kvcache(
        cache.q,
        k,
        v,
        form=cache_form,
        k=cache.new_k,
        v=cache.new_v,
        cache_seqlens=cache.lengths,
        page_table=table,
        **cache.options,
    )
    both = (paged(after[0]), paged(after[1]))
    torch.testing.assert_close((k, v), both, rtol=0, atol=0, equal_nan=True)
    for b, length in enumerate(LENGTHS):
        keys = (t[b : b + 1, :, : length + NEW] for t in after)
        assert_near(found[b : b + 1], truth(cache.q[b : b + 1], *keys, True))


def rotated(tensor: Tensor, cos: Tensor, sin: Tensor, first: int, interleaved: bool) -> Tensor:
    """(H, S, D) of one entry, in fp64, by positions from ``first`` on."""
    cos, sin = (t[first : first + tensor.shape[1]].double() for t in (cos, sin))
    width = cos.shape[1]
    x, rest = tensor.double().split([2 * width, tensor.shape[-1] - 2 * width], -1)
    if interleaved:
        one, other = x[..., 0::2], x[..., 1::2]
        parts = (one * cos - other * sin, one * sin + other * cos)
        turned = torch.stack(parts, -1).flatten(-2)
    else:
        one, other = x.chunk(2, -1)
        turned = torch.cat([one * cos - other * sin, one * sin + other * cos], -1)
    return torch.cat([turned, rest], -1)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("causal", ["none", "bottom-right"])
def test_rotary(cache_form: str, dtype: torch.dtype, causal: str, interleaved: bool) -> None:
    """New keys are turned by their positions; queries too, or all by the first without a mask."""
    cache = Cache(dtype, causal)
    angles = torch.outer(torch.arange(CAPACITY), 100.0 ** -(torch.arange(16) / 16)).cuda()
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    found, _ = library.attention_with_kvcache(
        cache.q,
        cache.k,
        cache.v,
        form=cache_form,
        k=cache.new_k,
        v=cache.new_v,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=interleaved,
        cache_seqlens=cache.lengths,
        **cache.options,
    )
    for b, length in enumerate(LENGTHS):
        keys = rotated(cache.new_k[b], cos, sin, length, interleaved)
        written = cache.k[b, :, length : length + NEW]
        ulp = torch.finfo(dtype).eps * keys.abs().max()
        assert (written.double() - keys).abs().max() <= ulp
        other = rotated(cache.new_k[b], cos, sin, length, not interleaved)
        assert (written.double() - other).abs().max() > 10 * ulp
        if causal == "none":
            rows = [rotated(row, cos, sin, length, interleaved) for row in cache.q[b].split(1, 1)]
            q = torch.cat(rows, 1)
        else:
            q = rotated(cache.q[b], cos, sin, length, interleaved)
        k, v = (t[b : b + 1, :, : length + NEW] for t in (cache.k, cache.v))
        assert_near(found[b : b + 1], truth(q[None], k, v, causal != "none"))


def test_left_padding(cache_form: str, dtype: torch.dtype) -> None:
    """Keys before the first are not seen, whatever they hold."""
    cache = Cache(dtype)
    first = integers(17, 2, 0)
    lengths = integers(200, 7 + NEW, NEW)
    k, v = (t.nan_to_num(nan=0.5) for t in (cache.k, cache.v))
    for b, begin in enumerate(first.tolist()):
        k[b, :, :begin] = 9.0
        v[b, :, :begin] = 1e4
    found, _ = library.attention_with_kvcache(
        cache.q, k, v, form=cache_form, cache_seqlens=lengths, cache_leftpad=first, **cache.options
    )
    for b, (begin, end) in enumerate(zip(first.tolist(), lengths.tolist(), strict=True)):
        keys = (t[b : b + 1, :, begin:end] for t in (k, v))
        assert_near(found[b : b + 1], truth(cache.q[b : b + 1], *keys, True))


def test_entries_of_the_cache_by_index(cache_form: str, dtype: torch.dtype) -> None:
    cache = Cache(dtype)
    order = [2, 0, 1]
    after = cache.appended()
    lengths = integers(200 + NEW, 7 + NEW, NEW)
    expected = library.attention_with_kvcache(
        cache.q,
        *after,
        form=cache_form,
        cache_seqlens=lengths,
        cache_batch_idx=integers(0, 1, 2),
        **cache.options,
    )
    found = library.attention_with_kvcache(
        cache.q[order],
        *after,
        form=cache_form,
        cache_seqlens=lengths[order],
        cache_batch_idx=integers(*order),
        **cache.options,
    )
    assert_same(found, (expected[0][order], expected[1][order]))


def test_splits(cache_form: str, dtype: torch.dtype) -> None:
    """Right in each number of pieces; that the bits differ shows that the kernel was told."""
    q = randn(1, H, 1, D, dtype=dtype)
    k, v = (randn(1, HKV, 1031, D, dtype=dtype) for _ in "kv")
    answers = {
        splits: library.attention_with_kvcache(q, k, v, form=cache_form, num_splits=splits)
        for splits in (0, 1, 3)
    }
    for out, _ in answers.values():
        assert_near(out, truth(q, k, v, False))
    assert not torch.equal(answers[1][1], answers[3][1])


def test_lengths_and_pages_of_flash_attention_4(dtype: torch.dtype) -> None:
    form = usable("flash-attn-4")
    q = randn(2, H, 3, D, dtype=dtype)
    k, v = (randn(2, HKV, 512, D, dtype=dtype) for _ in "kv")
    lengths, table = integers(300, 40), integers(3, 0, 1, 2).view(2, 2)
    pages = [t.new_zeros(4, HKV, 256, D) for t in (k, v)]
    for page, t in zip(pages, (k, v), strict=True):
        for b, names in enumerate(table.tolist()):
            for number, name in enumerate(names):
                page[name] = t[b, :, 256 * number : 256 * (number + 1)]
    options: dict[str, Any] = {"form": form, "causal": "bottom-right", "cache_seqlens": lengths}
    for k_of, v_of, extra in ((k, v, {}), (*pages, {"page_table": table})):
        out, _ = library.attention_with_kvcache(q, k_of, v_of, **options, **extra)
        for b, length in enumerate(lengths.tolist()):
            keys = (t[b : b + 1, :, :length] for t in (k, v))
            assert_near(out[b : b + 1], truth(q[b : b + 1], *keys, True))


def test_the_lse_has_a_gradient_or_is_detached(form: str) -> None:
    q = randn(1, 2, 33, D, dtype=torch.float16).requires_grad_()
    _, lse = library.attention(q, q, q, form=form)
    if not FORMS[form].lse_gradient:
        assert not lse.requires_grad
        return
    (found,) = torch.autograd.grad(lse.sum(), q)
    exact = q.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((exact @ exact.mT * D**-0.5).logsumexp(-1).sum(), exact)
    assert_near(found, expected)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((0, 2, 5, 64), "batch"), ((1, 2, 0, 64), "queries")],
    ids=["no batch", "no queries"],
)
def test_nothing_to_do(form: str, shape: tuple[int, ...], kind: str) -> None:
    """An answer of that shape, or a sentence."""
    q = randn(*shape, dtype=torch.float16)
    k = randn(shape[0], 2, 7, 64, dtype=torch.float16)
    try:
        out, _ = library.attention(q, k, k, form=form)
    except NotImplementedError as error:
        assert f"batch or query length of 0, as in {shape}" in str(error)  # noqa: PT017
    else:
        assert out.shape == shape
    torch.cuda.synchronize()


def test_hopper_does_not_split_in_flash_attention_4() -> None:
    form = usable("flash-attn-4")
    if torch.cuda.get_device_capability()[0] in (10, 11):
        pytest.skip("this GPU splits keys")
    q = randn(1, 2, 33, D, dtype=torch.float16)
    with pytest.raises(NotImplementedError, match="keys are not split"):
        library.attention(q, q, q, form=form, num_splits=3)
