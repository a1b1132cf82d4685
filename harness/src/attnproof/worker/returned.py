"""What a call returned: is it a plain tensor, whose memory is it, does it stay as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .arena import same_bits

# What the judge can compare, and the parent takes.
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)

# Taken before any target is loaded, for code that patches the methods of Tensor.
_detach = torch.Tensor.detach
_data_ptr = torch.Tensor.data_ptr


def not_plain(value: Any, device: str) -> str | None:
    """Why ``value`` is not a plain dense tensor on that device, or None.

    ``type`` cannot be deceived by ``__class__``, and nothing of the value itself runs: a
    subclass may compute when it is looked at.
    """
    if type(value) is not Tensor:
        return f"a {type(value).__module__}.{type(value).__qualname__}, not a torch.Tensor"
    if value.layout != torch.strided:
        return f"a tensor of layout {value.layout}, not a dense one"
    if value.is_nested:
        return "a nested tensor, not a dense one"
    if value.device.type != device:
        return f"a tensor on {value.device}, not on {device}"
    if value.dtype not in DTYPES:
        return f"a tensor of dtype {value.dtype}"
    if torch._is_functional_tensor(value) or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return "a wrapped tensor, not a plain one"
    if value.numel() and _span(value) > value.untyped_storage().nbytes():
        return "a tensor that reaches beyond the end of its storage"
    return None


def _span(tensor: Tensor) -> int:
    """Bytes from the start of its storage to the end of a non-empty tensor."""
    start, end = _extent(tensor)
    return int(tensor.storage_offset()) * tensor.element_size() + end - start


@dataclass(kw_only=True)
class Returned:
    """The plain tensors that one call returned, by what they are: "out", "lse", "dq", …"""

    live: dict[str, Tensor]  # as they were returned; kept, so that memory used again shows
    copies: dict[str, Tensor] = field(default_factory=dict)  # on the CPU, contiguous

    def __post_init__(self) -> None:
        for name, tensor in self.live.items():
            self.copies[name] = snapshot(tensor)

    def changed(self) -> list[str]:
        """Names of those that are no longer what they were when the call returned."""
        return [
            name
            for name, tensor in self.live.items()
            if not same_bits(snapshot(tensor), self.copies[name])
        ]


def snapshot(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares no memory with the tensor."""
    plain = _detach(tensor).resolve_conj().resolve_neg()
    copy = torch.empty(plain.shape, dtype=plain.dtype, device="cpu")
    copy.copy_(plain)
    return copy


def shared_memory(
    returned: Mapping[str, Tensor], others: Iterable[tuple[str, Tensor]]
) -> Iterator[str]:
    """Sentences for each returned tensor that lies in the memory of one of the others."""
    taken = [(name, *_extent(tensor)) for name, tensor in others if tensor.numel()]
    for name, tensor in returned.items():
        if not tensor.numel():
            continue
        start, end = _extent(tensor)
        for other, other_start, other_end in taken:
            if start < other_end and other_start < end:
                yield f"{name} shares memory with {other}"


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a non-empty tensor and the one past its last."""
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = _data_ptr(tensor)
    return start, start + span * tensor.element_size()
