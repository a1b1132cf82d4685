"""Seconds from the start of Python to a first result: ``python -m attnproof.benchmark.first_result
TARGET DEVICE DTYPE``. What is compiled is found in the caches of before, if it is there."""

from __future__ import annotations

import sys
import time

start = time.perf_counter()

from .peers import fresh_inputs, load_peer  # noqa: E402 (importing is what is timed)
from .suites import overhead  # noqa: E402


def main(target: str, device: str, dtype: str) -> None:
    """Print them."""
    cell = overhead(dtype)[0]
    peer = load_peer(target, None, device)
    if reason := peer.refuses(cell):
        sys.exit(reason)
    out = peer.call(cell, fresh_inputs(cell, device, 0))()["out"]
    out.float().sum().item()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
