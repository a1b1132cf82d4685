"""The drop-in for the official library: a cache that grows, in its entries or in pages."""

import re

import pytest
import torch
from torch.library import opcheck

from triton_attention.cache import append_to_cache
from triton_attention.flash_attn import flash_attn_with_kvcache

from . import dense
from .making import HKV, HQ, B, rand, randn

CAPACITY, D, DV, NEW = 24, 16, 8, 3
LENGTHS = (17, 5)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def entries(lengths=LENGTHS, count=B, dv=DV):
    """A cache whose rows behind the keys are NaN, as the library has it."""
    caches = randn(count, CAPACITY, HKV, D), randn(count, CAPACITY, HKV, dv)
    for n, length in enumerate(lengths):
        for cache in caches:
            cache[n, length:] = torch.nan
    return caches


def in_pages(caches, page_size):
    """The same in shuffled pages, and their table."""
    pages = -(-CAPACITY // page_size)
    table = torch.randperm(B * pages + 1, dtype=torch.int32)[: B * pages].view(B, pages)
    paged = []
    for cache in caches:
        long = torch.full((B, pages * page_size, *cache.shape[2:]), torch.nan)
        long[:, :CAPACITY] = cache
        pool = torch.full((B * pages + 1, page_size, *cache.shape[2:]), torch.nan)
        pool[table.long()] = long.unflatten(1, (pages, page_size))
        paged.append(pool)
    return *paged, table


def out_of_pages(pool, table):
    return pool[table.long()].flatten(1, 2)[:, :CAPACITY]


def on(device, *tensors):
    return [tensor.to(device, copy=True) for tensor in tensors]


def expected(q, keys, values, lengths, first=(0, 0), **options):
    """out and lse of every sequence on its own, in fp64."""
    parts = []
    for n, (start, stop) in enumerate(zip(first, lengths, strict=True)):
        tensors = (q[n], keys[n, start:stop], values[n, start:stop])
        tensors = [tensor.cpu().double().transpose(0, 1)[None] for tensor in tensors]
        parts.append(dense.attention(*tensors, **options))
    out, lse = (torch.cat(each) for each in zip(*parts, strict=True))
    return {"out": out.transpose(1, 2), "lse": lse}


def close(found, truth):
    measured = dense.errors(dict(zip(("out", "lse"), found, strict=True)), truth)
    assert max(measured.values()) <= dense.TOLERANCE[torch.float32], measured
    assert found[0].is_contiguous()


def lengths_of(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("page_size", [None, 1, 5, 8, 256])
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        ({"causal": True}, {"causal": "bottom-right"}),
        ({"window_size": (4, 1), "softcap": 2.0}, {"window": (4, 1), "softcap": 2.0}),
        ({"softmax_scale": 0.7, "num_splits": 3}, {"scale": 0.7}),
    ],
    ids=["plain", "causal", "window-softcap", "scale-splits"],
)
@pytest.mark.parametrize("grows", [False, True], ids=["stays", "grows"])
def test_a_cache(page_size, given, options, grows, device):
    caches = entries()
    q, k, v = randn(B, NEW, HQ, D), randn(B, NEW, HKV, D), randn(B, NEW, HKV, DV)
    table, moved = None, on(device, *caches)
    if page_size:
        *moved, table = on(device, *in_pages(caches, page_size))
    lengths = lengths_of(LENGTHS, device)
    new = dict(zip("kv", on(device, k, v), strict=True)) if grows else {}
    found = flash_attn_with_kvcache(
        q.to(device),
        *moved,
        **new,
        cache_seqlens=lengths,
        block_table=table,
        return_softmax_lse=True,
        **given,
    )
    counted = LENGTHS
    if grows:
        counted = [length + NEW for length in LENGTHS]
        for cache, rows in zip(caches, (k, v), strict=True):
            for n, length in enumerate(LENGTHS):
                cache[n, length : length + NEW] = rows[n]
    assert lengths.tolist() == list(LENGTHS)  # the caller's own
    for cache, after in zip(caches, moved, strict=True):
        after = after if table is None else out_of_pages(after, table)
        torch.testing.assert_close(after.cpu(), cache, rtol=0, atol=0, equal_nan=True)
    close(found, expected(q, *caches, counted, **options))


