"""FlashAttention V1: outer loop over K and V, inner loop over Q and O (Dao et al. 2022, arXiv
2205.14135, algorithms 1 and 4).

S and P never leave the chip. The price: O, l and m of every row are read, rescaled and written
once per block of keys, because the rows change in the inner loop.
"""

from __future__ import annotations

import torch

from .arithmetic import E
from .gradients import Backward
from .memory import HbmTensor
from .operands import Operands, blocks
from .state import State, lse


def forward(
    x: Operands, block_q: int, block_k: int
) -> tuple[HbmTensor, HbmTensor, HbmTensor, HbmTensor]:
    """out, lse, l and m, (Hkv, G, Lq, …), in HBM. O is in fp32 there, and always normalised."""
    out = x.allocate("O", x.len_q, x.sequence.v.shape[-1])
    l, m = x.allocate("l", x.len_q, vector=True), x.allocate("m", x.len_q, vector=True)
    for rows in blocks(x.len_q, block_q):  # line 2
        start = x.start(rows)
        out.store(start.o, rows)
        l.store(start.d, rows)
        m.store(start.m, rows)
    for keys in blocks(x.len_k, block_k):  # line 5
        k, v = x.k.load(keys), x.v.load(keys)
        for rows in blocks(x.len_q, block_q):  # line 7
            q, o_i = x.q.load(rows), out.load(rows)
            l_i, m_i = l.load(rows), m.load(rows)
            s = x.rule.tile(q @ k.mT, rows, keys).scores  # line 9
            m_tile = s.amax(-1)  # line 10
            p = E.rescale(s, m_tile[..., None])
            l_tile = p.sum(-1)
            m_new = torch.maximum(m_i, m_tile)  # line 11
            old, new = E.rescale(m_i, m_new) * l_i, E.rescale(m_tile, m_new)
            l_new = old + new * l_tile
            pv = x.operand(x.dropped(p, rows, keys)) @ v
            o_i = old[..., None] * o_i + new[..., None] * pv  # line 12
            out.store(o_i / l_new.masked_fill(l_new == 0, 1.0)[..., None], rows)
            l.store(l_new, rows)  # line 13
            m.store(m_new, rows)
    answer = x.allocate("LSE", x.len_q, vector=True)
    answer.data.copy_(lse(State(m=m.data, d=l.data)))  # the paper hands on l and m instead
    return out, answer, l, m


def backward(
    x: Operands, g: Backward, l: HbmTensor, m: HbmTensor, block_q: int, block_k: int
) -> None:
    """dQ, dK and dV (and dBias, dSinks) into ``g``. S and P are computed again from l and m."""
    scale = x.problem.softmax_scale
    for rows in blocks(x.len_q, block_q):  # line 5
        g.dq.store(torch.zeros_like(g.dq.data[..., rows, :]), rows)
    for keys in blocks(x.len_k, block_k):  # line 6
        k, v = x.k.load(keys), x.v.load(keys)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for rows in blocks(x.len_q, block_q):  # line 9
            q, o, grad_out = x.q.load(rows), g.out.load(rows), g.grad_out.load(rows)
            dq, l_i, m_i = g.dq.load(rows), l.load(rows), m.load(rows)
            tile = x.rule.tile(q @ k.mT, rows, keys)  # lines 11 to 13
            p = E.rescale(tile.scores, m_i[..., None]) / l_i.masked_fill(l_i == 0, 1.0)[..., None]
            dropped = x.operand(x.dropped(p, rows, keys))  # lines 14, 15
            dv = dv + g.over_group(dropped.mT @ grad_out)  # line 16
            dp = x.dropped(grad_out @ v.mT, rows, keys)  # lines 17, 18
            slack = g.slack(rows, grad_out, o)  # line 19, for every tile anew
            ds = p * (dp + slack[..., None])  # line 20
            g.add_bias(ds, rows, keys)
            ds = x.operand(ds if tile.slope is None else ds * tile.slope)
            g.dq.store(dq + ds @ k * scale, rows)  # line 21
            dk = dk + g.over_group(ds.mT @ q) * scale  # line 22
        g.dk.store(dk, keys)  # line 24
        g.dv.store(dv, keys)
    if g.dsinks is not None:
        for rows in blocks(x.len_q, block_q):
            slack = g.slack(rows, g.grad_out.load(rows), g.out.load(rows))
            g.add_sinks(g.lse.load(rows), slack)
