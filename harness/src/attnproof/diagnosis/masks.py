"""Mistakes about which keys a query sees: causality, windows, masks, lengths, tails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from attn_reference.masks import causal, positional_mask, window
from attn_reference.problem import Problem
from attn_reference.sequences import visibility

from .blocks import Block
from .case import Case, Guess, mistake

TILES = (16, 32, 64, 128, 256)


def is_causal(problem: Problem) -> bool:
    """Whether there is a causal mask."""
    return problem.causal != "none"


def has_window(problem: Problem) -> bool:
    """Whether there is a window."""
    return problem.window is not None


def has_mask(problem: Problem) -> bool:
    """Whether there is a boolean mask."""
    return problem.mask is not None


@mistake(is_causal)
def other_alignment(case: Case) -> Iterator[Guess]:
    """The diagonal through the first key for the one through the last, or the reverse."""
    other = "top-left" if case.problem.causal == "bottom-right" else "bottom-right"
    words = f"attention with {other} causal alignment ({case.problem.causal} was asked for)"
    yield words, case.changed(causal=other)


@mistake(is_causal)
def causal_ignored(case: Case) -> Iterator[Guess]:
    """The causal flag dropped on one path."""

    def without(block: Block) -> torch.Tensor:
        if case.problem.window is None:
            return block.mask
        return window(*case.problem.window, block.offset)(block.i, block.j) & block.mask

    yield "attention with the causal mask ignored", case.seeing(without)


@mistake(is_causal)
def causal_off_by_one(case: Case) -> Iterator[Guess]:
    """< for <=, or one key too many."""
    for shift, words in (
        (-1, "attention in which a query does not see its own position (j < i, not j <= i)"),
        (1, "attention in which a query sees one key past the causal diagonal"),
    ):

        def shifted(block: Block, shift: int = shift) -> torch.Tensor:
            seen = causal(block.offset + shift)(block.i, block.j) & block.mask
            if case.problem.window is not None:
                seen = seen & window(case.problem.window[0], None, block.offset)(block.i, block.j)
            return seen

        yield words, case.seeing(shifted)


@mistake(is_causal)
def causal_by_tile(case: Case) -> Iterator[Guess]:
    """The causal mask applied to whole tiles only, not inside the tile on the diagonal."""
    for tile in TILES[:-1]:
        if tile >= case.problem.keys:
            continue

        def seen(block: Block, tile: int = tile) -> torch.Tensor:
            last = (block.i // tile + 1) * tile - 1 + block.offset
            return (block.j <= last) & block.mask

        yield f"attention whose causal mask ends at tiles of {tile} keys", case.seeing(seen)


@mistake(has_window)
def window_off_by_one(case: Case) -> Iterator[Guess]:
    """A window of one key more or less on a side, or exclusive where it is inclusive."""
    assert case.problem.window is not None
    left, right = case.problem.window
    for words, more_left, more_right in (
        ("one key short on the left", -1, 0),
        ("one key long on the left", 1, 0),
        ("one key short on the right", 0, -1),
        ("one key long on the right", 0, 1),
        ("taken as exclusive at both ends", -1, -1),
        ("one key long on both sides", 1, 1),
    ):
        new = (_moved(left, more_left), _moved(right, more_right))
        if new == (left, right):
            continue

        def seen(block: Block, new: tuple[int | None, int | None] = new) -> torch.Tensor:
            return _positions(block, new) & block.mask

        sizes = f"({_side(new[0])}, {_side(new[1])}, not {_side(left)}, {_side(right)})"
        yield f"attention with the window {words} {sizes}", case.seeing(seen)


@mistake(has_window)
def window_ignored(case: Case) -> Iterator[Guess]:
    """The window, or one of its sides, dropped."""
    assert case.problem.window is not None
    left, right = case.problem.window
    for words, new in (
        ("the window ignored", (None, None)),
        ("the left side of the window ignored", (None, right)),
        ("the right side of the window ignored", (left, None)),
        ("the sides of the window swapped", (right, left)),
    ):
        if new == (left, right):
            continue

        def seen(block: Block, new: tuple[int | None, int | None] = new) -> torch.Tensor:
            return _positions(block, new) & block.mask

        yield f"attention with {words}", case.seeing(seen)


@mistake(has_window)
def window_alignment(case: Case) -> Iterator[Guess]:
    """The window measured from the other diagonal."""

    def seen(block: Block) -> torch.Tensor:
        assert case.problem.window is not None
        other = block.len_k - block.len_q if case.problem.causal == "top-left" else 0
        allowed = window(*case.problem.window, other)(block.i, block.j) & block.mask
        return (
            allowed & causal(block.offset)(block.i, block.j) if is_causal(case.problem) else allowed
        )

    corner = "last" if case.problem.causal == "top-left" else "first"
    yield f"attention with the window measured from the {corner} key's diagonal", case.seeing(seen)


@mistake(has_mask)
def mask_polarity(case: Case) -> Iterator[Guess]:
    """True taken as "hide", or the mask dropped, or added to the scores as a number."""
    mask = case.inputs.mask
    assert mask is not None
    yield "attention with the boolean mask inverted (True taken as hidden)", case.given(mask=~mask)
    yield "attention with the boolean mask ignored", case.given(mask=None)

    def added(block: Block) -> torch.Tensor:
        scores = block.unmasked + block.mask.double()
        rule = positional_mask(case.problem, block.len_q, block.len_k)(block.i, block.j)
        return scores.masked_fill(~rule, -torch.inf)

    words = "attention with the boolean mask added to the scores as 0 and 1"
    yield words, case.attention(scores=added)


@mistake(has_mask)
def mask_misread(case: Case) -> Iterator[Guess]:
    """The mask transposed, or that of one head or batch entry used for all: strides."""
    mask = case.inputs.mask
    assert mask is not None
    if mask.shape[2] == mask.shape[3]:
        yield "attention with the boolean mask transposed", case.given(mask=mask.transpose(2, 3))
    for dim, words in ((0, "batch entry"), (1, "head"), (2, "query row")):
        if mask.shape[dim] > 1:
            first = mask.narrow(dim, 0, 1)
            yield (
                f"attention with the mask of the first {words} used for all",
                case.given(mask=first),
            )


@mistake(lambda p: p.key_lengths is not None)
def key_lengths_ignored(case: Case) -> Iterator[Guess]:
    """Keys of the padding seen (they hold NaN), or one entry's length used for all."""
    problem, lengths = case.problem, case.problem.key_lengths
    assert lengths is not None
    if problem.page_size is None:
        words = "attention that also reads the keys beyond key_lengths (NaN)"
        yield words, case.changed(key_lengths=None)
    if len(set(lengths)) > 1:
        words = "attention with the key length of the first batch entry used for all"
        yield words, case.changed(key_lengths=(lengths[0],) * problem.batch)
    for change, words in ((-1, "one key less"), (1, "one key more")):
        moved = tuple(min(problem.keys, max(0, n + change)) for n in lengths)
        if moved != lengths and (change < 0 or problem.page_size is None):
            yield f"attention with {words} than key_lengths", case.changed(key_lengths=moved)


