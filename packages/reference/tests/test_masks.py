"""Masks: rules, composition, words and drawings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_reference import Problem, masks
from attn_reference.masks import Mask

RULES = {
    "full": masks.full(),
    "causal": masks.causal(),
    "shifted": masks.causal(2),
    "window": masks.window(1, 0, offset=1),
    "one-sided": masks.window(None, 1),
    "padding": masks.key_length(4),
    "documents": masks.documents([2, 3], [3, 2]),
    "tensor": masks.from_tensor(torch.tensor([[True, False] * 3] * 5)),
    "broadcast": masks.from_tensor(torch.tensor([[True], [False], [True], [True], [False]])),
}


def drawn(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def test_top_left_and_bottom_right():
    assert masks.causal(0).draw(3, 5) == drawn(
        """
        ■ · · · ·
        ■ ■ · · ·
        ■ ■ ■ · ·
        """
    )
    assert masks.causal(2).draw(3, 5) == drawn(
        """
        ■ ■ ■ · ·
        ■ ■ ■ ■ ·
        ■ ■ ■ ■ ■
        """
    )


def test_the_two_alignments_beside_each_other():
    assert masks.draw_alignments(2, 3).splitlines() == [
        "top-left: j <= i    bottom-right: j <= i + 1",
        "■ · ·               ■ ■ ·",
        "■ ■ ·               ■ ■ ■",
    ]
    assert "bottom-right: j <= i - 1" in masks.draw_alignments(3, 2)


def test_window_is_inclusive():
    assert masks.window(1, 2, offset=1).draw(4, 6) == drawn(
        """
        ■ ■ ■ ■ · ·
        · ■ ■ ■ ■ ·
        · · ■ ■ ■ ■
        · · · ■ ■ ■
        """
    )
    assert masks.window(None, 0).dense(3, 3).equal(masks.causal().dense(3, 3))
    assert masks.window(None, None).dense(3, 4).all()


def test_documents_see_themselves():
    assert masks.documents([2, 1], [1, 3]).draw(4, 5) == drawn(
        """
        ■ · · · ·
        ■ · · · ·
        · ■ ■ ■ ·
        · · · · ·
        """
    )
    with_empty = masks.documents([1, 0, 2])
    assert with_empty.dense(3, 3).tolist() == [
        [True, False, False],
        [False, True, True],
        [False, True, True],
    ]
    assert not masks.documents([]).dense(2, 2).any()


def test_documents_refuse_lengths_that_do_not_match():
    with pytest.raises(ValueError, match=r"lengths_k=\[1\]: accepted are 2 lengths"):
        masks.documents([1, 2], [1])
    with pytest.raises(ValueError, match="accepted are 0 or more"):
        masks.documents([1, -2])


def test_a_tensor_is_looked_up():
    visible = torch.rand(4, 6) < 0.5
    assert masks.from_tensor(visible).dense(4, 6).equal(visible)
    assert masks.from_tensor(visible[:1]).dense(3, 6).equal(visible[:1].expand(3, 6))
    with pytest.raises(IndexError):
        masks.from_tensor(visible).dense(5, 6)


@pytest.mark.parametrize("wrong", [torch.ones(2, 2), torch.ones(2, dtype=torch.bool)])
def test_a_tensor_must_be_a_boolean_matrix(wrong):
    with pytest.raises(ValueError, match=r"visible is torch.*accepted is torch.bool"):
        masks.from_tensor(wrong)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_a_boolean_matrix_of_any_part(name, device):
    rule = RULES[name]
    whole = rule.dense(5, 6, device)
    assert whole.dtype == torch.bool
    assert whole.shape == (5, 6)
    assert whole.device.type == device
    assert rule.rows(slice(2, 4), 6, device).equal(whole[2:4])


@settings(deadline=None)
@given(st.sampled_from(sorted(RULES)), st.sampled_from(sorted(RULES)))
def test_composition(one, other):
    a, b = RULES[one], RULES[other]
    x, y = a.dense(5, 6), b.dense(5, 6)
    assert (a & b).dense(5, 6).equal(x & y)
    assert (a | b).dense(5, 6).equal(x | y)
    assert (~a).dense(5, 6).equal(~x)
    assert (a & ~b | b & ~a).dense(5, 6).equal(x ^ y)


def test_masks_say_what_they_are():
    said = {
        str(masks.full()): "every key",
        str(masks.causal()): "keys j <= i",
        str(masks.causal(-2)): "keys j <= i - 2",
        str(masks.window(3, None, 1)): "a window (3, unbounded) around j = i + 1",
        str(masks.key_length(7)): "keys j < 7",
        str(masks.documents([2, 3])): "keys of the same document (lengths 2, 3)",
        str(masks.documents([2], [4])): "keys of the same document (lengths 2 queries and 4 keys)",
        str(RULES["tensor"]): "a tensor of 5 x 6, 15 of them visible",
        str(masks.causal() & ~masks.key_length(2)): "(keys j <= i and not keys j < 2)",
        str(masks.causal() | masks.key_length(2)): "(keys j <= i or keys j < 2)",
    }
    for found, expected in said.items():
        assert found == expected


def test_a_large_mask_is_drawn_in_cells():
    lines = masks.causal().draw(1000, 1000, width=5, height=5).splitlines()
    assert lines[0].startswith("1000 queries x 1000 keys, 200 x 200 to a cell")
    assert lines[1:] == ["▪ · · · ·", "■ ▪ · · ·", "■ ■ ▪ · ·", "■ ■ ■ ▪ ·", "■ ■ ■ ■ ▪"]


def test_a_drawing_never_holds_the_whole_mask():
    asked = []

    def visible(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        asked.append(len(i))
        return j <= i

    text = Mask(visible, "").draw(100, 7, width=3, height=8)
    assert max(asked) == 13
    assert len(text.splitlines()) == 1 + 8


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0)])
def test_an_empty_mask_draws_nothing(shape):
    assert masks.full().draw(*shape).strip() == ""


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (Problem(seqlen_q=2, seqlen_k=3), "every key"),
        (Problem(seqlen_q=2, seqlen_k=3, causal="top-left"), "keys j <= i"),
        (Problem(seqlen_q=2, seqlen_k=3, causal="bottom-right"), "keys j <= i + 1"),
        (Problem(seqlen_q=2, seqlen_k=3, window=(1, 0)), "a window (1, 0) around j = i + 1"),
        (
            Problem(seqlen_q=2, seqlen_k=3, window=(1, None), causal="top-left"),
            "(keys j <= i and a window (1, unbounded) around j = i)",
        ),
    ],
)
def test_the_rule_of_a_problem(problem, expected):
    assert str(masks.positional_mask(problem, 2, 3)) == expected
