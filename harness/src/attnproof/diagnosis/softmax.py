"""Mistakes of the softmax: its row sum, its tiles, its sinks, its LSE, its empty rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from attn_reference.problem import Problem

from .blocks import Block, dropped, maximum, right_softmax
from .case import Case, Guess, Stage, mistake, row_maximum
from .masks import TILES


def _with_row_sum(block: Block, scores: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax whose row sum also holds exp(more), ``more`` broadcasting to (G, R)."""
    out, lse = right_softmax(block, scores)
    wrong = torch.logaddexp(lse, more.expand_as(lse))
    return out * torch.exp(lse - wrong).nan_to_num()[..., None], wrong


@mistake()
def zero_keys_counted(case: Case) -> Iterator[Guess]:
    """Keys padded with zeros up to a whole tile, and counted: n exp(0 - max) in the row sum."""
    tried = {0}
    for tile in TILES:
        missing = -case.problem.keys % tile
        if missing in tried:
            continue
        tried.add(missing)

        def softmax(block: Block, scores: Tensor, tile: int = tile) -> tuple[Tensor, Tensor]:
            count = -block.len_k % tile
            return _with_row_sum(block, scores, torch.tensor(float(count)).double().log())

        count_of = f"({missing}, padding to tiles of {tile})"
        words = f"attention whose row sum also counts zero keys {count_of}"
        yield words, case.attention(softmax=softmax)


@mistake(lambda p: p.key_lengths is not None or p.packed is not None)
def padding_counted(case: Case) -> Iterator[Guess]:
    """The padding up to the longest sequence counted as zero keys."""

    def softmax(block: Block, scores: Tensor) -> tuple[Tensor, Tensor]:
        count = float(case.problem.keys - block.len_k)
        return _with_row_sum(block, scores, torch.tensor(count).double().log())

    words = "attention whose row sum also counts the padding up to seqlen_k as zero keys"
    yield words, case.attention(softmax=softmax)