def test_lengths_that_are_one_number_or_all(device):
    q, (keys, values) = randn(B, 1, HQ, D).to(device), on(device, *entries((CAPACITY,) * B))
    whole = flash_attn_with_kvcache(q, keys, values)
    for lengths in (CAPACITY, lengths_of((CAPACITY,) * B, device)):
        assert torch.equal(whole, flash_attn_with_kvcache(q, keys, values, cache_seqlens=lengths))
    fewer = flash_attn_with_kvcache(q, keys, values, cache_seqlens=7, return_softmax_lse=True)
    close(fewer, expected(q, keys, values, (7, 7)))
    *pages, table = on(device, *in_pages((keys.cpu(), values.cpu()), 8))
    torch.testing.assert_close(flash_attn_with_kvcache(q, *pages, block_table=table), whole)


def test_entries_that_are_named(device):
    """Of a cache with more entries than the batch; the others are not touched."""
    caches = entries((3, 17, 9, 5), count=4)
    moved = on(device, *caches)
    q, k, v = randn(B, NEW, HQ, D), randn(B, NEW, HKV, D), randn(B, NEW, HKV, DV)
    found = flash_attn_with_kvcache(
        *on(device, q),
        *moved,
        *on(device, k, v),
        cache_seqlens=lengths_of((17, 9), device),
        cache_batch_idx=lengths_of((1, 2), device),
        causal=True,
        return_softmax_lse=True,
    )
    for cache, new, after in zip(caches, (k, v), moved, strict=True):
        cache[1, 17 : 17 + NEW], cache[2, 9 : 9 + NEW] = new
        torch.testing.assert_close(after.cpu(), cache, rtol=0, atol=0, equal_nan=True)
    named = [cache[1:3] for cache in caches]
    close(found, expected(q, *named, (17 + NEW, 9 + NEW), causal="bottom-right"))


@pytest.mark.parametrize("page_size", [None, 7])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_begin_later(page_size, causal, device):
    """Rows before the first are never read; slopes and windows go by the distance from the end."""
    caches = entries()
    for cache in caches:
        cache[0, :4] = cache[1, :2] = torch.nan
    q, slopes = randn(B, NEW, HQ, D), rand(HQ) * 0.4
    table, moved = None, on(device, *caches)
    if page_size:
        *moved, table = on(device, *in_pages(caches, page_size))
    found = flash_attn_with_kvcache(
        q.to(device),
        *moved,
        cache_seqlens=lengths_of(LENGTHS, device),
        cache_leftpad=lengths_of((4, 2), device),
        block_table=table,
        causal=causal,
        window_size=(9, 2),
        alibi_slopes=slopes.to(device),
        return_softmax_lse=True,
    )
    options = {"window": (9, 2), "alibi_slopes": slopes.double()}
    options["causal"] = "bottom-right" if causal else "none"
    close(found, expected(q, *caches, LENGTHS, first=(4, 2), **options))


def turned(x, angles, interleaved):
    """Rotation as a product of complex numbers. x (S, H, D), angles (S, R / 2), in fp64."""
    half = angles.shape[1]
    pairs = x[..., : 2 * half].double()
    pairs = pairs.unflatten(-1, (half, 2) if interleaved else (2, half))
    pairs = pairs if interleaved else pairs.mT
    product = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    ).unsqueeze(1)
    product = torch.view_as_real(product)
    product = (product if interleaved else product.mT).flatten(-2)
    return torch.cat([product, x[..., 2 * half :].double()], -1)


