"""Where numbers are rounded: exact (fp64 throughout), or as a ``Precision`` declares.

Forward and backward are written once, over a ``Rounding``; for the exact one every method
below is the identity in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .precision import SMALLEST_NORMAL_FP32, Precision
from .problem import DTYPES, Problem

SIXTEEN_BITS = ("fp16", "bf16")
TF32_DROPPED_BITS = 13  # fp32 keeps 23 bits of the significand, tf32 10


def round_to_tf32(tensor: Tensor) -> Tensor:
    """An fp32 tensor rounded to tf32 (10 bits after the point), to nearest, ties to even."""
    bits = tensor.contiguous().view(torch.int32)
    half = (1 << (TF32_DROPPED_BITS - 1)) - 1
    odd = (bits >> TF32_DROPPED_BITS) & 1
    rounded = ((bits + half + odd) >> TF32_DROPPED_BITS) << TF32_DROPPED_BITS
    return torch.where(tensor.isfinite(), rounded.view(torch.float32), tensor)


@contextmanager
def full_fp32_products() -> Iterator[None]:
    """fp32 products in fp32, though this process may allow tf32 or bf16 for them."""
    libraries = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    allowed = [library.fp32_precision for library in libraries]
    try:
        for library in libraries:
            library.fp32_precision = "ieee"
        yield
    finally:
        for library, before in zip(libraries, allowed, strict=True):
            library.fp32_precision = before


class Rounding:
    """The arithmetic of one computation.

    ``compute`` is the dtype that everything between two roundings is done in: fp64 when
    exact or when the inputs are fp64, else fp32. ``result`` is the dtype of out and of the
    gradients of q, k and v: fp64 when exact, else that of the inputs. ``unfused`` says that
    scores are kept in 16 bits, as attention does that writes every step to memory; it then
    normalises P before storing it.
    """

    def __init__(self, problem: Problem, precision: Precision | None) -> None:
        self.exact = precision is None
        wide = self.exact or problem.dtype == "fp64"
        self.compute = torch.float64 if wide else torch.float32
        self.result = torch.float64 if self.exact else problem.torch_dtype
        self._dtype = problem.dtype
        self._precision = precision
        self.unfused = self._named("scores") in SIXTEEN_BITS

    def _named(self, role: str) -> str:
        if self._precision is None:
            return "fp64"
        return self._precision.dtype_of(role, self._dtype)

    def block(self, role: str) -> int | None:
        """Terms that a 16-bit accumulator of that role adds at a time; None for a wider one."""
        if self._precision is None or self._named(role) not in SIXTEEN_BITS:
            return None
        return self._precision.accumulate_rows

    def keep(self, tensor: Tensor, role: str) -> Tensor:
        """``tensor``, of dtype ``compute``, as it reads back from the dtype of that role."""
        return self._round(tensor, self._named(role))

    def _round(self, tensor: Tensor, name: str) -> Tensor:
        if self._precision is None:
            return tensor
        if name == "tf32":
            tensor = round_to_tf32(tensor)
        elif name in SIXTEEN_BITS:
            tensor = tensor.to(DTYPES[name]).to(self.compute)
        if self._precision.flushes_subnormals and self.compute == torch.float32:
            tensor = torch.where(tensor.abs() < SMALLEST_NORMAL_FP32, 0.0, tensor)
        return tensor

    def dropped(self, p: Tensor, kept: Tensor, dropout: float) -> Tensor:
        """What dropout makes of P for the second product, before that is rounded."""
        stored = self._precision is not None and self._precision.drops_stored_probabilities
        if self.unfused or not stored:
            return p * kept / (1 - dropout)
        factor = torch.full_like(p, 1 / (1 - dropout))
        return self.keep(p, "probabilities") * self.keep(factor, "probabilities") * kept

    def operand(self, tensor: Tensor) -> Tensor:
        """An input as an operand of a product, in dtype ``compute``."""
        return self.keep(tensor.to(self.compute), "products")

    def store(self, tensor: Tensor) -> Tensor:
        """The last store of out, dQ, dK or dV, in dtype ``result``."""
        return self._round(tensor, self._dtype).to(self.result)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, role: str) -> Tensor:
        """total + left @ right, in the accumulator of that role; left (..., m, n), right (n, p)."""
        block = self.block(role)
        if block is None:
            return total + left @ right
        for start in range(0, left.shape[-1], block):
            part = slice(start, start + block)
            total = self.keep(total + left[..., part] @ right[part], role)
        return total
