"""The heat map says where the error lies."""

from __future__ import annotations

import math

import pytest
import torch

from attn_reference.problem import Problem
from attnproof.diagnosis.heat_map import canonical, glyph, heat_map, where


def test_blocks_of_rows_and_heads_are_shaded_by_their_worst_error() -> None:
    error = torch.full((1, 3, 130, 8), 0.1)
    error[0, 1, 128:, 5] = 3.0
    error[0, 2, 0, 0] = 1e6
    drawn = heat_map(Problem(), error).splitlines()
    assert drawn[0] == "error over budget of out: query rows down, heads across"
    assert drawn[1].split() == ["head", "0", "1", "2"]
    rows = {line.split()[0]: line.split()[1] for line in drawn[2:-1]}
    assert len(rows) == 17
    assert rows["0-7"] == "······███"
    assert rows["64-71"] == "·········"
    assert rows["128-129"] == "···▒▒▒···"
    assert "up to 1 (honest)" in drawn[-1]


def test_batch_entries_stand_side_by_side() -> None:
    error = torch.zeros(2, 2, 4, 8)
    error[1, 0] = 2.0
    drawn = heat_map(Problem(), error).splitlines()
    assert drawn[1].split() == ["b0", "b1"]
    assert drawn[3].split() == ["0", "······", "▒▒▒···"]


def test_many_batch_entries_and_heads_are_merged_and_said_to_be() -> None:
    error = torch.zeros(9, 100, 4, 8)
    error[8, 99, 3, 0] = math.nan
    drawn = heat_map(Problem(), error).splitlines()
    assert drawn[-2].endswith("!")
    assert drawn[-2].count("·") == 49
    assert "the worst of 9 batch entries" in drawn[-1]
    assert "each column 2 heads" in drawn[-1]


def test_key_shaped_and_smaller_tensors() -> None:
    assert "key rows" in heat_map(Problem(), torch.zeros(1, 1, 2, 2), "dk")
    assert "query rows" in heat_map(Problem(), torch.zeros(1, 1, 2), "lse")
    assert canonical(torch.zeros(5)).shape == (1, 5, 1, 1)
    assert heat_map(Problem(), torch.zeros(1, 0, 2, 2)) == ""
    with pytest.raises(ValueError, match="2 dimensions; accepted are 4, 3"):
        canonical(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "·"), (0.5, "·"), (1.0, "░"), (1.01, "▒"), (32.0, "▓"), (1e9, "█"), (math.inf, "!")],
)
def test_limits_of_the_shades(value: float, expected: str) -> None:
    assert glyph(value) == expected


def test_where_names_what_is_over_budget() -> None:
    error = torch.zeros(2, 4, 130, 8)
    assert where(error) == ""
    error[:, 1, 64:, :] = 2.0
    error[:, 3, 5, :] = math.nan
    assert where(error) == (
        "over budget: all 2 batch entries, heads 1, 3 of 4, rows 5, 64-129 of 130 "
        "(12.9 % of its elements)"
    )
    error = torch.zeros(1, 1, 16, 8)
    error[..., 4] = 2.0
    assert where(error, "dk").startswith("over budget: all 16 keys, columns 4 of 8")