@mistake(lambda p: p.packed is not None)
def sequences_mixed(case: Case) -> Iterator[Guess]:
    """The bounds of packed sequences ignored."""
    assert case.problem.packed is not None
    total = tuple(map(sum, zip(*case.problem.packed, strict=True)))
    if total:
        words = "attention over all packed sequences as if they were one"
        yield words, case.changed(packed=(total,))


@mistake()
def keys_dropped(case: Case) -> Iterator[Guess]:
    """A loop that ends early: the last key, the first one, or what does not fill a tile."""

    def all_but_last(block: Block) -> torch.Tensor:
        return block.chunk.visible & (block.j < block.len_k - 1)

    def all_but_first(block: Block) -> torch.Tensor:
        return block.chunk.visible & (block.j > 0)

    yield "attention without the last key", case.seeing(all_but_last)
    yield "attention without the first key", case.seeing(all_but_first)
    for tile in TILES:
        if tile < case.problem.keys and case.problem.keys % tile:

            def whole_tiles(block: Block, tile: int = tile) -> torch.Tensor:
                return block.chunk.visible & (block.j < block.len_k // tile * tile)

            words = f"attention without the keys after the last whole tile of {tile}"
            yield words, case.seeing(whole_tiles)


@mistake(lambda p: p.mask is not None or p.window is not None or p.causal != "none")
def hidden_score_zero(case: Case) -> Iterator[Guess]:
    """Hidden keys get the score 0, not -inf."""

    def zeroed(block: Block) -> torch.Tensor:
        return block.unmasked.masked_fill(~block.chunk.visible, 0.0)

    words = "attention in which hidden keys have the score 0 (not -inf)"
    yield words, case.attention(scores=zeroed)


@mistake(lambda p: is_causal(p) and has_mask(p))
def causal_or_mask(case: Case) -> Iterator[Guess]:
    """The causal mask joined to the boolean one by or, not and."""

    def either(block: Block) -> torch.Tensor:
        alone = replace(block.head.sequence, mask=None)
        positional = visibility(alone, case.problem, block.head.query_heads, block.chunk.rows)
        return positional | block.mask

    yield "attention to keys that the causal rule or the mask allows", case.seeing(either)


def _positions(block: Block, new: tuple[int | None, int | None]) -> torch.Tensor:
    """The causal rule and a window of those sides; a side of -1 ends before the diagonal."""
    seen = window(*new, block.offset)(block.i, block.j)
    return seen & causal(block.offset)(block.i, block.j) if is_causal(block.problem) else seen


def _side(size: int | None) -> str:
    return "unbounded" if size is None else str(size)


def _moved(size: int | None, by: int) -> int | None:
    return None if size is None else size + by
