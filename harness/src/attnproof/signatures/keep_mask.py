"""What dropout kept, read out of a function that does not say it.

With V replaced by columns of the identity, under the same state of torch's generators, out
is the dropped probabilities themselves, and zero where nothing was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from attn_reference.inputs import Attention, Inputs
from attn_reference.problem import Problem

# A one in V this large keeps small probabilities above the underflow of a 16-bit out.
ONE = 2.0**14


def with_keep_mask(
    call: Callable[[Inputs, Problem], Attention], inputs: Inputs, problem: Problem
) -> Attention:
    """The attention of ``call``, with what its dropout kept.

    A function that returns no keep mask is called again: once as before, to see that torch's
    generators alone decide what is kept, then with columns of the identity in place of V, in
    V's own shape and strides so that the same kernel runs. Raises NotImplementedError when the
    second call gives another answer.
    """
    if problem.dropout == 0:
        return call(inputs, problem)
    device = inputs.q.device
    before = _generators(device)
    result = call(inputs, problem)
    if result.keep_mask is not None:
        return result
    with _restored(before, device):
        again = call(inputs, problem)
    if not torch.equal(result.out.nan_to_num(), again.out.nan_to_num()):
        raise NotImplementedError(
            "what dropout kept is not known: the target returns no keep mask, and a second call "
            "under the same state of torch's random generators gives another answer"
        )
    kept = [result.out.new_empty((*result.out.shape[:-1], 0), dtype=torch.bool)]
    for columns in _identity_columns(inputs.v):
        with _restored(before, device):
            dropped = call(replace(inputs, v=columns), problem).out.detach()
        kept.append(dropped != 0)
    return replace(result, keep_mask=torch.cat(kept, -1)[..., : inputs.v.shape[2]])


def _identity_columns(v: Tensor) -> Iterator[Tensor]:
    """Tensors like v (B, H, Sk, Dv) that hold columns [0, Dv), [Dv, 2 Dv) … of the identity."""
    keys, width = v.shape[2:]
    for start in range(0, keys, width):
        columns = torch.empty_strided(v.size(), v.stride(), dtype=v.dtype, device=v.device)
        columns.zero_()
        height = min(width, keys - start)
        columns[:, :, start : start + height].diagonal(dim1=-2, dim2=-1).fill_(ONE)
        yield columns.requires_grad_(v.requires_grad)


def _generators(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


@contextmanager
def _restored(states: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Run under these states of the generators, and leave those that were found."""
    found = _generators(device)
    _set(states, device)
    try:
        yield
    finally:
        _set(found, device)


def _set(states: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
