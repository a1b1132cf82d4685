"""Ring attention: R ranks hold a share of the rows each, and pass the keys around (Liu, Zaharia
& Abbeel 2023, arXiv 2310.01889).

In turn t rank r computes its rows against the keys of rank (r - t) mod R and hands those keys on
to rank r + 1. What it knows of its rows, the state (m, d, o), stays with it from turn to turn;
that the states merge in any order is all that makes the ring right. In the backward pass dQ
stays with its rows, and dK and dV travel along with their keys, gathering what each rank adds.

Here all ranks live in one process and one memory, and take their turns one after another. What a
rank does in a turn is written once, for these ranks and for those of ``ring_distributed``.
"""

from __future__ import annotations

import torch

from .gradients import Backward
from .memory import HbmTensor
from .operands import Operands
from .placement import Placement, Share, blocks_within, zigzag
from .state import State, lse, output
from .tiled_v2 import over_keys, over_rows, prepare


def turns(ranks: int) -> range:
    """The turns, from 0, in which every rank works on its own keys: the diagonal."""
    return range(ranks)


def owner(rank: int, turn: int, ranks: int) -> int:
    """Whose keys a rank works on in a turn."""
    return (rank - turn) % ranks


class States:
    """The states of the rows that a rank holds, in HBM between its turns."""

    def __init__(self, x: Operands) -> None:
        held = x.sequence.q.shape[1]
        self.m = x.allocate("m", held, vector=True)
        self.d = x.allocate("d", held, vector=True)
        self.o = x.allocate("O so far", held, x.sequence.v.shape[-1])

    def load(self, rows: slice) -> State:
        """The state of some rows, on the chip."""
        return State(m=self.m.load(rows), d=self.d.load(rows), o=self.o.load(rows))

    def store(self, state: State, rows: slice) -> None:
        """Back to HBM."""
        self.m.store(state.m, rows)
        self.d.store(state.d, rows)
        self.o.store(state.o, rows)


def forward(
    x: Operands, ranks: int, block_q: int, block_k: int, placement: Placement = zigzag
) -> tuple[HbmTensor, HbmTensor]:
    """out (Hkv, G, Lq, Dv), in the dtype of the inputs, and lse (Hkv, G, Lq), in HBM."""
    rows, keys = placement(x.len_q, ranks), placement(x.len_k, ranks)
    states = States(x)
    out = x.allocate("O", x.len_q, x.sequence.v.shape[-1], dtype=x.dtype)
    stored_lse = x.allocate("LSE", x.len_q, vector=True)
    for rank in range(ranks):
        start(x, states, rows[rank], block_q)
    for turn in turns(ranks):
        for rank in range(ranks):  # at once, on R devices
            attend(x, states, rows[rank], keys[owner(rank, turn, ranks)], block_q, block_k)
    for rank in range(ranks):
        finish(states, out, stored_lse, rows[rank], block_q)
    return out, stored_lse


def backward(
    x: Operands,
    g: Backward,
    ranks: int,
    block_q: int,
    block_k: int,
    placement: Placement = zigzag,
) -> None:
    """dQ, dK and dV (and dBias, dSinks) into ``g``. P is computed again from the LSE alone."""
    rows, keys = placement(x.len_q, ranks), placement(x.len_k, ranks)
    slack = x.allocate("D", x.len_q, vector=True)
    for rank in range(ranks):
        start_backward(g, slack, rows[rank], block_q)
        for gradient in (g.dk, g.dv):
            clear(gradient, keys[rank], block_k)
    for turn in turns(ranks):
        for rank in range(ranks):
            visiting = keys[owner(rank, turn, ranks)]
            attend_backward(x, g, slack, rows[rank], visiting, block_q, block_k)


# What one rank does. ``rows`` is its share of the queries, ``keys`` the share that visits it.


def start(x: Operands, states: States, rows: Share, block_q: int) -> None:
    """Before the first turn: no key, or the sink, which is there once."""
    for part in blocks_within(rows, block_q):
        states.store(x.start(part), part)


def attend(
    x: Operands, states: States, rows: Share, keys: Share, block_q: int, block_k: int
) -> None:
    """One turn: the rows see the keys that visit. Nothing is loaded for rows that see none."""
    for part in blocks_within(rows, block_q):
        seen = [c for c in blocks_within(keys, block_k) if not x.rule.none_visible(part, c)]
        if seen:
            states.store(over_keys(x, part, seen, states.load(part)), part)


def finish(
    states: States, out: HbmTensor, stored_lse: HbmTensor, rows: Share, block_q: int
) -> None:
    """After the last turn: one rescale."""
    for part in blocks_within(rows, block_q):
        state = states.load(part)
        out.store(output(state), part)
        stored_lse.store(lse(state), part)


def start_backward(g: Backward, slack: HbmTensor, rows: Share, block_q: int) -> None:
    """Before the first turn: dLSE - D of every row, dSinks, and dQ = 0."""
    prepare(g, slack, blocks_within(rows, block_q))


def attend_backward(
    x: Operands,
    g: Backward,
    slack: HbmTensor,
    rows: Share,
    keys: Share,
    block_q: int,
    block_k: int,
) -> None:
    """One turn: dQ of the rows, and dK and dV of the keys that visit, each added to what is
    there."""
    for these in blocks_within(keys, block_k):
        seen = [r for r in blocks_within(rows, block_q) if not x.rule.none_visible(r, these)]
        if not seen:
            continue
        dk, dv = g.dk.load(these), g.dv.load(these)
        dk, dv = over_rows(x, g, slack, these, seen, dk, dv)
        g.dk.store(dk, these)
        g.dv.store(dv, these)


def clear(tensor: HbmTensor, share: Share, block: int) -> None:
    """Zero in HBM, where a rank holds rows or keys."""
    for part in blocks_within(share, block):
        tensor.store(torch.zeros((), dtype=tensor.data.dtype, device=tensor.data.device), part)
