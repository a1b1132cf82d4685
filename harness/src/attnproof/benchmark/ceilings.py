"""What the device reaches at most, measured: a large product of matrices, and a copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import clock

SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices
COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes
ROUNDS = 11
# A rate that is beyond by more is impossible: clocks differ from one moment to the next, and other
# processes share a CPU.
MARGIN = {"cuda": 1.1, "cpu": 5.0}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Operations a second of a product in this dtype, and bytes a second of a copy, read and
    written; the best of some rounds."""

    flops: float
    bytes: float


def measure(device: str, dtype: torch.dtype) -> Ceilings:
    """Measure them on 'cpu' or 'cuda'."""
    side, size = SIDE[device], COPIED[device]
    timer = clock(device, wall=False)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds, _ = timer.seconds([lambda: a @ b] * ROUNDS)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies, _ = timer.seconds([lambda: target.copy_(source)] * ROUNDS)
    return Ceilings(
        flops=2 * side**3 / min(seconds[1:]),
        bytes=2 * size / min(copies[1:]),
    )
