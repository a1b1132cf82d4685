"""Standard attention: S and P are written to HBM and read back (Dao et al. 2022, algorithm 0 and
the backward pass of appendix B.2).

Eight tensors go over the bus: Q and K in, S out, S in, P out, P and V in, O out. Two of them
have d columns for every row, the rest N: HBM sees Θ(Nd + N²) elements.
"""

from __future__ import annotations

import math

import torch

from .gradients import Backward
from .memory import HbmTensor
from .operands import Operands

ALL = slice(0, None)


def forward(x: Operands) -> tuple[HbmTensor, HbmTensor, HbmTensor]:
    """out, lse and P, each (Hkv, G, Lq, …) in HBM. S and P have the dtype of the inputs."""
    everything = slice(0, x.len_q), slice(0, x.len_k)
    s = x.allocate("S", x.len_q, x.len_k, dtype=x.dtype, vector=True)
    p = x.allocate("P", x.len_q, x.len_k, dtype=x.dtype, vector=True)
    out = x.allocate("O", x.len_q, x.sequence.v.shape[-1], dtype=x.dtype)
    lse = x.allocate("LSE", x.len_q, vector=True)

    q, k = x.q.load(ALL), x.k.load(ALL)  # line 1
    s.store(x.rule.tile(q @ k.mT, *everything).scores, *everything)

    scores = s.load(*everything)  # line 2
    start = x.start(everything[0], values=False)
    m = torch.maximum(start.m, scores.amax(-1)) if x.len_k else start.m
    shift = m.masked_fill(m == -math.inf, 0.0)
    weights = torch.exp(scores - shift[..., None])
    d = weights.sum(-1) + start.d * torch.exp(start.m - shift)
    p.store(weights / d.masked_fill(d == 0, 1.0)[..., None], *everything)
    lse.data.copy_(shift + d.log())  # the algorithm has no use for it: not counted as an access

    probabilities, v = x.dropped(p.load(*everything), *everything), x.v.load(ALL)  # line 3
    out.store(x.operand(probabilities) @ v, everything[0])
    return out, lse, p


def backward(x: Operands, g: Backward, p: HbmTensor) -> None:
    """dQ, dK and dV (and dBias, dSinks) into ``g``, from the P that forward left in HBM."""
    everything = slice(0, x.len_q), slice(0, x.len_k)
    dp = x.allocate("dP", x.len_q, x.len_k, dtype=x.dtype, vector=True)
    ds = x.allocate("dS", x.len_q, x.len_k, dtype=x.dtype, vector=True)

    probabilities, grad_out = p.load(*everything), g.grad_out.load(ALL)  # line 1
    dropped = x.operand(x.dropped(probabilities, *everything))
    g.dv.store(g.over_group(dropped.mT @ grad_out), ALL)

    grad_out, v = g.grad_out.load(ALL), x.v.load(ALL)  # line 2
    dp.store(grad_out @ v.mT, *everything)

    probabilities, dropped = p.load(*everything), x.dropped(dp.load(*everything), *everything)  # 3
    slack = g.with_lse(everything[0], -(probabilities * dropped).sum(-1))
    gradient = probabilities * (dropped + slack[..., None])
    g.add_bias(gradient, *everything)
    if g.dsinks is not None:
        g.add_sinks(g.lse.load(everything[0]), slack)
    if x.problem.softcap:
        q, k = x.q.load(ALL), x.k.load(ALL)
        slope = x.rule.tile(q @ k.mT, *everything).slope
        assert slope is not None
        gradient = gradient * slope
    ds.store(gradient, *everything)

    gradient, k = ds.load(*everything), x.k.load(ALL)  # line 4
    g.dq.store(gradient @ k * x.problem.softmax_scale, ALL)

    gradient, q = ds.load(*everything), x.q.load(ALL)  # line 5
    g.dk.store(g.over_group(gradient.mT @ q) * x.problem.softmax_scale, ALL)