@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("width", [4, D], ids=["part", "whole"])
@pytest.mark.parametrize(
    "local", [{}, {"causal": True}, {"window_size": (5, -1)}], ids=["all", "causal", "window"]
)
def test_rotation(interleaved, width, local, device):
    """Queries are rotated by their positions, as new keys are; where all see all, by the first."""
    angles = rand(CAPACITY + 4, width // 2).double() * 6
    caches = entries()
    q, k, v = randn(B, NEW, HQ, D), randn(B, NEW, HKV, D), randn(B, NEW, HKV, DV)
    moved = on(device, *caches)
    found = flash_attn_with_kvcache(
        *on(device, q),
        *moved,
        *on(device, k, v, angles.cos().float(), angles.sin().float()),
        cache_seqlens=lengths_of(LENGTHS, device),
        rotary_interleaved=interleaved,
        return_softmax_lse=True,
        **local,
    )
    rotated = q.double()
    keys, values = (cache.double() for cache in caches)
    for n, length in enumerate(LENGTHS):
        of_keys = angles[length : length + NEW]
        of_queries = of_keys if local else of_keys[:1].expand(NEW, -1)
        rotated[n] = turned(q[n], of_queries, interleaved)
        keys[n, length : length + NEW] = turned(k[n], of_keys, interleaved)
        values[n, length : length + NEW] = v[n]
    torch.testing.assert_close(moved[0].cpu().double(), keys, atol=1e-6, rtol=0, equal_nan=True)
    options = {"causal": "bottom-right"} if "causal" in local else {}
    options |= {"window": (5, None)} if "window_size" in local else {}
    close(found, expected(rotated, keys, values, [n + NEW for n in LENGTHS], **options))


@pytest.mark.parametrize("page_size", [None, 8])
def test_compiled_is_plain_to_the_bit(page_size, device):
    """Without a break of the graph; the cache of the caller grows."""

    def step(q, k, v, keys, values, table, lengths, cos, sin):
        return flash_attn_with_kvcache(
            q,
            keys,
            values,
            k,
            v,
            cos,
            sin,
            cache_seqlens=lengths,
            block_table=table,
            causal=True,
            return_softmax_lse=True,
        )

    caches, table = entries(), None
    if page_size:
        *caches, table = in_pages(caches, page_size)
        table = table.to(device)
    angles = rand(CAPACITY, 4)
    new = on(device, randn(B, 1, HQ, D), randn(B, 1, HKV, D), randn(B, 1, HKV, DV))
    lengths, tables = lengths_of(LENGTHS, device), on(device, angles.cos(), angles.sin())
    found = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)):
        moved = on(device, *caches)
        found.append((*call(*new, *moved, table, lengths, *tables), *moved))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("page_size", [None, 8])
def test_what_torch_asks_of_an_operator_that_writes(page_size, device):
    """Its schema names what it writes, and nothing else changes."""
    caches, table = [randn(*cache.shape) for cache in entries()], None
    if page_size:
        *caches, table = in_pages(caches, page_size)
        caches, table = [cache.nan_to_num() for cache in caches], table.to(device)
    moved = [cache.transpose(1, 2) for cache in on(device, *caches)]
    new = on(device, randn(B, HKV, NEW, D), randn(B, HKV, NEW, DV))
    opcheck(append_to_cache, (*moved, *new, lengths_of(LENGTHS, device), table))
    assert "Tensor(a0!) k_cache, Tensor(a1!) v_cache, Tensor k" in str(
        append_to_cache._opoverload._schema
    )


def test_what_does_not_fit(device):
    caches = on(device, *entries())
    q, k, v = on(device, randn(B, 1, HQ, D), randn(B, 1, HKV, D), randn(B, 1, HKV, DV))
    lengths = lengths_of(LENGTHS, device)
    table = torch.zeros(B, 1, dtype=torch.int32, device=device)
    cos = torch.ones(CAPACITY, 4, device=device)

    def says(sentence, **given):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            flash_attn_with_kvcache(q, *caches, **given)

    says("cache_batch_idx is given with block_table", cache_batch_idx=lengths, block_table=table)
    says("k, v and cache_seqlens: accepted with one of k and v are all three", k=k, v=v)
    says("k, v and cache_seqlens", k=k, cache_seqlens=lengths)
    says("rotary_cos is given without k and v", rotary_cos=cos, rotary_sin=cos)
    new = {"k": k, "v": v, "cache_seqlens": lengths}
    says("rotary_sin is None: accepted is torch.float32", rotary_cos=cos, **new)
    short = cos[:-1]
    says("rotary_cos is torch.float32 (23, 4)", rotary_cos=short, rotary_sin=short, **new)
    says(
        "k_cache is torch.float32 (2, 2, 24, 16) on",
        **new | {"k": k.to(torch.float16), "v": v.to(torch.float16)},
    )
    says("v is torch.float32 (1, 2, 1, 8) on", **new | {"v": v[:1]})
    says("lengths is torch.int64 (2,) on", **new | {"cache_seqlens": lengths.long()})
    three = {"k": torch.cat([k, k[:1]]), "v": torch.cat([v, v[:1]])}
    three["cache_seqlens"] = lengths_of((1, 1, 1), device)
    says("k_cache has 2 entries: accepted are 3 or more", **three)


