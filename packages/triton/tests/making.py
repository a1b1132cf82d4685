"""Random arguments of attention, on the CPU: dense, packed and in pages. Seed torch first."""

import itertools
import math

import torch

B, HQ, HKV, SQ, SK, D = 2, 4, 2, 70, 90, 40


def rand(*shape):
    return torch.rand(shape)


def randn(*shape):
    return torch.randn(shape)


def qkv(sq=SQ, sk=SK, d=D, dv=None, hq=HQ, hkv=HKV, b=B):
    return {"q": randn(b, hq, sq, d), "k": randn(b, hkv, sk, d), "v": randn(b, hkv, sk, dv or d)}


def arguments(device, dtype=torch.float32, **given):
    """Keyword arguments of V2 on a device: q, k, v and bias in a dtype, all else as it is."""

    def placed(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if name in ("q", "k", "v", "bias") else None)

    placed_all = {name: placed(name, value) for name, value in given.items()}
    return {"return_lse": True, "return_keep_mask": True} | placed_all


def everything(b=B, sq=SQ, sk=SK):
    """Options that all join, but for lengths and pages."""
    return {
        "causal": "bottom-right",
        "window": (60, 3),
        "softcap": 4.0,
        "scale": 0.4,
        "alibi_slopes": rand(HQ) * 0.2,
        "mask": rand(b, 1, sq, sk) < 0.8,
        "bias": randn(1, HQ, sq, sk),
        "sinks": randn(HQ),
        "dropout_p": 0.2,
    }


def packed(lens_q, lens_k, d=D, behind=0):
    """q, k, v and bounds; rows behind the last sequence are NaN."""

    def bounds(lengths):
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)

    given = qkv(sum(lens_q) + behind, sum(lens_k) + behind, d, b=1)
    if behind:
        given["q"][:, :, -behind:] = math.nan
        given["k"][:, :, -behind:] = given["v"][:, :, -behind:] = math.nan
    given |= {"cu_seqlens_q": bounds(lens_q), "cu_seqlens_k": bounds(lens_k)}
    return given | {"max_seqlen_q": max(lens_q), "max_seqlen_k": max(lens_k)}


def paged(lengths, page_size, sq, d=D):
    """q, k, v in shuffled pages and the table; NaN in rows and pages of no key."""
    most = -(-max(lengths) // page_size) + 1
    pages = len(lengths) * most + 2
    table = torch.randperm(pages, dtype=torch.int32)[: len(lengths) * most].view(-1, most)
    unused = torch.ones(pages, page_size, dtype=torch.bool)
    for n, length in enumerate(lengths):
        for j in range(length):
            unused[table[n, j // page_size], j % page_size] = False
    k, v = randn(pages, HKV, page_size, d), randn(pages, HKV, page_size, d)
    for tensor in (k, v):
        tensor.masked_fill_(unused[:, None, :, None], math.nan)
    given = {"q": randn(len(lengths), HQ, sq, d), "k": k, "v": v, "page_table": table}
    return given | {"key_lengths": torch.tensor(lengths, dtype=torch.int32)}
