"""The launches of V2 on Hopper, and what they are for; everything else is ``v2_launches``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .arguments import Arguments
from .kernels import hopper_backward, hopper_forward
from .kernels.hopper import ROWS, HopperShape
from .launch import Launch
from .tiles import FEW_QUERIES, padded
from .tiles_table import HopperTiles

HOPPER = 90  # compute capability
ALIGNMENT = 16  # bytes, of a tensor and its strides (CUDA driver API, cuTensorMapEncodeTiled)
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
NARROWEST = 33  # heads below leave half of a tile empty, or more
LAUNCH_OPTIONS = {"num_warps": 4, "num_stages": 1}


def suits(x: Arguments) -> bool:
    """Whether the kernels compute this: dense sequences with a band, in 16 bits, that TMA loads."""
    return (
        x.plain
        and not x.softcap
        and x.q.dtype in DTYPES
        and x.softmax_scale > 0
        and min(x.head_dim, x.head_dim_v) >= NARROWEST
        and x.seqlen_q > FEW_QUERIES
        and all(map(loadable, (x.q, x.k, x.v)))
    )


def loadable(tensor: Tensor) -> bool:
    """Whether TMA loads tiles of a tensor (batch, head, row, column)."""
    *strides, last = tensor.stride()
    size = tensor.element_size()
    return (
        last == 1
        and tensor.numel() > 0
        and tensor.data_ptr() % ALIGNMENT == 0
        and all(
            count == 1 or (stride > 0 and stride * size % ALIGNMENT == 0)
            for count, stride in zip(tensor.shape, strides, strict=False)
        )
    )


@dataclass(frozen=True)
class HopperLaunches:
    """Those of one call. ``unit``: log2(e) times the scale."""

    x: Arguments
    unit: float

    def forward(self, tiles: HopperTiles, out: Tensor, lse: Tensor) -> Launch:
        """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq)."""
        x = self.x
        tensors = {
            "q": self._descriptor(x.q, ROWS.value),
            "k": self._descriptor(x.k, tiles.passing),
            "v": self._descriptor(x.v, tiles.passing),
            **_to("out", out),
            "lse": lse,
        }
        return self._launch(hopper_forward.forward, tensors, tiles, x.seqlen_q, x.heads_q)

    def keys_and_values(
        self, tiles: HopperTiles, saved: dict[str, Tensor], grad_k: Tensor, grad_v: Tensor
    ) -> Launch:
        """dK and dV; ``saved``: grad_out, lse and deltas."""
        x = self.x
        tensors = {
            "q": self._descriptor(x.q, tiles.passing),
            "k": self._descriptor(x.k, ROWS.value),
            "v": self._descriptor(x.v, ROWS.value),
            "grad_out": self._descriptor(saved["grad_out"], tiles.passing),
            "lse": saved["lse"],
            "deltas": saved["deltas"],
            **_to("grad_k", grad_k),
            **_to("grad_v", grad_v),
            "scale": x.softmax_scale,
        }
        kernel = hopper_backward.keys_and_values
        return self._launch(kernel, tensors, tiles, x.seqlen_k, x.heads_kv)

    def queries(self, tiles: HopperTiles, saved: dict[str, Tensor], grad_q: Tensor) -> Launch:
        """dQ; ``saved``: grad_out, lse and deltas."""
        x = self.x
        tensors = {
            "q": self._descriptor(x.q, ROWS.value),
            "k": self._descriptor(x.k, tiles.passing),
            "v": self._descriptor(x.v, tiles.passing),
            "grad_out": self._descriptor(saved["grad_out"], ROWS.value),
            "lse": saved["lse"],
            "deltas": saved["deltas"],
            **_to("grad_q", grad_q),
            "scale": x.softmax_scale,
        }
        return self._launch(hopper_backward.queries, tensors, tiles, x.seqlen_q, x.heads_q)

    def _launch(
        self, kernel: Any, tensors: dict[str, Any], tiles: HopperTiles, length: int, heads: int
    ) -> Launch:
        """A launch over ``length`` rows, or keys, of ``heads`` in every batch entry."""
        x = self.x
        left, right = x.band
        blocks = -(-length // (ROWS.value * tiles.consumers))
        return Launch(
            kernel=kernel,
            grid=(blocks * heads * x.batches,),
            arguments={
                **tensors,
                "unit": self.unit,
                **x.positions,
                "heads": heads,
                "blocks": blocks,
                "shape": HopperShape(
                    padded_dim=padded(x.head_dim),
                    padded_dim_v=padded(x.head_dim_v),
                    bounded_left=left is not None,
                    bounded_right=right is not None,
                    consumers=tiles.consumers,
                    passing=tiles.passing,
                    stages=tiles.stages,
                ),
            },
            options=LAUNCH_OPTIONS,
        )

    def _descriptor(self, tensor: Tensor, rows: int) -> TensorDescriptor:
        """For TMA: tiles of ``rows`` rows; what is beyond the tensor is 0."""
        block = [1, 1, rows, padded(tensor.shape[3])]
        strides = [
            # Of a dimension of size 1, any that is aligned.
            ALIGNMENT if size == 1 else stride
            for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
        ]
        layout = _swizzled(rows, block[3], tensor.dtype)
        return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], block, layout)


@cache
def _swizzled(rows: int, columns: int, dtype: torch.dtype) -> Any:
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], DTYPES[dtype])


def _to(name: str, tensor: Tensor) -> dict[str, Any]:
    """A tensor (batch, head, row, column) that is written, with its strides in elements."""
    ends = zip(("batch", "head", "row"), tensor.stride()[:3], strict=True)
    strides = {f"{name}_{end}": stride for end, stride in ends}
    return {name: tensor, **strides, f"{name}_columns": tensor.shape[3]}
