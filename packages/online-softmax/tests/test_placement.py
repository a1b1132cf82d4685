"""Who owns what on a ring, and how evenly that spreads the work."""

from __future__ import annotations

import pytest
import torch

from attn_reference import Problem
from attn_reference.masks import positional_mask
from online_softmax.placement import (
    PLACEMENTS,
    Placement,
    clipped,
    contiguous,
    imbalance,
    local,
    positions,
    size,
    work,
    zigzag,
)

EVERY = pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
CAUSAL = Problem(seqlen_q=2048, causal="bottom-right")


@EVERY
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 16, 17, 63, 1000])
def test_every_position_has_one_owner(placement: Placement, ranks: int, length: int) -> None:
    shares = placement(length, ranks)
    assert len(shares) == ranks
    owned = [i for share in shares for part in share for i in range(part.start, part.stop)]
    assert sorted(owned) == list(range(length))
    for share in shares:
        assert all(part.start < part.stop for part in share)
        ends = [end for part in share for end in (part.start, part.stop)]
        assert ends == sorted(set(ends))  # in order, and neighbours are joined
    most = max(size(share) for share in shares)
    assert most - min(size(share) for share in shares) <= len(PLACEMENTS)


def test_contiguous_gives_each_rank_a_chunk() -> None:
    assert contiguous(9, 3) == ((slice(0, 3),), (slice(3, 6),), (slice(6, 9),))


def test_zigzag_gives_each_rank_a_chunk_from_each_end() -> None:
    assert zigzag(12, 3) == (
        (slice(0, 2), slice(10, 12)),
        (slice(2, 4), slice(8, 10)),
        (slice(4, 8),),  # the two in the middle touch
    )


@EVERY
def test_what_cannot_be_placed_is_a_value_error(placement: Placement) -> None:
    with pytest.raises(ValueError, match="ranks=0"):
        placement(4, 0)
    with pytest.raises(ValueError, match="length=-1"):
        placement(-1, 2)


def test_local_says_where_a_rank_keeps_a_part() -> None:
    share = zigzag(12, 3)[0]
    assert local(share, slice(1, 2)) == slice(1, 2)
    assert local(share, slice(11, 12)) == slice(3, 4)
    for elsewhere in (slice(2, 3), slice(1, 11)):
        with pytest.raises(IndexError):
            local(share, elsewhere)


@EVERY
@pytest.mark.parametrize("length", [0, 1, 5, 11, 12])
def test_clipped_shares_begin_as_the_whole_ones(placement: Placement, length: int) -> None:
    shares = placement(12, 3)
    kept = [clipped(share, length) for share in shares]
    assert sum(map(size, kept)) == length
    for share, less in zip(shares, kept, strict=True):
        for part in less:
            assert local(less, part) == local(share, part)


def test_positions_of_packed_sequences_are_shared_out_one_by_one() -> None:
    found = [positions((4, 0, 9), 2, rank).tolist() for rank in range(2)]
    assert found == [[0, 3, 4, 5, 10, 11, 12], [1, 2, 6, 7, 8, 9]]
    assert positions(0, 2, 1).tolist() == []


@EVERY
@pytest.mark.parametrize(
    "problem",
    [
        CAUSAL.replace(seqlen_q=70, seqlen_k=150),
        CAUSAL.replace(seqlen_q=150, seqlen_k=70, causal="top-left"),
        Problem(seqlen_q=90, window=(20, 3)),
        Problem(seqlen_q=3, seqlen_k=5),
        Problem(seqlen_q=0, seqlen_k=5),
    ],
    ids=lambda problem: problem.id,
)
def test_the_work_of_all_ranks_is_that_of_the_mask(placement: Placement, problem: Problem) -> None:
    lengths = problem.seqlen_q, problem.keys
    seen = positional_mask(problem, *lengths).dense(*lengths)
    found = work(problem, 3, placement, block_q=16, block_k=8)
    assert found.scores.sum() == seen.sum()
    # In turn t rank r has its rows and the keys of rank (r - t) mod R.
    for rank in range(3):
        rows = positions(lengths[0], 3, rank, placement)
        for turn in range(3):
            keys = positions(lengths[1], 3, (rank - turn) % 3, placement)
            assert found.scores[rank, turn] == seen[rows][:, keys].sum()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_zigzag_balances_causal_work_and_contiguous_does_not(ranks: int) -> None:
    even, uneven = (work(CAUSAL, ranks, place) for place in (zigzag, contiguous))
    # The last of R contiguous ranks does 2 - 1/R times the mean.
    assert imbalance(uneven.scores.sum(1)) == pytest.approx(2 - 1 / ranks, abs=0.01)
    assert imbalance(even.scores.sum(1)) < 1.001
    # In tiles, which on the diagonal are computed whole.
    assert imbalance(uneven.tiles.sum(1)) > 1.4
    assert imbalance(even.tiles.sum(1)) == 1
    # Ranks wait for each other at the end of every turn, so that each has to be balanced.
    for turn in range(ranks):
        assert imbalance(even.scores[:, turn]) < 1.01
    assert imbalance(uneven.scores[:, ranks - 1]) == pytest.approx(ranks, abs=0.1)


def test_without_a_mask_contiguous_is_balanced_too() -> None:
    for place in (zigzag, contiguous):
        assert imbalance(work(Problem(seqlen_q=1024), 4, place).scores.sum(1)) == 1


def test_no_work_is_balanced() -> None:
    assert imbalance(torch.zeros(4)) == 1
