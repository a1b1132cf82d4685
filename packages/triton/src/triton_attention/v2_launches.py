"""The launches that V2 is made of, for one call: which kernels, over which grid, with what.

Nothing here runs a kernel: the same launches run on a GPU, are interpreted and counted, and are
compiled for a GPU that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from . import tiles as choose
from .arguments import Arguments
from .hopper_launches import HOPPER, HopperLaunches, loadable, suits
from .kernels.dropout import NO_DROPOUT, Dropout, keep_mask
from .kernels.scores import Rule
from .kernels.sequences import Sequences
from .kernels.tensors import matrix
from .kernels.v2_backward import delta, keys_and_values, queries
from .kernels.v2_bias_gradient import bias_gradient
from .kernels.v2_combine import combine
from .kernels.v2_forward import Shape, forward
from .launch import Launch, Result
from .tiles import padded, padded_dims
from .tiles_table import DELTA, FORWARD, KEYS, QUERIES, HopperTiles, Tiles

LOG2_E = math.log2(math.e)
STRIDES = ("", "_batch", "_head", "_row", "_column")
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Launches:
    """The launches of one call. ``seed``: of dropout, int64 (1,), on the device of q; ``gpu``: that
    the tiles are for, None for the one that q is on; ``hopper``: whether the kernels for Hopper may
    be chosen."""

    x: Arguments
    seed: Tensor | None = None
    gpu: choose.Gpu | None = None
    hopper: bool = True

    def forward(
        self, tiles: Tiles | HopperTiles | None = None, splits: int | None = None
    ) -> Result:
        """out (B, Hq, Sq, Dv) in the dtype of q, and lse (B, Hq, Sq) fp32.

        tiles and splits that are not given are chosen.
        """
        x = self.x
        batch, heads, length, _ = x.q.shape
        shape = (batch, heads, length, x.head_dim_v)
        out, lse = x.q.new_empty(shape), x.q.new_empty(shape[:-1], dtype=torch.float32)
        pack = choose.packed_heads(x.group, x.seqlen_q)
        rows = x.seqlen_q * pack
        hopper = None
        if not isinstance(tiles, Tiles):
            hopper = tiles or self._hopper_tiles(FORWARD, rows)
            tiles = choose.forward_tiles(self._kind, rows, x.seqlen_k)
        blocks = _ceil(rows, tiles.block_m)
        programs = blocks * (x.heads_q // pack) * x.batches
        if splits is None:
            splits = choose.splits(programs, x.seqlen_k, self._gpu)
        if hopper is not None and splits == 1:
            launch = self._hopper.forward(hopper, out, lse)
            return Result(launches=[launch], tensors={"out": out, "lse": lse})
        found, found_lse = out, lse
        if splits > 1:
            found = out.new_empty((splits * batch, *shape[1:]), dtype=torch.float32)
            found_lse = lse.new_empty((splits * batch, *shape[1:-1]))
        if x.cu_seqlens_q is not None:  # rows behind the last sequence see no key
            found.zero_()
            found_lse.fill_(-torch.inf)
        launches = [
            self._launch(
                forward,
                programs * splits,
                tiles,
                {
                    "q": matrix(x.q),
                    "k": matrix(x.k),
                    "v": matrix(x.v),
                    "out": matrix(found),
                    "lse": found_lse,
                    "sinks": _without_gaps(x.sinks),
                    "heads": heads // pack,
                    "blocks": blocks,
                    "batches": x.batches,
                    "entries": batch,
                    "splits": splits if splits > 1 else None,
                },
                pack,
            )
        ]
        scratch = []
        if splits > 1:
            launches.append(self._combine(found, found_lse, out, lse, splits))
            scratch = [found, found_lse]
        return Result(launches=launches, tensors={"out": out, "lse": lse}, scratch=scratch)

    def backward(
        self,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        wanted: set[str],
        tiles: Mapping[str, Tiles | HopperTiles] = NOTHING,
    ) -> Result:
        """Those gradients of q, k, v and bias that are ``wanted``, each in the dtype of its tensor,
        and ``delta``, rowsum(dO * O) - dLSE, (B, Hq, Sq) fp32.

        tiles: by pass; those that are not given are chosen.
        """
        x = self.x
        deltas = torch.empty_like(lse, memory_format=torch.contiguous_format)
        of_keys = tiles.get(KEYS) or self._hopper_tiles(KEYS, x.seqlen_q)
        of_queries = tiles.get(QUERIES) or self._hopper_tiles(QUERIES, x.seqlen_q)
        if HopperTiles in map(type, (of_keys, of_queries)) and not loadable(grad_out):
            grad_out = grad_out.clone(memory_format=torch.contiguous_format)
        launches = [self._delta(out, grad_out, grad_lse, deltas, tiles.get(DELTA))]
        tensors = {"delta": deltas}
        saved: dict[str, Any] = {
            "q": matrix(x.q),
            "k": matrix(x.k),
            "v": matrix(x.v),
            "grad_out": matrix(grad_out),
            "lse": lse.contiguous(),
            "deltas": deltas,
        }
        for_hopper = {"grad_out": grad_out, "lse": saved["lse"], "deltas": deltas}
        lengths, packed = (x.seqlen_q, x.seqlen_k), x.cu_seqlens_q is not None
        if wanted & {"k", "v"}:
            # Keys beyond their lengths are not read, and get 0.
            new = torch.empty_like if x.key_lengths is None and not packed else torch.zeros_like
            grad_k, grad_v = new(x.k), new(x.v)
            if isinstance(of_keys, HopperTiles):
                launch = self._hopper.keys_and_values(of_keys, for_hopper, grad_k, grad_v)
            else:
                chosen = of_keys or choose.keys_tiles(self._kind, *lengths)
                blocks = _ceil(x.seqlen_k, chosen.block_n)
                own: dict[str, Any] = {"grad_k": matrix(grad_k), "grad_v": matrix(grad_v)}
                own |= {"heads": x.heads_kv, "blocks": blocks}
                grid = blocks * x.heads_kv * x.batches
                launch = self._launch(keys_and_values, grid, chosen, saved | own)
            launches.append(launch)
            tensors |= {"k": grad_k, "v": grad_v}
        if "q" in wanted:
            grad_q = (torch.zeros_like if packed else torch.empty_like)(x.q)
            if isinstance(of_queries, HopperTiles):
                launch = self._hopper.queries(of_queries, for_hopper, grad_q)
            else:
                chosen = of_queries or choose.queries_tiles(self._kind, *lengths)
                blocks = _ceil(x.seqlen_q, chosen.block_m)
                own = {"grad_q": matrix(grad_q), "heads": x.heads_q, "blocks": blocks}
                grid = blocks * x.heads_q * x.batches
                launch = self._launch(queries, grid, chosen, saved | own)
            launches.append(launch)
            tensors["q"] = grad_q
        if "bias" in wanted:
            assert x.bias is not None
            chosen = choose.bias_tiles(self._kind, *lengths)
            grad_bias = torch.zeros_like(x.bias)
            launches.append(self._bias_gradient(grad_bias, chosen, saved))
            tensors["bias"] = grad_bias
        return Result(launches=launches, tensors=tensors)

    def keep_mask(self) -> Result:
        """What dropout keeps, ``keep_mask``, bool (B, Hq, Sq, Sk)."""
        x = self.x
        keys = x.k.shape[2] if x.page_table is None else x.seqlen_k
        kept = x.q.new_zeros((x.q.shape[0], x.heads_q, x.q.shape[2], keys), dtype=torch.bool)
        tiles = choose.elementwise_tiles(self._gpu, x.seqlen_q, x.seqlen_k)
        blocks_q, blocks_k = _ceil(x.seqlen_q, tiles.block_m), _ceil(x.seqlen_k, tiles.block_n)
        launch = Launch(
            kernel=keep_mask,
            grid=(blocks_k * blocks_q * x.heads_q * x.batches,),
            arguments={
                "out": matrix(kept),
                "sequences": self._sequences,
                "dropout": self._dropout,
                "seqlen_q": x.seqlen_q,
                "seqlen_k": x.seqlen_k,
                "heads": x.heads_q,
                "blocks_q": blocks_q,
                "blocks_k": blocks_k,
                "BLOCK_M": tiles.block_m,
                "BLOCK_N": tiles.block_n,
            },
            options=tiles.options,
        )
        return Result(launches=[launch], tensors={"keep_mask": kept})

    def _bias_gradient(self, grad_bias: Tensor, tiles: Tiles, saved: dict[str, Any]) -> Launch:
        x = self.x
        over_batches, over_heads, over_queries, over_keys = (size == 1 for size in grad_bias.shape)
        packed = x.cu_seqlens_q is not None
        if packed:
            # Sequences lie along queries and keys: they share an element only where both are one.
            over_batches = over_queries and over_keys
        blocks_q, blocks_k = _ceil(x.seqlen_q, tiles.block_m), _ceil(x.seqlen_k, tiles.block_n)
        parts = (
            (over_batches, x.batches),
            (over_heads, x.heads_q),
            (over_queries, blocks_q),
            (over_keys, blocks_k),
        )
        grid = math.prod(1 if over else count for over, count in parts)
        own = {
            "grad_bias": matrix(grad_bias),
            "heads": x.heads_q,
            "batches": x.batches,
            "blocks_q": blocks_q,
            "blocks_k": blocks_k,
            # A bias may end before the pages do.
            "seqlen_k": x.seqlen_k if over_keys or packed else grad_bias.shape[3],
            "OVER_BATCHES": over_batches,
            "OVER_HEADS": over_heads,
            "OVER_QUERIES": over_queries,
            "OVER_KEYS": over_keys,
        }
        return self._launch(bias_gradient, grid, tiles, saved | own)

    def _launch(
        self, kernel: Any, programs: int, tiles: Tiles, arguments: dict[str, Any], pack: int = 1
    ) -> Launch:
        """A launch of a kernel that computes scores: what all of them take joins ``arguments``."""
        x = self.x
        return Launch(
            kernel=kernel,
            grid=(programs,),
            arguments={
                "rule": self._rule,
                "sequences": self._sequences,
                "dropout": self._dropout,
                "lse_rows": x.q.shape[2],
                **x.positions,
                "shape": self._shape(tiles, pack),
                "MASK_RULE": x.mask_rule,
                **arguments,
            },
            options=tiles.options,
        )

    def _delta(
        self,
        out: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        deltas: Tensor,
        tiles: Tiles | HopperTiles | None,
    ) -> Launch:
        batch, heads, rows, width = out.shape
        if not isinstance(tiles, Tiles):
            tiles = choose.rows_tiles(self._gpu, rows)
        blocks = _ceil(rows, tiles.block_m)
        return Launch(
            kernel=delta,
            grid=(blocks * heads * batch,),
            arguments={
                "out": matrix(out),
                "grad_out": matrix(grad_out),
                "grad_lse": None if grad_lse is None else grad_lse.contiguous(),
                "deltas": deltas,
                "rows": rows,
                "heads": heads,
                "blocks": blocks,
                "WIDTH": width,
                "PADDED": padded(width),
                "BLOCK": tiles.block_m,
            },
            options=tiles.options,
        )

    def _combine(
        self, found: Tensor, found_lse: Tensor, out: Tensor, lse: Tensor, splits: int
    ) -> Launch:
        width = out.shape[-1]
        tiles = choose.rows_tiles(self._gpu, lse.numel())
        return Launch(
            kernel=combine,
            grid=(_ceil(lse.numel(), tiles.block_m),),
            arguments={
                "partial_out": found,
                "partial_lse": found_lse,
                "out": out,
                "lse": lse,
                "rows": lse.numel(),
                "splits": splits,
                "WIDTH": width,
                "PADDED": padded(width),
                "BLOCK": tiles.block_m,
            },
            options=tiles.options,
        )

    def _shape(self, tiles: Tiles, pack: int) -> Shape:
        x = self.x
        left, right = x.band
        return Shape(
            head_dim=x.head_dim,
            head_dim_v=x.head_dim_v,
            padded_dim=self._kind.padded_dim,
            padded_dim_v=self._kind.padded_dim_v,
            pack=pack,
            page_size=x.page_size,
            bounded_left=left is not None,
            bounded_right=right is not None,
            hidden_anywhere=not (x.mask is x.bias is x.mask_rule is None),
            folded=self._folded,
            products=choose.PRODUCTS,
            block_m=tiles.block_m,
            block_n=tiles.block_n,
            rule_key=getattr(x.mask_rule, "cache_key", None),
        )

    def _hopper_tiles(self, direction: str, rows: int) -> HopperTiles | None:
        """Those of the kernels for Hopper, None where they are not for this call."""
        if not self.hopper or self._gpu.capability != HOPPER or not suits(self.x):
            return None
        return choose.hopper_tiles(direction, self._kind, rows)

    @cached_property
    def _hopper(self) -> HopperLaunches:
        return HopperLaunches(self.x, LOG2_E * self.x.softmax_scale)

    @cached_property
    def _gpu(self) -> choose.Gpu:
        return self.gpu or choose.gpu_of(self.x.q.device)

    @cached_property
    def _kind(self) -> choose.Kind:
        x = self.x
        dim, dim_v = padded_dims(x.head_dim, x.head_dim_v)
        return choose.Kind(
            gpu=self._gpu,
            itemsize=x.q.element_size(),
            padded_dim=dim,
            padded_dim_v=dim_v,
            elementwise=not (x.mask is x.bias is None),
        )

    @cached_property
    def _folded(self) -> bool:
        """Whether scores are compared before they are scaled: the maximum of q·k is then that of
        the scores, if the scale is positive."""
        x = self.x
        return not x.softcap and x.bias is None and x.alibi_slopes is None and x.softmax_scale > 0

    @cached_property
    def _rule(self) -> Rule:
        x = self.x
        return Rule(
            scale=x.softmax_scale,
            unit=LOG2_E * x.softmax_scale if self._folded else LOG2_E,
            softcap=x.softcap or None,
            alibi_slopes=_without_gaps(x.alibi_slopes),
            **{f"bias{end}": value for end, value in zip(STRIDES, matrix(x.bias), strict=True)},
            **{f"mask{end}": value for end, value in zip(STRIDES, matrix(x.mask), strict=True)},
        )

    @cached_property
    def _sequences(self) -> Sequences:
        x = self.x
        table = _without_gaps(x.page_table)
        return Sequences(
            key_lengths=_without_gaps(x.key_lengths),
            cu_seqlens_q=_without_gaps(x.cu_seqlens_q),
            cu_seqlens_k=_without_gaps(x.cu_seqlens_k),
            page_table=table,
            page_table_row=None if table is None else table.stride(0),
        )

    @cached_property
    def _dropout(self) -> Dropout:
        if not self.x.dropout_p:
            return NO_DROPOUT
        return Dropout(
            seed=self.seed,
            threshold=round(self.x.dropout_p * 2**32),
            factor=1.0 / (1.0 - self.x.dropout_p),
        )


def _without_gaps(tensor: Tensor | None) -> Tensor | None:
    """The same, copied unless the last dimension has stride 1, which kernels take for granted."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
