"""The one rule by which every algorithm here turns q·k into a score: scale, softcap, bias, ALiBi,
visibility.

It works on tiles: rows and keys are slices of one sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_reference.masks import diagonal_offset, positional_mask
from attn_reference.problem import Problem
from attn_reference.sequences import Sequence

from .memory import HbmTensor, Memory


@dataclass(frozen=True, kw_only=True)
class TileScores:
    """scores (Hkv, G, R, C), -inf where a key is hidden; slope: d score / d (scale q·k), with a
    softcap."""

    scores: Tensor
    slope: Tensor | None = None


class MaskRule:
    """The rule of one sequence. Heads are (Hkv, G): query heads by the kv head that they read."""

    def __init__(
        self, sequence: Sequence, problem: Problem, memory: Memory, compute: torch.dtype
    ) -> None:
        self.problem = problem
        self.len_q, self.len_k = sequence.len_q, sequence.len_k
        self.offset = diagonal_offset(problem, self.len_q, self.len_k)
        self.positions = positional_mask(problem, self.len_q, self.len_k)
        self.device, self.compute = sequence.q.device, compute
        self.mask = self._in_memory("mask", sequence.mask, memory)
        self.bias = self._in_memory("bias", sequence.bias, memory)
        self.slopes = None
        if sequence.alibi_slopes is not None:
            self.slopes = sequence.alibi_slopes.view(problem.kv_heads, -1, 1, 1).to(compute)

    def _in_memory(self, name: str, tensor: Tensor | None, memory: Memory) -> HbmTensor | None:
        """(Hq or 1, Lq or 1, Lk or 1) as (Hkv or 1, G or 1, …)."""
        if tensor is None:
            return None
        heads = (1, 1) if tensor.shape[0] == 1 else (self.problem.kv_heads, self.problem.group)
        return memory.place(name, split_heads(tensor, heads), self.compute, vector=True)

    def tile(self, products: Tensor, rows: slice, keys: slice) -> TileScores:
        """The scores of a tile, from its products q·k (Hkv, G, R, C)."""
        problem = self.problem
        scores = products * problem.softmax_scale
        slope = None
        if problem.softcap:
            tanh = torch.tanh(scores / problem.softcap)
            scores, slope = tanh * problem.softcap, 1 - tanh.square()
        if self.bias is not None:
            scores = scores + self.bias.load(rows, keys)
        i = torch.arange(rows.start, rows.stop, device=self.device)[:, None]
        j = torch.arange(keys.start, keys.stop, device=self.device)[None, :]
        if self.slopes is not None:
            scores = scores - self.slopes * (i + self.offset - j).abs()
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask.load(rows, keys), -math.inf)
        if not self.all_visible(rows, keys):
            scores = scores.masked_fill(~self.positions(i, j), -math.inf)
        return TileScores(scores=scores, slope=slope)

    def none_visible(self, rows: slice, keys: slice) -> bool:
        """Whether causality and window hide the whole tile, so that it can be skipped."""
        last, first = self._band(rows.stop - 1)[1], self._band(rows.start)[0]
        return bool(keys.start > last or keys.stop - 1 < first)

    def all_visible(self, rows: slice, keys: slice) -> bool:
        """Whether causality and window show the whole tile, so that they need not be applied."""
        left, right = self._band(rows.stop - 1)[0], self._band(rows.start)[1]
        return bool(keys.start >= left and keys.stop - 1 <= right)

    def _band(self, row: int) -> tuple[float, float]:
        """The first and the last key that positions let a row see."""
        diagonal = row + self.offset
        first, last = -math.inf, math.inf
        if self.problem.window is not None:
            left, right = self.problem.window
            first = -math.inf if left is None else diagonal - left
            last = math.inf if right is None else diagonal + right
        if self.problem.causal != "none":
            last = min(last, diagonal)
        return first, last


def split_heads(tensor: Tensor, heads: tuple[int, int]) -> Tensor:
    """(Hq, …) as (Hkv, G, …), without a copy."""
    split: Tensor = tensor.unflatten(0, heads)  # type: ignore[no-untyped-call]
    return split
