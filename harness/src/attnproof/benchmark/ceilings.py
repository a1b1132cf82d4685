"""What this device reaches at best: a large matrix product, and moving memory, as rates.

A kernel is shown as a share of them, since data sheets promise clocks that no GPU holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from attn_reference.problem import DTYPES

from .clock import DeviceClock

REPEATS = 10
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
MEMORY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """FLOP/s of a product in the dtype, and bytes/s (read plus written) of a copy or a sum."""

    matmul: float
    memory: float

    def as_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)


def measure_ceilings(device: str, dtype: str) -> Ceilings:
    """The best of some repeats. In fp32 tensor cores may round to TF32; on the CPU a product in
    fp32 counts too, since a kernel may convert what it multiplies."""
    clock = DeviceClock(device)
    dtypes = [DTYPES[dtype]] if device == "cuda" else [DTYPES[dtype], torch.float32]
    memory = max(_copy(clock), _sum(clock))
    matmul = max(_matmul(clock, one) for one in dtypes)
    if device == "cuda":
        torch.cuda.empty_cache()  # the targets need the memory
    return Ceilings(matmul=matmul, memory=memory)


def _matmul(clock: DeviceClock, dtype: torch.dtype) -> float:
    side = MATMUL_SIDE[clock.device]
    a, b, out = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(3))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return 2.0 * side**3 / _best(clock, lambda: torch.mm(a, b, out=out))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _copy(clock: DeviceClock) -> float:
    count = MEMORY_BYTES[clock.device] // 4
    source, target = (torch.ones(count, device=clock.device) for _ in range(2))
    return 2.0 * source.nbytes / _best(clock, lambda: target.copy_(source))


def _sum(clock: DeviceClock) -> float:
    source = torch.ones(MEMORY_BYTES[clock.device] // 4, device=clock.device)
    return source.nbytes / _best(clock, source.sum)


def _best(clock: DeviceClock, call: Callable[[], object]) -> float:
    """Seconds of the fastest."""
    call()
    return min(clock.time(lambda: None, lambda _: call()).seconds for _ in range(REPEATS))
