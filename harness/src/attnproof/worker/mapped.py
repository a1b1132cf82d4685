"""The arena as the target sees it: tensors over the mapped file, guard pages, device copies."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_reference.inputs import Inputs

from .arena import ArenaMap, Block

PROT_NONE = 0
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap has it from Python 3.13 on


class MappedArena:
    """An arena mapped into this process: ``inputs`` has the tensors of each call.

    Each tensor has a storage of its own, exact strides, and is no view of another tensor. On
    the CPU they lie in the shared file itself, between its guard pages; on a GPU in one copy
    of it, which ``write_back`` copies back for comparison.
    """

    def __init__(self, descriptor: int, arena: ArenaMap, device: str) -> None:
        mapping = mmap.mmap(descriptor, arena.size)
        self._file = torch.frombuffer(mapping, dtype=torch.uint8)
        self._copy: Tensor | None = None
        if device == "cpu":
            for start, length in arena.guards:
                make_inaccessible(self._file.data_ptr() + start, length)
            part: Callable[[int, int], Tensor] = lambda start, n: torch.frombuffer(  # noqa: E731
                mapping, dtype=torch.uint8, offset=start, count=n
            )
        else:
            self._copy = self._file.to(device)
            part = _device_part(self._copy)
        fields: dict[int, dict[str, Tensor]] = {}
        for block in arena.blocks:
            fields.setdefault(block.call, {})[block.name] = _tensor(block, part, device)
        self.inputs = [Inputs(**fields[call]) for call in sorted(fields)]

    def remember(self) -> Callable[[], None]:
        """Remember the bytes on the device; what is returned writes them again, without waiting
        for the device (as a copy from the file would)."""
        assert self._copy is not None
        copy, remembered = self._copy, self._copy.clone()

        def refill() -> None:
            copy.copy_(remembered)

        return refill

    def write_back(self) -> None:
        """Copy the device's bytes into the file, for whoever compares them."""
        if self._copy is not None:
            self._file.copy_(self._copy)


def _tensor(block: Block, part: Callable[[int, int], Tensor], device: str) -> Tensor:
    dtype = block.torch_dtype
    if not block.nbytes:
        return torch.empty_strided(block.shape, block.strides, dtype=dtype, device=device)
    if block.far is not None:
        return _far(block, part(block.start, block.nbytes), device)
    storage = part(block.start, block.nbytes).untyped_storage()
    # set_ and not as_strided: a view would carry its base and share its version counter.
    tensor: Tensor = torch.empty(0, dtype=dtype, device=device).set_(
        storage, block.offset, block.shape, block.strides
    )
    return tensor


def _far(block: Block, compact: Tensor, device: str) -> Tensor:
    """A copy of a tensor with strides that reach beyond 2^31 elements, in memory that on the
    CPU takes no more than the pages that the copy touches. What becomes of it is not compared."""
    assert block.far is not None
    extent = sum((n - 1) * s for n, s in zip(block.shape, block.far, strict=True)) + 1
    nbytes = extent * block.torch_dtype.itemsize
    if device == "cpu":
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE
        try:
            memory = torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)
        except OSError as error:
            raise torch.OutOfMemoryError(f"{nbytes} bytes of address space: {error}") from None
    else:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
    tensor: Tensor = torch.empty(0, dtype=block.torch_dtype, device=device).set_(
        memory.untyped_storage(), 0, block.shape, block.far
    )
    return tensor.copy_(block.view(compact))


class _DeviceBytes:
    """A run of bytes on a GPU, for torch to wrap into a storage of its own."""

    def __init__(self, owner: Tensor, start: int, count: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (count,),
            "typestr": "|u1",
            "data": (owner.data_ptr() + start, False),
            "version": 3,
        }


def _device_part(copy: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, n: torch.as_tensor(_DeviceBytes(copy, start, n), device=copy.device)


def make_inaccessible(address: int, length: int) -> None:
    """Take every access to these pages away from this process (mprotect); OSError if refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    mprotect = libc.mprotect
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if mprotect(address, length, PROT_NONE):
        errno = ctypes.get_errno()
        raise OSError(errno, f"mprotect of {length} bytes at {address:#x} failed")
