"""FlashAttention V2: outer loop over Q, inner loop over K and V (Dao 2023, arXiv 2307.08691,
algorithms 1 and 2).

The rows stay on the chip, so that O is written once, and divided by the row sum once, at the
end. Rows do not need each other: they are what thread blocks and warps share out among them.
Tiles that causality or a window hides altogether are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .arithmetic import Base, E
from .gradients import Backward
from .memory import HbmTensor
from .operands import Operands, blocks
from .state import State, absorb, lse, output


def forward(x: Operands, block_q: int, block_k: int) -> tuple[HbmTensor, HbmTensor]:
    """out (Hkv, G, Lq, Dv), in the dtype of the inputs, and lse (Hkv, G, Lq), in HBM."""
    out = x.allocate("O", x.len_q, x.sequence.v.shape[-1], dtype=x.dtype)
    stored_lse = x.allocate("LSE", x.len_q, vector=True)
    for rows in blocks(x.len_q, block_q):  # line 3
        state = over_keys(x, rows, blocks(x.len_k, block_k), x.start(rows))
        out.store(output(state), rows)  # lines 12, 14: one rescale
        stored_lse.store(lse(state), rows)  # lines 13, 15
    return out, stored_lse


def over_keys(
    x: Operands, rows: slice, parts: Iterable[slice], state: State, base: Base = E
) -> State:
    """The inner loop, lines 4 to 11: the state of some rows after some blocks of keys."""
    q = x.q.load(rows)
    for keys in parts:
        if x.rule.none_visible(rows, keys):
            continue
        scores = x.rule.tile(q @ x.k.load(keys).mT, rows, keys).scores
        v = x.v.load(keys)

        def product(p: Tensor, v: Tensor = v, keys: slice = keys) -> Tensor:
            return x.operand(x.dropped(p, rows, keys)) @ v

        state = absorb(state, base.scores(scores), product, base)
    return state


def backward(x: Operands, g: Backward, block_q: int, block_k: int) -> None:
    """dQ, dK and dV (and dBias, dSinks) into ``g``. P is computed again from the LSE alone."""
    slack = x.allocate("D", x.len_q, vector=True)
    prepare(g, slack, blocks(x.len_q, block_q))
    zero = torch.zeros((), dtype=x.compute, device=g.dk.data.device)
    for keys in blocks(x.len_k, block_k):  # line 6
        dk, dv = over_rows(x, g, slack, keys, blocks(x.len_q, block_q), zero, zero)
        g.dk.store(dk, keys)  # line 19
        g.dv.store(dv, keys)


def prepare(g: Backward, slack: HbmTensor, parts: Iterable[slice]) -> None:
    """Lines 4 and 5: dLSE - D of every row, once and not once per tile; dSinks; dQ = 0."""
    zero = torch.zeros((), dtype=g.dq.data.dtype, device=g.dq.data.device)
    for rows in parts:
        of_rows = g.slack(rows, g.grad_out.load(rows), g.out.load(rows))
        slack.store(of_rows, rows)
        if g.dsinks is not None:
            g.add_sinks(g.lse.load(rows), of_rows)
        g.dq.store(zero, rows)


def over_rows(
    x: Operands,
    g: Backward,
    slack: HbmTensor,
    keys: slice,
    parts: Iterable[slice],
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor]:
    """The inner loop, lines 7 to 18: what some blocks of rows add to dK, dV and, in HBM, to dQ."""
    scale = x.problem.softmax_scale
    k, v = x.k.load(keys), x.v.load(keys)
    for rows in parts:  # line 9
        if x.rule.none_visible(rows, keys):
            continue
        q, grad_out, dq = x.q.load(rows), g.grad_out.load(rows), g.dq.load(rows)
        tile = x.rule.tile(q @ k.mT, rows, keys)  # line 11
        p = torch.exp(tile.scores - shift(g.lse.load(rows))[..., None])  # line 12
        dropped = x.operand(x.dropped(p, rows, keys))
        dv = dv + g.over_group(dropped.mT @ grad_out)  # line 13
        dp = x.dropped(grad_out @ v.mT, rows, keys)  # line 14
        ds = p * (dp + slack.load(rows)[..., None])  # line 15
        g.add_bias(ds, rows, keys)
        ds = x.operand(ds if tile.slope is None else ds * tile.slope)
        g.dq.store(dq + ds @ k * scale, rows)  # line 16
        dk = dk + g.over_group(ds.mT @ q) * scale  # line 17
    return dk, dv


def shift(lse: Tensor) -> Tensor:
    """The LSE as something that can be subtracted: 0 for rows that saw no key."""
    return lse.masked_fill(lse == -math.inf, 0.0)
