from __future__ import annotations

import pytest
import torch

from attn_reference.problem import Problem
from attnproof.layout import GAP_ELEMENTS, expanded_shape, strides_for

SHAPE = (2, 3, 5, 4)


@pytest.mark.parametrize(
    ("layout", "permutation"),
    [
        ("bhsd", (0, 1, 2, 3)),
        ("bshd", (0, 2, 1, 3)),
        ("sbhd", (2, 0, 1, 3)),
        ("bhds", (0, 1, 3, 2)),
    ],
)
def test_strides_are_those_of_a_permuted_contiguous_tensor(layout, permutation):
    physical = torch.empty([SHAPE[d] for d in permutation])
    expected = physical.permute([permutation.index(d) for d in range(4)]).stride()

    assert strides_for(SHAPE, layout) == (expected, physical.numel(), 0)


def test_offset_moves_the_first_element():
    assert strides_for(SHAPE, "bhsd+offset") == ((60, 20, 4, 1), 120, 1)


def test_gap_separates_rows_but_does_not_follow_the_last():
    row = 4 + GAP_ELEMENTS
    strides, extent, offset = strides_for(SHAPE, "bhsd+gap")

    assert strides == (15 * row, 5 * row, row, 1)
    assert (extent, offset) == (30 * row - GAP_ELEMENTS, 0)


def test_gap_of_a_strided_head_dimension_lies_between_its_columns():
    strides, _, _ = strides_for(SHAPE, "bhds+gap")

    assert strides[2:] == (1, 5 + GAP_ELEMENTS)


def test_expand_gives_dimensions_of_size_one_stride_zero():
    assert strides_for((1, 3, 1, 4), "expand") == ((0, 4, 0, 1), 12, 0)
    assert strides_for((1, 3, 1, 4), "bhsd+expand") == strides_for((1, 3, 1, 4), "expand")


def test_fewer_dimensions_read_the_letters_that_they_have():
    assert strides_for((2, 3, 5), "bshd") == ((15, 1, 3), 30, 0)
    assert strides_for((7,), "sbhd") == ((1,), 7, 0)


@pytest.mark.parametrize("layout", ["bhsd", "bshd+gap", "bhds"])
def test_an_empty_tensor_takes_no_room(layout):
    assert strides_for((2, 3, 0, 4), layout)[1] == 0


@pytest.mark.parametrize("layout", ["bhsd", "sbhd+gap+offset", "bhds+offset", "bshd"])
def test_elements_do_not_overlap_and_fill_the_extent(layout):
    strides, extent, offset = strides_for(SHAPE, layout)
    storage = torch.zeros(offset + extent)
    storage.as_strided(SHAPE, strides, offset).add_(1)

    assert storage.max() == 1
    assert storage.sum() == 120
    assert storage[-1] == 1


@pytest.mark.parametrize(
    ("layout", "named"),
    [("bhs", "'bhs'"), ("bhsx", "'bhsx'"), ("", "''"), ("bhsd+holes", "'+holes'"),
     ("bhsd+gap+gap", "'+gap'"), ("bhsd+", "'+'")],
)  # fmt: skip
def test_an_unknown_layout_is_named_with_what_is_accepted(layout, named):
    with pytest.raises(ValueError, match="accepted is an order of the letters bhsd") as error:
        strides_for(SHAPE, layout)
    assert named in str(error.value)


def test_too_many_dimensions_are_refused():
    with pytest.raises(ValueError, match="at most 4 dimensions"):
        strides_for((1, 2, 3, 4, 5), "bhsd")


def test_expanded_shape_is_the_full_one():
    problem = Problem(
        batch=2, heads_q=3, seqlen_q=5, seqlen_k=7, mask="x", mask_shape="11qk",
        layouts=(("mask", "expand"), ("q", "bshd")),
    )  # fmt: skip

    assert expanded_shape(problem, "mask") == (2, 3, 5, 7)
    assert expanded_shape(problem, "q") is None


def test_expand_is_for_mask_and_bias():
    with pytest.raises(ValueError, match="of q: \\+expand is for mask and bias"):
        expanded_shape(Problem(layouts=(("q", "bhsd+expand"),)), "q")


@pytest.mark.parametrize(("layout", "dim"), [("bhsd+far", 0), ("sbhd+far", 2), ("hbsd+far", 1)])
def test_far_spreads_the_outermost_dimension_beyond_32_bits(layout, dim):
    strides, extent, _ = strides_for(SHAPE, layout)

    assert (SHAPE[dim] - 1) * strides[dim] >= 1 << 31
    assert strides[dim] % 64 == 0
    assert extent > 1 << 31


def test_far_spreads_the_outermost_dimension_that_has_several_entries():
    strides, _, _ = strides_for((1, 3, 5, 4), "bhsd+far")

    assert 2 * strides[1] >= 1 << 31
