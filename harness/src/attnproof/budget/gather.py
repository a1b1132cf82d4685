"""From the score-shaped gradients of a chunk to dq, dk, dv, dbias and dsinks.

Each is a product or a sum, whose terms carry the errors of what goes in and of the adding;
docs/error-budget.md, "Gradients".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_reference.inputs import key_count, output_shape
from attn_reference.scores import EVERYTHING, KeyHead
from attn_reference.sequences import cut

from .backward import Backward
from .forward import Forward
from .ledger import Ledger, sum_of
from .units import LARGEST, OVERFLOW, Units, block_sums

STORES = "16-bit sums and stores"


def add_dq(ledger: Ledger, head: KeyHead, f: Forward, b: Backward, units: Units) -> None:
    """dQ = scale dS K for these query rows."""
    place, rows = head.sequence.rows, (f.chunk.query_heads, f.chunk.rows)
    size, scale = head.k.abs(), units.scale
    gamma = units.gamma(head.sequence.len_k, 8) + units.u_operand
    ledger.value[place][rows] = head.problem.softmax_scale * (b.ds @ head.k)
    ledger.touched[place][rows] = ~f.empty[..., None]
    ledger.excused[place][rows] = b.excused[..., None]
    for name, term in ledger.grouped(b.ds_terms):
        ledger.term(name)[place][rows] += scale * (term @ size)
    reach = b.ds.abs() + sum_of(b.ds_terms)
    ledger.term("accumulation")[place][rows] += scale * gamma * (reach @ size)
    if units.u_sum["dq"]:
        lost, largest = block_sums(scale * b.ds, head.k, units.block, units.u_sum["dq"])
        blocks = -(-head.k.shape[0] // units.block)
        ledger.term(STORES)[place][rows] += lost + blocks * units.eta_sum["dq"]
        ledger.excused[place][rows] |= largest >= OVERFLOW * units.largest_sum["dq"]


def add_dbias(ledger: Ledger, head: KeyHead, f: Forward, b: Backward, units: Units) -> None:
    """dBias = G, summed where the bias broadcasts."""
    block, index = head.sequence.block, (f.chunk.query_heads, f.chunk.rows, EVERYTHING)

    def part(tensor: Tensor) -> Tensor:
        found = cut(cut(tensor, block), index)
        assert found is not None
        return found

    seen = f.chunk.visible
    value = part(ledger.value)
    shape = value.shape
    value += b.g.sum_to_size(shape)
    for mask, where in ((ledger.touched, seen), (ledger.excused, seen & b.excused[..., None])):
        marked = part(mask)
        marked |= where.double().sum_to_size(shape) > 0
    terms = dict(b.g_terms)
    reach = b.g.abs() + sum_of(terms)
    everything = math.prod((*output_shape(head.problem)[:3], key_count(head.problem)))
    shares = everything // max(1, ledger.value.numel())
    if shares > 1:  # each share of a broadcast bias is stored before the sum
        terms[STORES] = units.u_out * reach + units.eta_out * seen.double()
    terms["accumulation"] = units.gamma(shares, 8) * reach
    for name, term in terms.items():
        gathered = part(ledger.term(name))
        gathered += term.sum_to_size(shape)


def add_dsinks(ledger: Ledger, head: KeyHead, f: Forward, b: Backward, units: Units) -> None:
    """dSinks = Σ P_sink (dLSE - Δ) over rows and batch."""
    assert b.sinks is not None
    assert b.sink_error is not None
    heads = f.chunk.query_heads
    gamma = units.gamma(head.problem.batch * head.sequence.len_q, 8) + units.u_s
    ledger.value[heads] += b.sinks.sum(-1)
    ledger.touched[heads] = True
    ledger.excused[heads] |= b.excused.any(-1)
    ledger.term("rows")[heads] += b.sink_error.sum(-1)
    ledger.term("accumulation")[heads] += gamma * (b.sinks.abs() + b.sink_error).sum(-1)


class KeySums:
    """dK or dV of one key/value head: leftᵀ right summed over query rows, by query head.

    Chunks of rows come in order; a 16-bit accumulator is rounded after each block of rows. With
    more than one query head, the share of each is stored before they are added.
    """

    def __init__(
        self, ledger: Ledger, head: KeyHead, kv_head: int, name: str, units: Units
    ) -> None:
        self.ledger, self.head, self.name, self.units = ledger, head, name, units
        self.where = (head.sequence.keys[0], kv_head, head.sequence.keys[2])
        group = head.problem.group
        # dK is stored with the scale, and its accumulator may hold it too.
        self.scale = head.problem.softmax_scale if name == "dk" else 1.0
        operand = head.k if name == "dk" else head.v
        self.total = operand.new_zeros((group, *operand.shape))
        self.lost = torch.zeros_like(self.total)
        self.largest = torch.zeros_like(self.total)

    def add(self, f: Forward, b: Backward) -> None:
        """Add the products of these query rows."""
        units, ledger, where = self.units, self.ledger, self.where
        if self.name == "dk":
            left, terms, excused, seen = b.ds, b.ds_terms, b.excused, f.chunk.visible
            right = self.head.queries(f.chunk.rows)
        else:
            left, terms, excused, seen = b.p, b.p_terms, f.excused, f.seen
            right = b.grad_out
        u = units.u_sum[self.name]
        if u:
            lost, largest = block_sums(self.scale * left.mT, right, units.block, u, self.total)
            blocks = -(-left.shape[1] // units.block)
            self.lost += lost + blocks * units.eta_sum[self.name]
            self.largest = torch.maximum(self.largest, largest)
        self.total += self.scale * (left.mT @ right)
        size, scale = right.abs(), abs(self.scale)
        rows = self.head.problem.group * self.head.sequence.len_q
        gamma = units.gamma(rows, 8) + units.u_operand
        reach = gamma * (left.abs() + sum_of(terms))
        for name, term in (*ledger.grouped(terms), ("accumulation", reach)):
            ledger.term(name)[where] += scale * (term.mT @ size).sum(0)
        ledger.touched[where] |= seen.any(0).any(0)[:, None]
        ledger.excused[where] |= excused.any()  # a row of NaN reaches keys that it does not see

    def finish(self) -> None:
        """Enter the sums over the group."""
        units, ledger, where = self.units, self.ledger, self.where
        lost, largest = self.lost, self.largest
        if self.total.shape[0] > 1:
            lost = lost + units.u_out * (self.total.abs() + lost) + units.eta_out
            largest = torch.maximum(largest, self.total.abs())
        ledger.value[where] = self.total.sum(0)
        ledger.term(STORES)[where] += lost.sum(0)
        narrowest = LARGEST[self.head.problem.dtype]
        ledger.excused[where] |= (largest >= OVERFLOW * narrowest).any(0)
