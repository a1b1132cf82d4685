"""The process of a target under a benchmark: ``python -m attnproof.benchmark.worker FD``.

Not forked, as the processes of ``check`` are, from one that has torch loaded and memory filled
with NaN: what a fresh process takes from import to its first result is measured too, and filling
memory takes time.
"""

from __future__ import annotations

import faulthandler
import socket
import sys
import time


def main(descriptor: int) -> None:
    """Serve the parent over the socket ``descriptor`` until it closes it."""
    faulthandler.enable()
    start = time.perf_counter()
    import torch  # noqa: F401

    seconds = time.perf_counter() - start
    from attnproof.benchmark.serving import serve

    serve(socket.socket(fileno=descriptor), seconds)


if __name__ == "__main__":
    main(int(sys.argv[1]))
