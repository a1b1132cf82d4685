"""FlashAttention V1, forward, as the first paper has it (Dao et al. 2022, arXiv 2205.14135,
algorithm 1): blocks of keys outside, blocks of rows inside.

The rows change in the inner loop, so that O, l and m of every row are read, rescaled and written
once per block of keys. O is normalised each time. It is here to be compared with V2, not for speed.
"""

import triton
import triton.language as tl

from .tensors import at, load_rows, store_rows


@triton.jit
def scores(products, i, j, diagonal, seqlen_q, seqlen_k, scale, CAUSAL: tl.constexpr):
    """scale q·k, -inf where a key is hidden."""
    seen = (i < seqlen_q) & (j < seqlen_k)
    if CAUSAL:
        seen &= j <= i + diagonal
    return tl.where(seen, products * scale, float("-inf"))


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "diagonal", "heads"])
def forward(
    q, k, v, out, l, m, scale, seqlen_q, seqlen_k, diagonal, heads,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, PRODUCTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, HEAD_DIM_V: tl.constexpr, PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (batch, head, row, column) fp32, l and m (batch, head, row) fp32.

    Grid: heads x batch: nothing else is parallel, as all rows change in every step.
    """
    head, batch = tl.program_id(0) % heads, tl.program_id(0) // heads
    q_start, out_start = at(q, batch, head), at(out, batch, head)
    k_start, v_start = at(k, batch, head // GROUP), at(v, batch, head // GROUP)
    l_start, m_start = at(l, batch, head), at(m, batch, head)
    for row in range(0, seqlen_q, BLOCK_M):  # line 2
        i = row + tl.arange(0, BLOCK_M)
        wide_i, inside = i.to(tl.int64), i < seqlen_q
        zeros = tl.zeros([BLOCK_M, PADDED_V], tl.float32)
        store_rows(zeros, out_start, wide_i * out.row, out.column, inside, HEAD_DIM_V, PADDED_V)
        tl.store(l_start + wide_i * l.row, tl.zeros([BLOCK_M], tl.float32), mask=inside)
        lowest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        tl.store(m_start + wide_i * m.row, lowest, mask=inside)
    tl.debug_barrier()  # before other threads of this block read it
    for key in range(0, seqlen_k, BLOCK_N):  # line 5
        j = key + tl.arange(0, BLOCK_N)
        wide_j = j.to(tl.int64)
        k_j = load_rows(k_start, wide_j * k.row, k.column, j < seqlen_k, HEAD_DIM, PADDED)  # line 6
        v_j = load_rows(v_start, wide_j * v.row, v.column, j < seqlen_k, HEAD_DIM_V, PADDED_V)
        for row in range(0, seqlen_q, BLOCK_M):  # line 7
            i = row + tl.arange(0, BLOCK_M)
            wide_i, inside = i.to(tl.int64), i < seqlen_q
            q_i = load_rows(q_start, wide_i * q.row, q.column, inside, HEAD_DIM, PADDED)  # line 8
            o_i = load_rows(out_start, wide_i * out.row, out.column, inside, HEAD_DIM_V, PADDED_V)
            l_i = tl.load(l_start + wide_i * l.row, mask=inside, other=0.0)
            m_i = tl.load(m_start + wide_i * m.row, mask=inside, other=float("-inf"))
            products = tl.dot(q_i, tl.trans(k_j), input_precision=PRODUCTS)  # line 9
            s = scores(
                products, i[:, None], j[None, :], diagonal, seqlen_q, seqlen_k, scale, CAUSAL
            )
            m_tile = tl.max(s, 1)  # line 10
            p = tl.exp(s - finite(m_tile)[:, None])
            l_tile = tl.sum(p, 1)
            m_new = tl.maximum(m_i, m_tile)  # line 11
            old, new = tl.exp(m_i - finite(m_new)) * l_i, tl.exp(m_tile - finite(m_new))
            l_new = old + new * l_tile
            pv = tl.dot(p.to(v_j.dtype), v_j, input_precision=PRODUCTS)  # line 12
            o_i = old[:, None] * o_i + new[:, None] * pv
            o_i = o_i / tl.where(l_new == 0.0, 1.0, l_new)[:, None]
            store_rows(o_i, out_start, wide_i * out.row, out.column, inside, HEAD_DIM_V, PADDED_V)
            tl.store(l_start + wide_i * l.row, l_new, mask=inside)  # line 13
            tl.store(m_start + wide_i * m.row, m_new, mask=inside)
        # What other threads of this block wrote is read again for the next keys.
        tl.debug_barrier()


@triton.jit
def finite(m):
    """A maximum that can be subtracted: 0 for rows that have seen no key."""
    return tl.where(m == float("-inf"), 0.0, m)
