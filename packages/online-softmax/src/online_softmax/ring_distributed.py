"""Ring attention over ``torch.distributed``: every rank holds its shard, and no more.

``ring_attention`` is called by all ranks of a process group, each with its own rows and keys. K
and V go around the ring in one message a turn, and while a rank computes against the keys that
it has, the next are on their way. What a rank computes in a turn is that of ``ring``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_reference.inputs import Attention, Inputs, output_shape
from attn_reference.problem import GRADIENT_NAMES, Problem, Window
from attn_reference.rounding import full_fp32_products

from . import ring
from .agreement import agree
from .gradients import Backward
from .placement import Placement
from .sharding import RankOperands, Sharded, shard
from .steps import BLOCK_K, BLOCK_Q, collect

KEYS_TAG, GRADIENTS_TAG = 1, 2


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    placement: str | Placement = "zigzag",
    scale: float | None = None,
    causal: str = "none",
    window: Window | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    keep_mask: Tensor | None = None,
    key_lengths: Sequence[int] | None = None,
    packed: Sequence[tuple[int, int]] | None = None,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
) -> tuple[Tensor, Tensor]:
    """Attention over sequences that are sharded over the ranks of ``group`` (None: all).

    A collective: every rank calls it, and, where gradients are wanted, backward through it.
    With B the batch, n and m the queries and keys that this rank owns, and Sk all keys:

    q (B, Hq, n, D), k (B, Hkv, m, D), v (B, Hkv, m, Dv), fp64, fp32, fp16 or bf16, on a device
    that the group's backend serves; Hq is a multiple of Hkv. ``positions`` of ``placement`` says
    which of the whole sequence a rank owns, and in which order: ``placement`` is 'zigzag' (which
    balances causal work), 'contiguous' or a function as in ``placement``. Ranks may own unequal
    shares, or none.

    causal ('none', 'top-left', 'bottom-right'), window (left, right), softcap, scale (None:
    1/sqrt(D)), alibi_slopes and sinks, (Hq,), mean what they mean in ``Problem``, and are about
    positions in the whole sequence. mask (bool, True: visible), bias (in the dtype of q, or
    fp32), each (B or 1, Hq or 1, n or 1, Sk or 1), and keep_mask (bool, (B, Hq, n, Sk), what
    dropout keeps) hold the rows of this rank and all columns. key_lengths: the true number of
    keys of each batch entry, in the whole sequence. packed: the (queries, keys) of sequences
    that lie one after another, B = 1; each is shared out by itself.

    Gives out (B, Hq, n, Dv), in the dtype of q, and lse (B, Hq, n), fp32 (fp64 for fp64): 0 and
    -inf for rows that see no key. Both are differentiable in q, k, v, bias and sinks. dQ, dK and
    dV are whole. The gradient of what ranks hold copies of (sinks, a bias without rows) is this
    rank's part of it: sum it over the group, as data parallelism does for parameters.

    Raises ValueError, on every rank of the group, when the tensors of some rank do not fit
    together, or the ranks do not agree on what is computed.
    """
    options = {
        "scale": scale,
        "causal": causal,
        "window": window if window is None else tuple(window),
        "softcap": softcap,
        "dropout": dropout,
        "key_lengths": None if key_lengths is None else tuple(map(int, key_lengths)),
        "packed": None if packed is None else tuple((int(a), int(b)) for a, b in packed),
    }
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        keep_mask=keep_mask,
    )
    agreed = agree(inputs, group, placement, options, (block_q, block_k))
    call = Call(
        problem=agreed.problem,
        inputs=Inputs(**{name: t.detach() for name, t in inputs.tensors().items()}),
        group=agreed.group,
        rank=agreed.rank,
        ranks=agreed.ranks,
        keys=agreed.keys,
        sharded=tuple(shard(agreed.problem, agreed.ranks, agreed.placement)),
        blocks=(block_q, block_k),
    )
    out, lse = _RingAttention.apply(q, k, v, bias, sinks, call)  # type: ignore[no-untyped-call]
    return out, lse


class Visiting:
    """K and V of a rank, or dK and dV, in one buffer, so that they are one message."""

    def __init__(self, call: Call, owner: int, dtype: torch.dtype, zero: bool = False) -> None:
        problem, self.owner = call.problem, owner
        batch = output_shape(problem)[0]
        shape = (batch, problem.kv_heads, call.keys[owner])
        of_k = batch * problem.kv_heads * shape[-1] * problem.head_dim
        of_v = batch * problem.kv_heads * shape[-1] * problem.value_dim
        make = torch.zeros if zero else torch.empty
        self.buffer = make(of_k + of_v, dtype=dtype, device=call.device)
        self.k = self.buffer[:of_k].view(*shape, problem.head_dim)
        self.v = self.buffer[of_k:].view(*shape, problem.value_dim)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call, as one rank sees it. The ranks agree on everything but ``rank`` and ``inputs``."""

    problem: Problem  # of the whole
    inputs: Inputs  # of this rank, detached
    group: dist.ProcessGroup
    rank: int
    ranks: int
    keys: tuple[int, ...]  # that each rank holds
    sharded: tuple[Sharded, ...]
    blocks: tuple[int, int]

    @property
    def device(self) -> torch.device:
        """Where the tensors of this rank are."""
        return self.inputs.q.device

    def operands(self) -> list[RankOperands]:
        """Of every sequence."""
        return [RankOperands(s, self.problem, self.inputs, self.rank) for s in self.sharded]

    def travel(self) -> Iterator[Visiting]:
        """The keys that visit in each turn; the next arrive while the caller works."""
        visiting = Visiting(self, self.rank, self.inputs.k.dtype)
        visiting.k.copy_(self.inputs.k)
        visiting.v.copy_(self.inputs.v)
        for turn in range(1, self.ranks):
            coming = self.pass_on(visiting, ring.owner(self.rank, turn, self.ranks), KEYS_TAG)
            yield visiting
            visiting = coming.wait()
        yield visiting

    def pass_on(self, going: Visiting, owner: int, tag: int) -> Coming:
        """Begin to send to the next rank, and to receive ``owner``'s from the one before."""
        after, before = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        coming = Visiting(self, owner, going.buffer.dtype)
        operations = [
            dist.P2POp(kind, buffer, group=self.group, tag=tag, group_peer=peer)
            for kind, buffer, peer in (
                (dist.isend, going.buffer, after),
                (dist.irecv, coming.buffer, before),
            )
            if buffer.numel()  # both sides know how much it is, and say nothing of nothing
        ]
        requests = dist.batch_isend_irecv(operations) if operations else []
        return Coming(going=going, coming=coming, requests=requests)


