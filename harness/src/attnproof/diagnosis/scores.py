"""Mistakes in the scores: scale, base of the exponential, softcap, bias, ALiBi, heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attn_reference.problem import Problem

from .blocks import Block
from .case import Case, Guess, mistake, row_maximum


@mistake()
def scale_wrong(case: Case) -> Iterator[Guess]:
    """The scale dropped, applied twice, or taken from elsewhere."""
    problem = case.problem
    scale = problem.softmax_scale
    candidates = {
        "the scale missing (1)": 1.0,
        "the scale applied twice": scale * scale,
        "the scale doubled": 2 * scale,
        "the scale halved": scale / 2,
        "the scores ignored: the mean of the visible values": 0.0,
        "scale 1/sqrt(head_dim), not the one asked for": problem.head_dim**-0.5,
        "scale 1/head_dim": 1 / problem.head_dim,
        "scale 1/sqrt(head_dim_v)": problem.value_dim**-0.5,
        "the sign of the scale turned": -scale,
    }
    tried = {scale}
    for words, value in candidates.items():
        if value not in tried:
            tried.add(value)
            yield f"attention with {words}", case.changed(scale=value)


@mistake()
def base_of_exponential(case: Case) -> Iterator[Guess]:
    """exp2 of natural scores, or log2(e) multiplied in where it already is."""
    for words, factor in (
        ("2 in the exponent in place of e (exp2 of scores not multiplied by log2(e))", math.log(2)),
        ("log2(e) in the exponent once too often", 1 / math.log(2)),
    ):

        def scores(block: Block, factor: float = factor) -> Tensor:
            return block.masked(factor * block.unmasked)

        answer = case.attention(scores=scores)
        yield f"attention with {words}", answer
        if "lse" in answer and case.problem.sinks is False:
            # The maximum keeps its base when only the exponential has another one.
            maximum = row_maximum(case)
            mixed = answer["lse"] + (1 - factor) * maximum
            yield f"attention with {words}", {"lse": mixed}


@mistake(lambda p: p.softcap > 0)
def softcap_wrong(case: Case) -> Iterator[Guess]:
    """The softcap dropped, or in another place of the pipeline."""
    cap, scale = case.problem.softcap, case.problem.softmax_scale

    def after_mask(block: Block) -> Tensor:
        return block.with_additive(cap * torch.tanh(block.masked(block.chunk.raw) / cap))

    def after_bias(block: Block) -> Tensor:
        return block.masked(cap * torch.tanh(block.with_additive(block.chunk.raw) / cap))

    def before_scale(block: Block) -> Tensor:
        products = block.chunk.raw / scale
        return block.masked(block.with_additive(scale * cap * torch.tanh(products / cap)))

    def not_multiplied(block: Block) -> Tensor:
        return block.masked(block.with_additive(torch.tanh(block.chunk.raw / cap)))

    yield "attention with the softcap ignored", case.changed(softcap=0.0)
    yield (
        "attention with the softcap applied after the mask (hidden keys get the score -softcap)",
        case.attention(scores=after_mask),
    )
    if case.problem.bias is not None or case.problem.alibi:
        words = "attention with the softcap applied after the bias"
        yield words, case.attention(scores=after_bias)
    if scale:
        words = "attention with the softcap applied before the scale"
        yield words, case.attention(scores=before_scale)
    words = "attention with tanh(score / softcap) not multiplied by the softcap again"
    yield words, case.attention(scores=not_multiplied)


@mistake(lambda p: p.bias is not None)
def bias_wrong(case: Case) -> Iterator[Guess]:
    """The bias dropped, with another sign or factor, or misread."""
    bias = case.inputs.bias
    assert bias is not None
    wide = bias.double()
    finite = torch.where(wide.isfinite(), wide, 0.0)
    yield "attention with the bias ignored", case.given(bias=finite * 0)
    yield "attention with the sign of the bias turned", case.given(bias=-wide)
    yield "attention with the bias added twice", case.given(bias=2 * wide)
    words = "attention with the bias added before the scale"
    yield words, case.given(bias=wide * case.problem.softmax_scale)
    words = "attention with the bias not multiplied by log2(e) before exp2"
    yield words, case.given(bias=wide * math.log(2))
    if bias.shape[2] == bias.shape[3]:
        yield "attention with the bias transposed", case.given(bias=wide.transpose(2, 3))
    for dim, name in ((0, "batch entry"), (1, "head"), (2, "query row")):
        if bias.shape[dim] > 1:
            first = wide.narrow(dim, 0, 1).expand_as(wide)
            yield (
                f"attention with the bias of the first {name} used for all",
                case.given(bias=first),
            )


@mistake(lambda p: p.alibi)
def alibi_wrong(case: Case) -> Iterator[Guess]:
    """ALiBi dropped, with another sign, distance or slopes."""
    slopes = case.inputs.alibi_slopes
    assert slopes is not None
    yield "attention with ALiBi ignored", case.given(alibi_slopes=slopes * 0)
    yield "attention with the sign of ALiBi turned", case.given(alibi_slopes=-slopes)
    words = "attention with ALiBi multiplied by the softmax scale"
    yield words, case.given(alibi_slopes=slopes * case.problem.softmax_scale)
    words = "attention with ALiBi not multiplied by log2(e) before exp2"
    yield words, case.given(alibi_slopes=slopes.double() * math.log(2))
    heads = slopes.shape[0]
    if heads & (heads - 1):
        plain = torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)])
        words = "attention with the ALiBi slopes 2^(-8 i / heads), right for powers of two only"
        yield words, case.given(alibi_slopes=plain)
    for words, distance in (
        ("the ALiBi distance off by one (i + 1 - j)", lambda b: (b.i + b.offset + 1 - b.j).abs()),
        ("the ALiBi distance off by one (i - 1 - j)", lambda b: (b.i + b.offset - 1 - b.j).abs()),
        ("the ALiBi distance signed (i - j, not |i - j|)", lambda b: b.i + b.offset - b.j),
        (
            "the ALiBi distance measured from the other diagonal",
            lambda b: (b.i + (0 if b.offset else b.len_k - b.len_q) - b.j).abs(),
        ),
    ):

        def scores(block: Block, distance: object = distance) -> Tensor:
            own = slopes[block.head.query_heads].double()[:, None, None]
            right = -own * (block.i + block.offset - block.j).abs()
            wrong = -own * distance(block)  # type: ignore[operator]
            return block.masked(block.unmasked - right + wrong)

        yield f"attention with {words}", case.attention(scores=scores)


def _mapped(case: Case, kv_head_of: list[int]) -> dict[str, Tensor]:
    """Attention in which query head h reads kv head ``kv_head_of[h]``; dK and dV folded back."""
    chosen = torch.tensor(kv_head_of)
    inputs = replace(case.inputs, k=case.inputs.k[:, chosen], v=case.inputs.v[:, chosen])
    answer = case.attention(case.problem.replace(heads_kv=case.problem.heads_q), inputs)
    for name in ("dk", "dv"):
        if name in answer:
            per_head = answer[name]
            shape = (per_head.shape[0], case.problem.kv_heads, *per_head.shape[2:])
            answer[name] = per_head.new_zeros(shape).index_add_(1, chosen, per_head)
    return answer


@mistake(lambda p: p.kv_heads > 1)
def heads_mapped(case: Case) -> Iterator[Guess]:
    """Query heads that read the wrong key/value head."""
    heads, kv_heads, group = case.problem.heads_q, case.problem.kv_heads, case.problem.group
    guesses: dict[str, Callable[[int], int]] = {
        "query head h reading kv head h % heads_kv (not h // group)": lambda h: h % kv_heads,
        "every query head reading kv head 0": lambda h: 0,
        "query head h reading kv head h * group": lambda h: h * group % kv_heads,
        "query head h reading the kv head before its own": lambda h: (h // group - 1) % kv_heads,
        "query head h reading the kv head after its own": lambda h: (h // group + 1) % kv_heads,
        "pairs of query heads reading the kv head of the first": lambda h: h // 2 * 2 // group,
        "the kv heads in reverse order": lambda h: kv_heads - 1 - h // group,
    }
    tried = [[h // group for h in range(heads)]]
    for words, rule in guesses.items():
        mapping = [rule(h) for h in range(heads)]
        if mapping not in tried:
            tried.append(mapping)
            yield f"attention with {words}", _mapped(case, mapping)


def _plain(problem: Problem) -> bool:
    return problem.packed is None and problem.page_size is None


@mistake(lambda p: _plain(p) and p.batch > 1)
def batch_ignored(case: Case) -> Iterator[Guess]:
    """Keys and values of one batch entry used for all: a batch stride of zero."""
    first = {
        n: getattr(case.inputs, n)[:1].expand_as(case.inputs.k if n == "k" else case.inputs.v)
        for n in ("k", "v")
    }
    words = "attention with the keys and values of the first batch entry used for all"
    yield words, case.given(**first)


@mistake()
def operands_misread(case: Case) -> Iterator[Guess]:
    """K and V swapped or shifted, part of head_dim left out of the products."""
    q, k, v = case.inputs.q, case.inputs.k, case.inputs.v
    if k.shape == v.shape:
        yield "attention with k and v swapped", case.given(k=v, v=k)
    for shift, words in ((-1, "before"), (1, "after")):
        moved = v.roll(-shift, 2)
        yield f"attention with the row of v {words} the key's own", case.given(v=moved)
    dims = case.problem.head_dim
    parts = {n for n in (16, 32, 64, 128, 256, dims // 2) if 0 < n < dims}
    for part in sorted(parts):
        first = q.clone()
        first[..., part:] = 0
        words = f"attention with q·k over the first {part} of {dims} columns"
        yield words, case.given(q=first)
