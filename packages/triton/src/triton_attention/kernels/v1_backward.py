"""FlashAttention V1, backward (Dao et al. 2022, arXiv 2205.14135, algorithm 4): blocks of keys
outside, blocks of rows inside.

dQ of every row is read, added to and written once per block of keys, and D = rowsum(dO * O) is
computed anew in every step. S and P are computed again from l and m.
"""

import triton
import triton.language as tl

from .tensors import at, load_rows, store_rows
from .v1_forward import finite, scores


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "diagonal", "heads"])
def backward(
    q, k, v, out, l, m, grad_out, grad_lse, grad_q, grad_k, grad_v,
    scale, seqlen_q, seqlen_k, diagonal, heads,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, PRODUCTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, HEAD_DIM_V: tl.constexpr, PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_q (batch, head, row, column) fp32, grad_k and grad_v.

    ``heads`` are heads of keys, each with the GROUP query heads that read it. Grid: heads x batch.
    """
    kv_head, batch = tl.program_id(0) % heads, tl.program_id(0) // heads
    k_start, v_start = at(k, batch, kv_head), at(v, batch, kv_head)
    dk_start, dv_start = at(grad_k, batch, kv_head), at(grad_v, batch, kv_head)
    for member in range(GROUP):
        dq_start = at(grad_q, batch, kv_head * GROUP + member)
        for row in range(0, seqlen_q, BLOCK_M):  # line 5
            i = row + tl.arange(0, BLOCK_M)
            zeros = tl.zeros([BLOCK_M, PADDED], tl.float32)
            offsets = i.to(tl.int64) * grad_q.row
            store_rows(zeros, dq_start, offsets, grad_q.column, i < seqlen_q, HEAD_DIM, PADDED)
    tl.debug_barrier()  # before other threads of this block read it
    for key in range(0, seqlen_k, BLOCK_N):  # line 6
        j = key + tl.arange(0, BLOCK_N)
        wide_j, inside_j = j.to(tl.int64), j < seqlen_k
        k_j = load_rows(k_start, wide_j * k.row, k.column, inside_j, HEAD_DIM, PADDED)  # line 7
        v_j = load_rows(v_start, wide_j * v.row, v.column, inside_j, HEAD_DIM_V, PADDED_V)
        dk_j = tl.zeros([BLOCK_N, PADDED], tl.float32)  # line 8
        dv_j = tl.zeros([BLOCK_N, PADDED_V], tl.float32)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            q_start, out_start = at(q, batch, head), at(out, batch, head)
            g_start, dq_start = at(grad_out, batch, head), at(grad_q, batch, head)
            l_start, m_start = at(l, batch, head), at(m, batch, head)
            for row in range(0, seqlen_q, BLOCK_M):  # line 9
                i = row + tl.arange(0, BLOCK_M)
                wide_i, inside = i.to(tl.int64), i < seqlen_q
                q_i = load_rows(q_start, wide_i * q.row, q.column, inside, HEAD_DIM, PADDED)
                o_i = load_rows(
                    out_start, wide_i * out.row, out.column, inside, HEAD_DIM_V, PADDED_V
                )
                g_i = load_rows(
                    g_start, wide_i * grad_out.row, grad_out.column, inside, HEAD_DIM_V, PADDED_V
                )  # line 10
                dq_i = load_rows(
                    dq_start, wide_i * grad_q.row, grad_q.column, inside, HEAD_DIM, PADDED
                )
                l_i = tl.load(l_start + wide_i * l.row, mask=inside, other=0.0)
                m_i = tl.load(m_start + wide_i * m.row, mask=inside, other=float("-inf"))
                products = tl.dot(q_i, tl.trans(k_j), input_precision=PRODUCTS)  # line 11
                s = scores(
                    products, i[:, None], j[None, :], diagonal, seqlen_q, seqlen_k, scale, CAUSAL
                )  # line 12
                p = tl.exp(s - finite(m_i)[:, None]) / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
                dv_j += tl.dot(tl.trans(p.to(g_i.dtype)), g_i, input_precision=PRODUCTS)  # line 16
                dp = tl.dot(g_i, tl.trans(v_j), input_precision=PRODUCTS)  # line 17
                delta = tl.sum(g_i.to(tl.float32) * o_i.to(tl.float32), 1)  # line 19
                if grad_lse.ptr is not None:
                    lse_start = at(grad_lse, batch, head)
                    delta -= tl.load(lse_start + wide_i * grad_lse.row, mask=inside, other=0.0)
                ds = (p * (dp - delta[:, None])).to(q_i.dtype)  # line 20
                dq_i += tl.dot(ds, k_j, input_precision=PRODUCTS) * scale  # line 21
                store_rows(
                    dq_i, dq_start, wide_i * grad_q.row, grad_q.column, inside, HEAD_DIM, PADDED
                )
                dk_j += tl.dot(tl.trans(ds), q_i, input_precision=PRODUCTS) * scale  # line 22
            # What other threads of this block wrote is read again for the next keys.
        tl.debug_barrier()
        store_rows(dk_j, dk_start, wide_j * grad_k.row, grad_k.column, inside_j, HEAD_DIM, PADDED)
        store_rows(
            dv_j, dv_start, wide_j * grad_v.row, grad_v.column, inside_j, HEAD_DIM_V, PADDED_V
        )  # line 24
