"""What splits of the keys found for the same rows, merged (Dao et al. 2023, Flash-Decoding).

The states of an online softmax form a monoid; (out, lse) of a split is one, normalised.
"""

import triton
import triton.language as tl

from .tensors import load_rows, store_rows

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["rows", "splits"])
def combine(
    partial_out, partial_lse, out, lse, rows, splits,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (rows, WIDTH) and lse (rows,) from partial_out (splits, rows, WIDTH) and partial_lse.

    All are contiguous; a split without a visible key has the LSE -inf. Grid: blocks of rows.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, PADDED], tl.float32)
    at_split = row
    for _ in range(splits):
        found = tl.load(partial_lse + at_split, mask=inside, other=float("-inf")) * LOG2_E
        o = load_rows(partial_out, at_split * WIDTH, 1, inside, WIDTH, PADDED)
        m_new = tl.maximum(m, found)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        old, new = tl.exp2(m - shift), tl.exp2(found - shift)
        l = l * old + new
        acc = acc * old[:, None] + o * new[:, None]
        m = m_new
        at_split += rows
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    store_rows(acc / l[:, None], out, row * WIDTH, 1, inside, WIDTH, PADDED)
    tl.store(lse + row, (m + tl.log2(l)) * LN_2, mask=inside)
