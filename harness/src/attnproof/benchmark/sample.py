"""Outputs of timed calls, judged on samples: rows of one head, or keys of one head.

Some rows of one head are a problem of their own: the same queries, with the keys up to the last one
that they see. Their out and dQ are judged like those of any target. dK and dV need every row
that sees the keys, and are judged for a whole head where that is small enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

from attn_reference.inputs import Attention, Gradients, Inputs
from attn_reference.precision import Precision

from ..backend import Capabilities
from ..judge.judging import judge
from ..plan import CallResult
from ..verdict import Status
from .suites import FORWARD, Cell

ROWS = 64
WHOLE_HEAD = 1024  # rows, and keys, up to which a head is judged as a whole


@dataclass(frozen=True)
class Sample:
    """Rows ``first`` to ``end`` of one query head."""

    entry: int
    head: int
    first: int
    end: int


def choose(cell: Cell, random: Random) -> Sample:
    """Rows at random, or all rows of a head that is small."""
    p = cell.problem
    entry, head = random.randrange(p.batch), random.randrange(p.heads_q)
    if max(p.seqlen_q, p.keys) <= WHOLE_HEAD or p.seqlen_q <= ROWS:
        return Sample(entry, head, 0, p.seqlen_q)
    first = random.randrange(p.seqlen_q - ROWS + 1)
    return Sample(entry, head, first, first + ROWS)


def why_wrong(
    cell: Cell,
    sample: Sample,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    precision: Precision,
    capabilities: Capabilities,
) -> str | None:
    """None when the sample conforms, else what the judge says.

    inputs: q, k, v and grad_out, outputs: out and the gradients dq, dk, dv, (batch, head, row,
    column), on any device.
    """
    p = cell.judged
    rows = slice(sample.first, sample.end)
    kv_head = sample.head // p.group
    whole = sample.first == 0 and sample.end == p.seqlen_q
    last = p.keys  # keys that the rows may see
    causal = p.causal
    if causal != "none" and not whole:
        shift = p.keys - p.seqlen_q if causal == "bottom-right" else 0
        last, causal = min(p.keys, sample.end + shift), "bottom-right"
    gradients: tuple[str, ...] = () if cell.direction == FORWARD else ("q",)
    if gradients and whole and p.group == 1:
        gradients = ("q", "k", "v")
    own = replace(
        p, batch=1, heads_q=1, heads_kv=1, seqlen_q=sample.end - sample.first, seqlen_k=last,
        causal=causal, gradients=gradients,
    )  # fmt: skip

    def cut(tensor: Tensor, head: int, where: slice) -> Tensor:
        return tensor[sample.entry, head, where].detach().cpu()[None, None].contiguous()

    keys = slice(0, last)
    given = Inputs(
        q=cut(inputs["q"], sample.head, rows),
        k=cut(inputs["k"], kv_head, keys),
        v=cut(inputs["v"], kv_head, keys),
    )
    found: dict[str, Tensor] = {}
    if gradients:
        given.grad_out = cut(inputs["grad_out"], sample.head, rows)
        found = {"q": cut(outputs["dq"], sample.head, rows)}
        if len(gradients) > 1:
            found |= {n: cut(outputs[f"d{n}"], kv_head, keys) for n in ("k", "v")}
    result = CallResult(
        attention=Attention(out=cut(outputs["out"], sample.head, rows)),
        gradients=Gradients(**found) if gradients else None,
    )
    without_lse = replace(capabilities, returns_lse=False)
    with torch.no_grad():
        verdict = judge(own, given, result, precision, without_lse)
    return None if verdict.status is Status.CONFORMS else f"{verdict.status}: {verdict.reason}"
