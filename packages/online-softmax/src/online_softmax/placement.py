"""Which rows and keys each of the R ranks of a ring owns, and how much work that gives each.

A ring is as fast as its busiest rank. Under a causal mask the last rows see every key and the
first see next to none, so that contiguous shares leave the first ranks idle. Zig-zag cuts the
sequence into 2R chunks and gives rank r the chunks r and 2R - 1 - r, one from each end (Llama
team 2024, arXiv 2407.21783, section 3.3.2; striped attention, Brandon et al. 2023, arXiv
2311.09431, balances by dealing out single tokens, which leaves no tile that can be skipped).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attn_reference.masks import positional_mask
from attn_reference.problem import Problem

from .operands import blocks_of

Share = tuple[slice, ...]  # global positions, in order, none of them empty
Placement = Callable[[int, int], tuple[Share, ...]]  # (length, ranks) -> the share of each rank


def contiguous(length: int, ranks: int) -> tuple[Share, ...]:
    """Rank r owns chunk r of R.

    Chunks differ by at most one position; a rank owns nothing where there are too few.
    Raises ValueError for a negative length or less than one rank.
    """
    return tuple(_joined([chunk]) for chunk in _chunks(length, ranks, 1))


def zigzag(length: int, ranks: int) -> tuple[Share, ...]:
    """Rank r owns the chunks r and 2R - 1 - r of 2R.

    Chunks differ by at most one position. Raises ValueError as ``contiguous`` does.
    """
    chunks = _chunks(length, ranks, 2)
    return tuple(_joined([chunks[r], chunks[-1 - r]]) for r in range(ranks))


PLACEMENTS: dict[str, Placement] = {"contiguous": contiguous, "zigzag": zigzag}


def _chunks(length: int, ranks: int, each: int) -> list[slice]:
    """The sequence cut into ``each`` chunks per rank."""
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: accepted is 1 or more")
    if length < 0:
        raise ValueError(f"length={length}: accepted is 0 or more")
    count = each * ranks
    bounds = [length * n // count for n in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _joined(chunks: Iterable[slice]) -> Share:
    """Chunks in order, without empty ones; neighbours as one."""
    share: list[slice] = []
    for chunk in chunks:
        if share and share[-1].stop == chunk.start:
            share[-1] = slice(share[-1].start, chunk.stop)
        else:
            share.append(chunk)
    return tuple(part for part in share if part.start < part.stop)


def size(share: Share) -> int:
    """Positions of a share."""
    return sum(part.stop - part.start for part in share)


def clipped(share: Share, length: int) -> Share:
    """What of a share lies before ``length``: the beginning of what its rank holds."""
    ends = (slice(part.start, min(part.stop, length)) for part in share)
    return tuple(part for part in ends if part.start < part.stop)


def local(share: Share, part: slice) -> slice:
    """Where the rank that holds a share keeps ``part`` of it; IndexError if it does not."""
    at = 0
    for held in share:
        if held.start <= part.start and part.stop <= held.stop:
            return slice(at + part.start - held.start, at + part.stop - held.start)
        at += held.stop - held.start
    raise IndexError(f"{part} is not within one part of {share}")


def blocks_within(share: Share, block: int) -> Iterator[slice]:
    """Slices of at most ``block`` positions that cover a share."""
    for part in share:
        yield from blocks_of(part, block)


def positions(
    lengths: int | Sequence[int], ranks: int, rank: int, placement: Placement = zigzag
) -> Tensor:
    """The global positions that a rank owns, int64 (n,), in the order in which it holds them.

    ``lengths``: that of the sequence, or those of sequences packed one after another, each of
    which is shared out by itself. ``q[:, :, positions(…)]`` is the shard of q.
    """
    lengths = (lengths,) if isinstance(lengths, int) else lengths
    start, found = 0, [torch.empty(0, dtype=torch.int64)]
    for length in lengths:
        for part in placement(length, ranks)[rank]:
            found.append(torch.arange(start + part.start, start + part.stop))
        start += length
    return torch.cat(found)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What each rank computes in each turn, int64 (ranks, turns).

    ``scores``: pairs of a query and a key that it may see; ``tiles``: tiles with such a pair.
    """

    scores: Tensor
    tiles: Tensor


def work(
    problem: Problem,
    ranks: int,
    placement: Placement = zigzag,
    block_q: int = 64,
    block_k: int = 64,
) -> Work:
    """The work of a ring over (seqlen_q, seqlen_k), as causality and window allow it: rank r in
    turn t computes its rows against the keys of rank (r - t) mod R."""
    lengths = problem.seqlen_q, problem.keys
    rows, keys = (placement(length, ranks) for length in lengths)
    rule = positional_mask(problem, *lengths)
    scores = torch.zeros(ranks, ranks, dtype=torch.int64)
    tiles = torch.zeros_like(scores)
    for rank in range(ranks):
        for turn in range(ranks):
            for part in blocks_within(rows[rank], block_q):
                i = torch.arange(part.start, part.stop)[:, None]
                for other in blocks_within(keys[(rank - turn) % ranks], block_k):
                    seen = int(rule(i, torch.arange(other.start, other.stop)[None, :]).sum())
                    scores[rank, turn] += seen
                    tiles[rank, turn] += seen > 0
    return Work(scores=scores, tiles=tiles)


def imbalance(counts: Tensor) -> float:
    """The busiest over the mean, of counts by rank: 1 when all do the same; 1 for no work."""
    mean = counts.double().mean().item()
    return counts.max().item() / mean if mean else 1.0
