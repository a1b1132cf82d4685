"""Split-KV, or flash-decoding: the keys are split among processors, and the parts merged.

With few queries and many keys there are too few rows to occupy a GPU. Each split runs the inner
loop of FlashAttention V2 over its share of the keys and writes its own out and LSE; a second
kernel merges them (Dao et al. 2023, "Flash-Decoding for long-context inference").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arithmetic import TWO
from .memory import HbmTensor
from .operands import Operands, blocks, blocks_of
from .state import State, lse, merge, output
from .tiled_v2 import over_keys


def forward(x: Operands, splits: int, block_q: int, block_k: int) -> tuple[HbmTensor, HbmTensor]:
    """out (Hkv, G, Lq, Dv) and lse (Hkv, G, Lq). The splits work in base 2, as kernels do."""
    dv = x.sequence.v.shape[-1]
    share = max(1, -(-x.len_k // (splits * block_k))) * block_k
    parts = list(blocks(x.len_k, share)) or [slice(0, 0)]
    partial = [x.allocate("partial O", x.len_q, dv) for _ in parts]
    partial_lse = [x.allocate("partial LSE", x.len_q, vector=True) for _ in parts]
    for n, part in enumerate(parts):  # the splits, in any order
        for rows in blocks(x.len_q, block_q):
            state = over_keys(x, rows, blocks_of(part, block_k), _start(x, rows, first=n == 0), TWO)
            partial[n].store(output(state), rows)
            partial_lse[n].store(lse(state, TWO), rows)
    out = x.allocate("O", x.len_q, dv, dtype=x.dtype)
    stored_lse = x.allocate("LSE", x.len_q, vector=True)
    for rows in blocks(x.len_q, block_q):  # the second kernel
        state = answered(partial[0].load(rows), partial_lse[0].load(rows))
        for n in range(1, len(parts)):
            state = merge(state, answered(partial[n].load(rows), partial_lse[n].load(rows)))
        out.store(output(state), rows)
        stored_lse.store(lse(state), rows)
    return out, stored_lse


def _start(x: Operands, rows: slice, first: bool) -> State:
    """Rows before any key, in base 2. A sink is there once: in the first split."""
    state = x.start(rows)
    if first:
        return State(m=TWO.scores(state.m), d=state.d, o=state.o)
    return State(m=torch.full_like(state.m, -math.inf), d=torch.zeros_like(state.d), o=state.o)


def answered(out: Tensor, lse: Tensor) -> State:
    """The state that an answer stands for: as much as one key of score lse and value out."""
    return State(m=lse, d=(lse != -math.inf).to(lse.dtype), o=out)
