"""What the backward passes share: the gradients that come in and go out, in HBM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attn_reference.inputs import Attention

from .mask_rule import split_heads
from .operands import Operands


class Backward:
    """dO (Hkv, G, Lq, Dv), O and LSE of the forward pass, and dQ, dK, dV in HBM.

    The gradients that go out are in the dtype that is computed in. dBias and dSinks are added up
    beside them, where they are asked for.
    """

    def __init__(self, x: Operands, result: Attention) -> None:
        sequence, self.x = x.sequence, x
        assert sequence.grad_out is not None
        assert result.lse is not None
        heads = x.heads
        self.grad_out = x.place("dO", split_heads(sequence.grad_out, heads))
        self.out = x.place("O", split_heads(result.out[sequence.rows], heads))
        self.lse = x.place("LSE", split_heads(result.lse[sequence.rows], heads), vector=True)
        self.grad_lse = None
        if sequence.grad_lse is not None:
            self.grad_lse = x.place("dLSE", split_heads(sequence.grad_lse, heads), vector=True)
        self.dq = x.allocate("dQ", *sequence.q.shape[1:])
        self.dk = x.place("dK", torch.empty_like(x.k.data, dtype=x.compute))
        self.dv = x.place("dV", torch.empty_like(x.v.data, dtype=x.compute))
        self.dbias = self.dsinks = None
        if "bias" in x.problem.gradients and x.rule.bias is not None:
            self.dbias = x.place("dBias", torch.zeros_like(x.rule.bias.data, dtype=x.compute), True)
        if "sinks" in x.problem.gradients and x.sinks is not None:
            self.dsinks = torch.zeros_like(x.sinks)

    def slack(self, rows: slice, grad_out: Tensor, out: Tensor) -> Tensor:
        """dLSE - D with D = rowsum(dO ∘ O), (Hkv, G, R): what dS = P ∘ (dP + slack) needs."""
        return self.with_lse(rows, -(grad_out * out).sum(-1))

    def with_lse(self, rows: slice, slack: Tensor) -> Tensor:
        """``slack`` of rows and, where a gradient comes in through the LSE, that."""
        return slack if self.grad_lse is None else slack + self.grad_lse.load(rows)

    def add_bias(self, gradient: Tensor, rows: slice, keys: slice) -> None:
        """Add dS (Hkv, G, R, C) of a tile to dBias, summed where the bias broadcasts."""
        if self.dbias is not None:
            total = self.dbias.load(rows, keys)
            self.dbias.store(total + gradient.sum_to_size(total.shape), rows, keys)

    def add_sinks(self, lse: Tensor, slack: Tensor) -> None:
        """Add what rows give to dSinks: P_sink (dLSE - D)."""
        if self.dsinks is not None and self.x.sinks is not None:
            shift = lse.masked_fill(lse == -math.inf, 0.0)
            weight = torch.exp(self.x.sinks - shift)
            self.dsinks += (weight * slack).sum(-1, keepdim=True)

    @staticmethod
    def over_group(gradient: Tensor) -> Tensor:
        """A gradient of keys, (Hkv, G, C, D), summed over the query heads that read them."""
        return gradient if gradient.shape[1] == 1 else gradient.sum(1, keepdim=True)
