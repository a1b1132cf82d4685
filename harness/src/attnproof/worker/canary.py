"""Canaries: what the target allocates through torch gets a strip of known bytes on each side.

A kernel that writes past the end of its own output, or of a buffer that it made with torch,
hits the strip; one that reads past the end reads NaN. Memory asked for uninitialised is NaN
throughout, so that an element that is never written shows. Seen are the factories that pass
torch's dispatcher, from Python and from C++ extensions alike, in the backward too; not seen
is memory that a torch operator allocates within its own kernel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

STRIP = 4096  # bytes on each side; keeps every alignment that torch gives
FILL = 0xFF
HELD_BYTES = 1 << 28  # allocations kept alive until they are looked at

_aten = torch.ops.aten
UNINITIALISED = frozenset(
    {
        _aten.empty.memory_format,
        _aten.empty_strided.default,
        _aten.empty_like.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
        _aten.empty_permuted.default,
    }
)
INITIALISED = frozenset(
    {
        _aten.zeros.default,
        _aten.zeros_like.default,
        _aten.new_zeros.default,
        _aten.ones.default,
        _aten.ones_like.default,
        _aten.new_ones.default,
        _aten.full.default,
        _aten.full_like.default,
        _aten.new_full.default,
    }
)


@dataclass
class _Allocation:
    surrounded: Tensor  # uint8: strip, tensor, strip
    description: str
    itemsize: int

    def complaints(self) -> list[str]:
        """What was written into the strips, as sentences."""
        bytes_ = self.surrounded
        if bytes_.untyped_storage().nbytes() != bytes_.numel():
            return []  # resized since: the strips belong to the tensor now
        said = []
        for strip, where in (
            (bytes_[:STRIP], "before the start"),
            (bytes_[-STRIP:], "past the end"),
        ):
            touched = (strip != FILL).nonzero().flatten()
            if count := len(torch.unique(touched // self.itemsize)):
                unit = "element" if count == 1 else "elements"
                said.append(f"wrote {count} {unit} {where} of {self.description}")
        return said


class CanaryAllocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, surrounds what torch's factories give; ``complaints`` says what was hit."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held: deque[_Allocation] = deque()
        self._held_bytes = 0
        self._said: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True, the default, imports the whole compiler at the first allocation

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A target that compiles itself does so as it does without canaries."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator; give the result of a factory its surroundings."""
        given = func(*args, **(kwargs or {}))
        if func in UNINITIALISED or func in INITIALISED:
            return self._surround(given, keep=func in INITIALISED)
        return given

    def complaints(self) -> list[str]:
        """What was written beside an allocation since the last time, as sentences."""
        while self._held:
            self._release()
        said, self._said = self._said, []
        return said

    def _surround(self, given: Tensor, *, keep: bool) -> Tensor:
        if type(given) is not Tensor or given.layout != torch.strided or not given.numel():
            return given
        if given.device.type == "meta":
            return given
        span = sum((n - 1) * s for n, s in zip(given.shape, given.stride(), strict=True)) + 1
        itemsize = given.element_size()
        size = STRIP + span * itemsize + STRIP
        surrounded = torch.full((size,), FILL, dtype=torch.uint8, device=given.device)
        tensor: Tensor = torch.empty(0, dtype=given.dtype, device=given.device).set_(
            surrounded.untyped_storage(), STRIP // itemsize, given.shape, given.stride()
        )
        if keep:
            tensor.copy_(given)
        dtype = str(given.dtype).removeprefix("torch.")
        description = f"a {dtype} tensor of shape {tuple(given.shape)} that it allocated"
        self._held.append(_Allocation(surrounded, description, itemsize))
        self._held_bytes += size
        while self._held_bytes > HELD_BYTES and not _capturing(given):
            self._release()
        return tensor

    def _release(self) -> None:
        oldest = self._held.popleft()
        self._held_bytes -= oldest.surrounded.numel()
        self._said += oldest.complaints()


def _capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured: nothing can be looked at before its replay."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
