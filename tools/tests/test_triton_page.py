"""docs/triton.md shows the inner loops as they are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "packages/triton/src/triton_attention/kernels"
PAGE = (ROOT / "docs/triton.md").read_text("utf-8")


def rows():
    """(what, code of V1, code of V2) of the table of the inner loops."""
    table = PAGE.split("## The inner loops, side by side")[1].split("\n\n")[2]
    for line in table.splitlines()[2:]:
        what, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        yield what.strip("| "), *(re.findall(r"`([^`]+)`", cell) for cell in cells)


@pytest.mark.parametrize(("version", "column"), [("v1", 1), ("v2", 2)])
def test_every_line_of_the_table_is_in_the_kernel(version, column):
    source = (KERNELS / f"{version}_forward.py").read_text("utf-8")
    fragments = [fragment for row in rows() for fragment in row[column]]
    assert len(fragments) >= 10
    assert [fragment for fragment in fragments if fragment not in source] == []
