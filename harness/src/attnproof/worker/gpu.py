"""What is done to a call on a GPU only: poisoned memory, a stream of its own, graph replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from attn_reference.inputs import Inputs

T = TypeVar("T")
# Remembers the values that the inputs have now, and gives what writes them again.
Remember = Callable[[], Callable[[], None]]

MIB = 1 << 20
# Blocks of the caching allocator are cut from segments: two fill a small one (2 MiB), one a
# large one (20 MiB).
SEGMENTS = (MIB, MIB, 20 * MIB)
DELAY_CYCLES = 100_000_000  # some 60 ms: far more than a host needs to launch kernels
WARM_UP_CALLS = 2  # before a capture: libraries and autotuners set themselves up

_synchronize = torch.cuda.synchronize


def poison_free_memory(nbytes: int, device: str) -> None:
    """Make memory that the target will be given hold NaN: fresh blocks are filled and freed.

    nbytes: how much the call is expected to allocate for its results.
    """
    torch.cuda.empty_cache()
    sizes = [*SEGMENTS, 2 * max(nbytes, 1)]
    blocks = [torch.full((n,), 0xFF, dtype=torch.uint8, device=device) for n in sizes]
    del blocks


def other_values(inputs: Inputs) -> None:
    """Overwrite every float tensor with other finite values; NaN stays NaN, lengths and tables
    stay: what is launched must not depend on them."""
    for tensor in inputs.tensors().values():
        if tensor.is_floating_point():
            tensor.data.mul_(-0.5)


def on_side_stream(inputs: Inputs, remember: Remember, call: Callable[[], T]) -> T:
    """Run ``call`` on a stream of its own, on which its inputs arrive late.

    The inputs hold other values until, after a delay, the stream writes the right ones. Work
    that is put on another stream does not wait for that, and computes with the others.
    """
    refill = remember()
    other_values(inputs)
    _synchronize()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        call()  # a first call loads and allocates, and waits for the whole GPU while it does
        _synchronize()
        torch.cuda._sleep(DELAY_CYCLES)  # type: ignore[no-untyped-call]
        refill()
        result = call()
        stream.synchronize()
    return result


def replayed(inputs: Inputs, remember: Remember, call: Callable[[], T]) -> T:
    """Capture ``call`` into a graph with other values in its inputs, replay it with the right
    ones. What the target decides on the host, at capture, is then wrong."""
    refill = remember()
    other_values(inputs)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    refill()
    graph.replay()
    _synchronize()
    return result
