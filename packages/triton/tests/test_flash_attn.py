"""The drop-in for the official library: dense and packed calls, against the formula in fp64."""

import inspect
import re

import pytest
import torch

import triton_attention.flash_attn as library

from . import dense
from .making import HQ, B, arguments, packed, paged, qkv, rand, randn

SQ, SK, D = 21, 34, 16

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
BOUNDS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
# Names, order and defaults of flash_attn 2.8.3.
OFFICIAL = {
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_varlen_func": f"q, k, v, {BOUNDS}, {COMMON}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {BOUNDS}, {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameters_are_those_of_the_library(name):
    shown = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(getattr(library, name)).parameters.values()
    ]
    assert ", ".join(map(str, shown)) == OFFICIAL[name]
    assert name in library.__all__


def options_of(given):
    """Options of V2 in the words of the library."""
    window = given.get("window") or (None, None)
    return {
        "softmax_scale": given.get("scale"),
        "causal": given.get("causal") == "bottom-right",
        "window_size": tuple(-1 if bound is None else bound for bound in window),
        "softcap": given.get("softcap", 0.0),
        "alibi_slopes": given.get("alibi_slopes"),
        "dropout_p": given.get("dropout_p", 0.0),
        "return_attn_probs": True,
    }


def in_v2s_layout(out, lse, signs):
    return out.transpose(1, 2), lse, None if signs.numel() == 0 else signs >= 0


def separate(q, k, v, **given):
    tensors = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return in_v2s_layout(*library.flash_attn_func(*tensors, **options_of(given)))


def kvpacked(q, k, v, **given):
    kv = torch.stack([k, v], 2).permute(0, 3, 2, 1, 4)  # (B, Sk, 2, H, D)
    found = library.flash_attn_kvpacked_func(q.transpose(1, 2), kv, **options_of(given))
    return in_v2s_layout(*found)


def qkvpacked(q, k, v, **given):
    qkv = torch.stack([q, k, v], 2).permute(0, 3, 2, 1, 4)
    return in_v2s_layout(*library.flash_attn_qkvpacked_func(qkv, **options_of(given)))


FEATURES = {
    "plain": dict,
    "causal": lambda: {"causal": "bottom-right"},
    "window": lambda: {"window": (9, 2), "scale": 0.5},
    "window-left": lambda: {"window": (7, None)},
    "window-causal": lambda: {"window": (0, 5), "causal": "bottom-right"},
    "softcap-alibi": lambda: {"softcap": 2.0, "alibi_slopes": rand(HQ) * 0.3},
    "dropout": lambda: {"dropout_p": 0.3},
}


@pytest.mark.parametrize("name", FEATURES)
def test_dense(name, device):
    given = qkv(SQ, SK, D) | FEATURES[name]()
    dense.check(separate, arguments(device, **given))


@pytest.mark.parametrize("function", [kvpacked, qkvpacked])
def test_dense_and_packed_in_one(function, device):
    given = qkv(SQ, SQ, D, hkv=HQ) | {"causal": "bottom-right", "window": (9, 0)}
    dense.check(function, arguments(device, **given))


@pytest.mark.parametrize("causal", [False, True])
def test_slopes_by_sequence(causal, device):
    given = arguments(device, **qkv(SQ, SK, D), slopes=rand(B, HQ) * 0.5)
    slopes = given["slopes"]

    def by_sequence(q, k, v, **_):
        found = separate(q, k, v, alibi_slopes=slopes, causal="bottom-right" if causal else "none")
        assert torch.equal(found[0], found[0].contiguous())
        return found

    def one_by_one(q, k, v, **_):
        parts = [
            dense.attention(
                *(tensor[n : n + 1] for tensor in (q, k, v)),
                alibi_slopes=slopes[n].double().cpu(),
                causal="bottom-right" if causal else "none",
            )
            for n in range(B)
        ]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    grads = randn(B, HQ, SQ, D), randn(B, HQ, SQ)
    tensors = {name: given[name] for name in ("q", "k", "v")}
    found = dense.results(by_sequence, tensors, tuple(grad.to(device) for grad in grads))
    exact = {name: dense.exact(tensor) for name, tensor in tensors.items()}
    expected = dense.results(one_by_one, exact, tuple(grad.double() for grad in grads))
    assert max(dense.errors(found, expected).values()) <= dense.TOLERANCE[torch.float32]


def bounds_of(given):
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return {name: given[name] for name in names}


def varlen(q, k, v, **given):
    tensors = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    found = library.flash_attn_varlen_func(*tensors, **bounds_of(given), **options_of(given))
    return in_v2s_packed_layout(*found, given)


def varlen_kvpacked(q, k, v, **given):
    kv = torch.stack([k[0], v[0]]).permute(2, 0, 1, 3)  # (T, 2, H, D)
    found = library.flash_attn_varlen_kvpacked_func(
        q[0].transpose(0, 1), kv, **bounds_of(given), **options_of(given)
    )
    return in_v2s_packed_layout(*found, given)


def varlen_qkvpacked(q, k, v, **given):
    together = torch.stack([q[0], k[0], v[0]]).permute(2, 0, 1, 3)
    found = library.flash_attn_varlen_qkvpacked_func(
        together, given["cu_seqlens_q"], given["max_seqlen_q"], **options_of(given)
    )
    return in_v2s_packed_layout(*found, given)


def in_v2s_packed_layout(out, lse, signs, given):
    """S_dmask (B, Hq, max_seqlen_q, max_seqlen_k) as (1, Hq, total_q, total_k)."""
    kept = None
    if signs.numel():
        bounds = [given[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
        kept = torch.zeros(1, HQ, bounds[0][-1], bounds[1][-1], dtype=torch.bool)
        for n, part in enumerate(signs):
            rows, keys = (slice(cu[n], cu[n + 1]) for cu in bounds)
            sizes = rows.stop - rows.start, keys.stop - keys.start
            kept[0, :, rows, keys] = part[:, : sizes[0], : sizes[1]] >= 0
            assert (part[:, sizes[0] :] == -1).all()
            assert (part[:, :, sizes[1] :] == -1).all()
    return out.transpose(0, 1)[None], lse[None], kept


@pytest.mark.parametrize("name", FEATURES)
def test_packed_sequences(name, device):
    given = packed((13, 0, 20, 1), (9, 4, 30, 17), D) | FEATURES[name]()
    dense.check(varlen, arguments(device, **given))


@pytest.mark.parametrize("function", [varlen_kvpacked, varlen_qkvpacked])
def test_packed_sequences_and_packed_in_one(function, device):
    given = packed((13, 20, 1), (13, 20, 1), D)
    if function is varlen_qkvpacked:
        given |= {"k": randn(1, HQ, 34, D), "v": randn(1, HQ, 34, D)}
    dense.check(function, arguments(device, **given, causal="bottom-right"))


@pytest.mark.parametrize("page_size", [1, 7, 64])
@pytest.mark.parametrize("name", ["causal", "window", "softcap-alibi"])
def test_packed_queries_of_paged_keys(name, page_size, device):
    """As if the keys lay one after another; rows behind the last sequence see none."""
    lens_q, lens_k = (13, 0, 20, 1), (15, 4, 30, 0)
    given = packed(lens_q, lens_k, D) | FEATURES[name]()
    in_pages = paged(lens_k, page_size, 1, D)
    places = [
        (int(in_pages["page_table"][n, j // page_size]), j % page_size)
        for n, length in enumerate(lens_k)
        for j in range(length)
    ]
    pages, rows = (torch.tensor(each) for each in zip(*places, strict=True))
    for t in ("k", "v"):
        in_pages[t][pages, :, rows] = given[t][0].transpose(0, 1)
    given, in_pages = arguments(device, **given), arguments(device, **in_pages)
    expected_out, expected_lse, _ = varlen(**given)
    q = torch.cat([given["q"][0].transpose(0, 1), randn(2, HQ, D).to(device)])
    out, lse, _ = library.flash_attn_varlen_func(
        q,
        in_pages["k"].transpose(1, 2),
        in_pages["v"].transpose(1, 2),
        **bounds_of(given),
        **options_of(given),
        block_table=in_pages["page_table"],
    )
    torch.testing.assert_close(out[:-2], expected_out[0].transpose(0, 1))
    torch.testing.assert_close(lse[:, :-2], expected_lse[0])
    assert not out[-2:].any()
    assert (lse[:, -2:] == -torch.inf).all()


def test_what_comes_back(device):
    """out alone, contiguous, unless more is asked for; S_dmask is empty without dropout."""
    q, k, v = (tensor.to(device) for tensor in qkv(SQ, SK, D).values())
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = library.flash_attn_func(q, k, v)
    assert out.shape == q.shape
    assert out.is_contiguous()
    again, lse, signs = library.flash_attn_func(q, k, v, return_attn_probs=True)
    assert torch.equal(out, again)
    assert (lse.shape, lse.dtype) == ((B, HQ, SQ), torch.float32)
    assert (signs.shape, signs.dtype) == ((0,), q.dtype)


def tokens(count, heads=HQ):
    return randn(count, heads, D)


def cu(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32)


CALLS = {
    "dense": lambda: ("flash_attn_func", randn(B, SQ, HQ, D), *randn(2, B, SK, 2, D), {}),
    "slopes": lambda: (
        "flash_attn_func",
        *randn(3, B, SQ, HQ, D),
        {"alibi_slopes": rand(B, HQ), "window_size": (5, -1)},
    ),
    "in-one": lambda: ("flash_attn_qkvpacked_func", randn(B, SQ, 3, HQ, D), {"dropout_p": 0.2}),
    "packed": lambda: (
        "flash_attn_varlen_func",
        *(tokens(20), tokens(29, 2), tokens(29, 2), cu(13, 20), cu(9, 29), 13, 20),
        {"dropout_p": 0.2, "return_attn_probs": True},
    ),
    "paged": lambda: (
        "flash_attn_varlen_func",
        *(tokens(20), *randn(2, 5, 8, 2, D), cu(13, 20), cu(9, 29), 13, 20),
        {"block_table": torch.tensor([[4, 1, 0], [2, 0, 3]], dtype=torch.int32)},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled_is_plain_to_the_bit(name, device):
    """Without a break of the graph, forward and backward."""
    function, *values, options = CALLS[name]()
    plain = getattr(library, function)
    values = [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]
    options = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    leaves = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    leaves = [leaf.requires_grad_() for leaf in (leaves[:1] if name == "paged" else leaves)]
    found = []
    for call in (plain, torch.compile(plain, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        returned = call(*values, **options, causal=True)
        returned = returned if isinstance(returned, tuple) else (returned,)
        torch.manual_seed(4)
        grads = torch.autograd.grad(returned[0], leaves, torch.randn_like(returned[0]))
        found.append((*returned, *grads))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_is_refused():
    q = torch.zeros(B, SQ, HQ, D)
    with pytest.raises(ValueError, match=re.escape("alibi_slopes is torch.float32 (2,) on cpu")):
        library.flash_attn_func(q, q, q, alibi_slopes=torch.zeros(2))
    with pytest.raises(ValueError, match=re.escape("qkv has shape (2, 21, 4, 16): accepted is")):
        library.flash_attn_qkvpacked_func(q)
    bounds = torch.tensor([0, SQ], dtype=torch.int32)
    given = (q[0], q[0], q[0], bounds, bounds, SQ, SQ)
    with pytest.raises(NotImplementedError, match=re.escape("alibi_slopes has shape (2, 4)")):
        library.flash_attn_varlen_func(*given, alibi_slopes=torch.zeros(2, HQ))
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=re.escape("dropout_p=0.1 with block_table")):
        library.flash_attn_varlen_func(*given, dropout_p=0.1, block_table=table)