def test_no_room(device):
    """Said on the CPU; elsewhere, where reading lengths would wait, what has no room is lost."""
    caches = on(device, *entries((23, 24)))
    q, k, v = on(device, randn(B, 1, HQ, D), randn(B, 2, HKV, D), randn(B, 2, HKV, DV))
    before = [cache.clone() for cache in caches]
    lengths = lengths_of((23, 24), device)
    if device == "cpu":
        with pytest.raises(
            ValueError, match="cache_seqlens has values from 23 to 24: accepted are 0 to 22"
        ):
            flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths)
        return
    flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths)
    for cache, old, new in zip(caches, before, (k, v), strict=True):
        old[0, 23] = new[0, 0]
        assert torch.equal(cache, old)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cache_seqlens": -1}, "cache_seqlens=-1: accepted is an int of 0 to 23, the room for 1"),
        ({"cache_seqlens": 24}, "cache_seqlens=24: accepted is an int of 0 to 23, the room for 1"),
        ({"cache_seqlens": 2.0}, "cache_seqlens=2.0: accepted is an int of 0 to 23"),
        (
            {"cache_seqlens": (-1, 3)},
            "cache_seqlens has values from -1 to 3: accepted are 0 to 23, the room for 1",
        ),
        ({"cache_seqlens": (3, 24)}, "cache_seqlens has values from 3 to 24: accepted are 0 to 23"),
        (
            {"cache_seqlens": (3, 3), "cache_leftpad": (0, -1)},
            "cache_leftpad has values from -1 to 0: accepted are 0 to 24",
        ),
        (
            {"cache_seqlens": (3, 3), "cache_batch_idx": (0, 2)},
            "has values from 0 to 2: accepted are 0 to 1, the pages of the cache",
        ),
    ],
)
def test_lengths_that_lead_out_of_the_cache(given, said):
    caches = [cache.nan_to_num() for cache in entries()]
    before = [cache.clone() for cache in caches]
    q, k, v = randn(B, 1, HQ, D), randn(B, 1, HKV, D), randn(B, 1, HKV, DV)
    given = {
        name: lengths_of(value, "cpu") if isinstance(value, tuple) else value
        for name, value in given.items()
    }
    with pytest.raises(ValueError, match=re.escape(said)):
        flash_attn_with_kvcache(q, *caches, k, v, **given)
    assert all(torch.equal(cache, old) for cache, old in zip(caches, before, strict=True))


def test_lengths_beyond_the_cache_are_not_read():
    for longer in (25, lengths_of((25, 3), "cpu")):
        with pytest.raises(ValueError, match="0 to 24, the keys of the cache"):
            flash_attn_with_kvcache(randn(B, 1, HQ, D), *entries(), cache_seqlens=longer)


@pytest.mark.parametrize(
    ("lengths", "table", "written"),
    [
        ((-1, 23), None, {(1, 23): (1, 0)}),
        ((24, 2**31 - 1), None, {}),
        ((-(2**31), 24), None, {}),
        ((3, 9), ((-1, 0, 0), (0, 3, 0)), {}),
        ((7, 9), ((0, 99, 0), (2, 1, 0)), {(0, 7): (0, 0), (1, 1): (1, 0), (1, 2): (1, 1)}),
    ],
)
def test_no_value_of_a_tensor_leads_out_of_the_cache(lengths, table, written, device, monkeypatch):
    """Where values are not read, the kernel leaves out what has no place; the interpreter fails on
    what would be written elsewhere. Three pages of 8 keys, or two entries of 24."""
    monkeypatch.setattr("triton_attention.cache.refuse_outside", lambda *_: None)
    shape = (B, CAPACITY) if table is None else (3, 8)
    caches = on(device, torch.zeros(*shape, HKV, D), torch.zeros(*shape, HKV, DV))
    new = on(device, randn(B, 2, HKV, D), randn(B, 2, HKV, DV))
    pages = None if table is None else torch.tensor(table, dtype=torch.int32, device=device)
    append_to_cache(
        *(each.transpose(1, 2) for each in (*caches, *new)), lengths_of(lengths, device), pages
    )
    for kept, rows in zip(caches, new, strict=True):
        expected = torch.zeros_like(kept)
        for place, row in written.items():
            expected[place] = rows[row]
        assert torch.equal(kept, expected)