def _online(
    block: Block, scores: Tensor, tile: int, tile_q: int | None, last_only: bool, sum_too: bool
) -> tuple[Tensor, Tensor]:
    """Online softmax over tiles of keys in which a rescale by exp(m_old - m_new) is missing.

    The last tile is the last one that a block of ``tile_q`` query rows visits under a causal
    mask, or of all keys when None. ``sum_too``: the row sum is not rescaled either.
    """
    rows_to = block.len_k
    last = torch.full((scores.shape[1],), (rows_to - 1) // tile)
    if tile_q is not None:
        end = (block.i[:, 0] // tile_q + 1) * tile_q - 1 + block.offset
        last = (end.clamp(0, rows_to - 1)) // tile
    sinks = block.head.sinks()
    largest = scores.new_full(scores.shape[:2], -torch.inf)
    total = torch.zeros_like(largest)
    if sinks is not None:
        largest, total = sinks[:, None].expand_as(largest), torch.ones_like(total)
    out = scores.new_zeros((*scores.shape[:2], block.head.v.shape[-1]))
    kept = block.head.kept(block.chunk.rows)
    factor = None if kept is None else kept / (1 - block.problem.dropout)
    for t in range(-(-rows_to // tile)):
        part = slice(t * tile, (t + 1) * tile)
        new = torch.maximum(largest, scores[..., part].amax(-1))
        shift = new.masked_fill(new == -torch.inf, 0.0)
        weights = torch.exp(scores[..., part] - shift[..., None])
        rescale = torch.exp(largest - shift)
        forgotten = (last == t)[None] if last_only else torch.ones_like(last == t)[None]
        # Before the first key there is nothing to rescale: exp(-inf) is not forgotten.
        lost = torch.where(forgotten & (largest > -torch.inf), 1.0, rescale)
        total = total * (lost if sum_too else rescale) + weights.sum(-1)
        if factor is not None:
            weights = weights * factor[..., part]
        out = out * lost[..., None] + weights @ block.head.v[part]
        largest = new
    lse = largest + total.log()
    return out / total.masked_fill(total == 0, 1.0)[..., None], lse


@mistake(lambda p: p.keys > TILES[0], Stage.LAST_RESORT)
def not_rescaled(case: Case) -> Iterator[Guess]:
    """exp(m_old - m_new) missing: for the accumulator, or for the row sum as well."""
    tiles = [tile for tile in TILES if tile < case.problem.keys]
    heights: list[int | None] = [None]
    if case.problem.causal != "none":
        heights += [tile for tile in TILES if tile < case.problem.seqlen_q]
    for tile, last_only, sum_too in product(tiles, (True, False), (False, True)):
        for height in heights if last_only else [None]:

            def softmax(
                block: Block,
                scores: Tensor,
                tile: int = tile,
                height: int | None = height,
                last_only: bool = last_only,
                sum_too: bool = sum_too,
            ) -> tuple[Tensor, Tensor]:
                return _online(block, scores, tile, height, last_only, sum_too)

            what = "accumulator and row sum" if sum_too else "accumulator"
            when = "at the last tile" if last_only else "at any tile"
            rows = "" if height is None else f" (blocks of {height} rows)"
            words = f"online softmax over tiles of {tile} keys, {what} not rescaled {when}{rows}"
            yield words, case.attention(softmax=softmax)


@mistake()
def not_normalised(case: Case) -> Iterator[Guess]:
    """The division by the row sum left out."""

    def softmax(block: Block, scores: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = right_softmax(block, scores)
        return out * torch.exp(lse - maximum(scores))[..., None].nan_to_num(), lse

    yield "attention not divided by its row sum", case.attention(softmax=softmax)


@mistake(lambda p: p.sinks)
def sinks_wrong(case: Case) -> Iterator[Guess]:
    """Sinks dropped, counted twice, or multiplied by the scale."""
    sinks = case.inputs.sinks
    assert sinks is not None
    wide = sinks.double()
    yield (
        "attention with the sinks ignored",
        case.given(sinks=wide.new_full(wide.shape, -torch.inf)),
    )
    yield "attention with the sinks counted twice", case.given(sinks=wide + math.log(2))
    words = "attention with the sinks multiplied by the softmax scale"
    yield words, case.given(sinks=wide * case.problem.softmax_scale)
    words = "attention with the sinks not multiplied by log2(e) before exp2"
    yield words, case.given(sinks=wide * math.log(2))
    for tile in TILES:
        if tile < case.problem.keys:
            times = -(-case.problem.keys // tile)
            words = f"attention with the sinks counted once per tile of {tile} keys ({times} times)"
            yield words, case.given(sinks=wide + math.log(times))
    if len(wide) > 1:
        yield (
            "attention with the sink of head 0 used for all",
            case.given(sinks=wide[:1].expand_as(wide)),
        )


@mistake()
def lse_wrong(case: Case) -> Iterator[Guess]:
    """The LSE in another base, without its maximum, with the wrong part scaled."""
    if "lse" not in case.wanted:
        return
    lse = case.truth["lse"]
    yield "the LSE in base 2", {"lse": lse / math.log(2)}
    yield "the LSE multiplied by ln 2", {"lse": lse * math.log(2)}
    yield "the LSE with its sign turned", {"lse": -lse}
    yield "the row sum exp(lse), not its logarithm", {"lse": lse.exp()}
    largest = row_maximum(case)
    log_sum = lse - largest
    scale, to_base_2 = case.problem.softmax_scale, 1 / math.log(2)
    yield "the row maximum, not the LSE", {"lse": largest}
    yield "the logarithm of the row sum without the maximum", {"lse": log_sum}
    words = "the maximum in base e plus the logarithm of the row sum in base 2"
    yield words, {"lse": largest + log_sum * to_base_2}
    words = "the maximum in base 2 plus the logarithm of the row sum in base e"
    yield words, {"lse": largest * to_base_2 + log_sum}
    if scale not in (0.0, 1.0):
        words = "the maximum without the scale plus the logarithm of the row sum"
        yield words, {"lse": largest / scale + log_sum}
        yield "the LSE divided by the scale", {"lse": lse / scale}


@mistake()
def empty_rows(case: Case) -> Iterator[Guess]:
    """Rows without a visible key as the usual slips leave them."""

    def divided(block: Block, scores: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = right_softmax(block, scores)
        empty = lse == -torch.inf
        return out.masked_fill(empty[..., None], torch.nan), lse.masked_fill(empty, torch.nan)

    def uniform(block: Block, scores: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = right_softmax(block, scores)
        everything = torch.full_like(scores, 1 / max(1, block.len_k))
        mean = dropped(block, everything) @ block.head.v
        empty = lse == -torch.inf
        return torch.where(empty[..., None], mean, out), lse

    words = "attention with 0/0 (NaN) in rows that see no key"
    yield words, case.attention(softmax=divided)
    words = "attention with the mean of v in rows that see no key (a finite number for -inf)"
    yield words, case.attention(softmax=uniform)
    for tile in reversed(TILES):
        if tile >= case.problem.keys:
            continue

        def nothing_yet(block: Block, scores: Tensor, tile: int = tile) -> tuple[Tensor, Tensor]:
            out, lse = right_softmax(block, scores)
            hidden = (scores[..., :tile] == -torch.inf).all(-1)
            return out.masked_fill(hidden[..., None], torch.nan), lse.masked_fill(hidden, torch.nan)

        words = (
            f"attention with exp(-inf - -inf) (NaN) in rows that see none of the first {tile} keys"
        )
        yield words, case.attention(softmax=nothing_yet)


def _drops(problem: Problem) -> bool:
    return problem.dropout > 0


@mistake(_drops)
def dropout_wrong(case: Case) -> Iterator[Guess]:
    """Dropout left out, inverted, or not made up for by 1 / (1 - p)."""
    keep = 1 - case.problem.dropout
    yield "attention without dropout", case.changed(dropout=0.0)
    unscaled = case.edited(lambda x: x, "lse") | case.edited(lambda x: x * keep, "out", "dv")
    yield "attention whose dropout does not divide by 1 - p", unscaled
    if case.inputs.keep_mask is not None:
        words = "attention with the keep mask of dropout inverted"
        yield words, case.given(keep_mask=~case.inputs.keep_mask)