@dataclass(frozen=True, kw_only=True)
class Coming:
    """What is on its way. What is being sent lives as long."""

    going: Visiting
    coming: Visiting
    requests: Sequence[Any]

    def wait(self) -> Visiting:
        """What has arrived."""
        for request in self.requests:
            request.wait()
        return self.coming


class _RingAttention(torch.autograd.Function):
    """(q, k, v, bias, sinks, call) -> (out, lse), of this rank."""

    @staticmethod
    @full_fp32_products()
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        problem = call.problem
        shape = (*q.shape[:3], problem.value_dim)
        out = torch.zeros(shape, dtype=q.dtype, device=q.device)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.full(shape[:-1], -torch.inf, dtype=wide, device=q.device)
        parts = [(x, ring.States(x)) for x in call.operands()]
        for x, states in parts:
            ring.start(x, states, x.rows, call.blocks[0])
        for visiting in call.travel():
            for x, states in parts:
                share = x.visit(visiting.k, visiting.v, visiting.owner)
                ring.attend(x, states, x.rows, share, *call.blocks)
        for x, states in parts:
            rows = x.sequence.rows
            found = x.allocate("O", *out[rows].shape[1:], dtype=q.dtype)
            found_lse = x.allocate("LSE", lse[rows].shape[1], vector=True)
            ring.finish(states, found, found_lse, x.rows, call.blocks[0])
            out[rows], lse[rows] = found.data.flatten(0, 1), found_lse.data.flatten(0, 1)
        ctx.call = call
        # Saved through autograd, which then notices when one of them is changed in place.
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    @full_fp32_products()
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        needed = dict(zip(GRADIENT_NAMES, ctx.needs_input_grad, strict=False))
        call: Call = ctx.call
        named = dict(zip(GRADIENT_NAMES, tensors, strict=True))
        totals = {
            name: torch.zeros(tensor.shape, dtype=lse.dtype, device=tensor.device)
            for name, tensor in named.items()
            if name in ("q", "bias", "sinks") and needed[name]
        }
        keys = _backward(call, Attention(out=out, lse=lse), (grad_out, grad_lse), totals)
        totals |= {"k": keys.k, "v": keys.v}
        return (*(totals[n].to(t.dtype) if needed[n] else None for n, t in named.items()), None)


def _backward(
    call: Call, result: Attention, incoming: tuple[Tensor, Tensor], totals: dict[str, Tensor]
) -> Visiting:
    """dQ, dBias and dSinks into ``totals``; dK and dV of this rank's keys, back from the ring."""
    assert result.lse is not None
    wide, (grad_out, grad_lse) = result.lse.dtype, incoming
    call = replace(
        call,
        problem=call.problem.replace(gradients=tuple(totals), lse_gradient=True),
        inputs=replace(call.inputs, grad_out=grad_out, grad_lse=grad_lse),
    )
    parts = []
    for x in call.operands():
        g = Backward(x, result)
        slack = x.allocate("D", x.sequence.q.shape[1], vector=True)
        ring.start_backward(g, slack, x.rows, call.blocks[0])
        parts.append((x, g, slack))
    total: Visiting | None = None
    for visiting in call.travel():
        owner = visiting.owner
        # What the ranks before found for these keys arrives while this one adds to it.
        arriving = None if total is None else call.pass_on(total, owner, GRADIENTS_TAG)
        own = Visiting(call, owner, wide, zero=True)
        for x, g, slack in parts:
            share = x.visit(visiting.k, visiting.v, owner)
            g.dk = x.place("dK", x.part(own.k, owner))
            g.dv = x.place("dV", x.part(own.v, owner))
            ring.attend_backward(x, g, slack, x.rows, share, *call.blocks)
        if arriving is not None:
            own.buffer += arriving.wait().buffer
        total = own
    for x, g, _ in parts:
        collect(totals, x.sequence, g)
    assert total is not None
    return total if call.ranks == 1 else call.pass_on(total, call.rank, GRADIENTS_TAG).wait()
