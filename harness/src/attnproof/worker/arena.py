"""The arena: one file that holds every input of a plan, each among bytes that mean NaN.

The parent writes it and the process of the target maps it. After the run the parent compares
the whole file with what it wrote: a changed input, or a write beside one, is seen without
trusting a word of the other process. Between tensors, in their gaps and around them every byte
is 0xff, which is NaN in every float format. Where guard pages are asked for, the file has room
for them right behind (or right before) every tensor; who maps it makes them inaccessible.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layout import LETTERS, expanded_shape, parse_layout, strides_for
from ..plan import Plan, Surroundings

PAGE = mmap.PAGESIZE
MARGIN = 16 * PAGE  # NaN bytes, or guard pages, between two tensors
FILL = 0xFF
SHARED_MEMORY = Path("/dev/shm")

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Where one tensor of one call lies: ``nbytes`` from byte ``start`` are its storage."""

    call: int
    name: str  # of the field of Inputs
    dtype: str  # torch's name: "float32"
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # elements of the storage before the first of the tensor
    nbytes: int
    start: int = 0
    # Strides that the target sees, in memory of its own, in place of those here: "+far".
    far: tuple[int, ...] | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def view(self, storage: Tensor) -> Tensor:
        """The tensor in its storage, uint8 (nbytes,)."""
        return storage.view(self.torch_dtype).as_strided(self.shape, self.strides, self.offset)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From plain values, through JSON."""
        read = {**values, "shape": tuple(values["shape"]), "strides": tuple(values["strides"])}
        if values["far"] is not None:
            read["far"] = tuple(values["far"])
        return cls(**read)


@dataclass(frozen=True, kw_only=True)
class ArenaMap:
    """What lies where in an arena: blocks in order, guards as (start, length) in bytes."""

    size: int
    blocks: tuple[Block, ...]
    guards: tuple[tuple[int, int], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "blocks": [vars(block) for block in self.blocks]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of ``as_dict``."""
        return cls(
            size=values["size"],
            blocks=tuple(Block.from_dict(b) for b in values["blocks"]),
            guards=tuple((a, b) for a, b in values["guards"]),
        )


def draw_map(plan: Plan) -> ArenaMap:
    """Where the inputs of a plan will lie; ValueError for a layout that is not understood."""
    blocks: list[Block] = []
    guards: list[tuple[int, int]] = []
    cursor = MARGIN
    for block in _blocks(plan):
        guard = None
        if plan.surroundings is Surroundings.GUARD_AFTER:
            end = _whole_pages(cursor + block.nbytes)
            start, guard, cursor = end - block.nbytes, end, end + MARGIN
        elif plan.surroundings is Surroundings.GUARD_BEFORE:
            guard, start = cursor, cursor + MARGIN
            cursor = _whole_pages(start + block.nbytes)
        else:
            start = cursor
            cursor = _whole_pages(start + block.nbytes) + MARGIN
        blocks.append(replace(block, start=start))
        if guard is not None:
            guards.append((guard, MARGIN))
    return ArenaMap(size=cursor + MARGIN, blocks=tuple(blocks), guards=tuple(guards))


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _blocks(plan: Plan) -> Iterator[Block]:
    for index, call in enumerate(plan.calls):
        for name, tensor in call.inputs.tensors().items():
            expanded_shape(call.problem, name)  # refuses +expand where it has no meaning
            strides, extent, offset = strides_for(tensor.shape, call.problem.layout(name))
            far = None
            if parse_layout(call.problem.layout(name)).far and extent:
                far = strides
                strides, extent, offset = strides_for(tensor.shape, LETTERS)
            yield Block(
                call=index,
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                strides=strides,
                offset=offset,
                nbytes=(offset + extent) * tensor.element_size() if extent else 0,
                far=far,
            )


class Arena:
    """An arena as its owner sees it: writes it at once, compares it at the end.

    The file has no name, so that nothing stays behind whatever happens to this process.
    OSError when there is no room for it.
    """

    def __init__(self, plan: Plan) -> None:
        self.map = draw_map(plan)
        self._plan = plan
        self._file = _room_for(self.map.size)
        self._mapping = mmap.mmap(self._file.fileno(), self.map.size)
        everything = self._bytes()
        everything[:] = FILL
        for block in self.map.blocks:
            if block.nbytes:
                block.view(self._storage(block)).copy_(self._written(block))

    def fileno(self) -> int:
        """The descriptor to map, or to hand to the process that maps it."""
        return self._file.fileno()

    def changes(self) -> list[list[str]]:
        """What is no longer as it was written, as sentences, for each call of the plan."""
        said: list[list[str]] = [[] for _ in self._plan.calls]
        blocks = self.map.blocks
        for block in blocks:
            said[block.call] += self._changes_of(block)
        everything = self._bytes()
        ends = [0, *(b.start + b.nbytes for b in blocks)]
        starts = [*(b.start for b in blocks), self.map.size]
        for i, (end, start) in enumerate(zip(ends, starts, strict=True)):
            changed = np.flatnonzero(everything[end:start] != FILL)
            if not len(changed):
                continue
            neighbours = []
            if i > 0:
                neighbours.append((int(changed[0]), "behind", blocks[i - 1]))
            if i < len(blocks):
                neighbours.append((start - end - 1 - int(changed[-1]), "before", blocks[i]))
            distance, side, block = min(neighbours, key=lambda n: n[0])
            said[block.call].append(
                f"wrote {len(changed)} bytes outside its inputs, the nearest of them "
                f"{distance} bytes {side} {block.name}"
            )
        return said

    def close(self) -> None:
        """Give the memory back."""
        # Somebody may still look at a mapping; the file's memory goes when the last one does.
        with suppress(BufferError):
            self._mapping.close()
        self._file.close()

    def _bytes(self) -> Bytes:
        return np.frombuffer(self._mapping, dtype=np.uint8)

    def _storage(self, block: Block) -> Tensor:
        return torch.from_numpy(self._bytes()[block.start : block.start + block.nbytes])

    def _written(self, block: Block) -> Tensor:
        return self._plan.calls[block.call].inputs.tensors()[block.name].detach()

    def _changes_of(self, block: Block) -> list[str]:
        if not block.nbytes:
            return []
        said = []
        written = self._written(block)
        now = block.view(self._storage(block))
        if not same_bits(now, written):
            differs = bits(now) != bits(written.contiguous())
            first = tuple(differs.nonzero()[0].tolist())
            said.append(
                f"changed its input {block.name}: {int(differs.sum())} of {differs.numel()} "
                f"elements, first at {first}"
            )
        if block.nbytes != written.numel() * written.element_size():
            # Gaps: compare with an image of the whole storage, the elements of now in place.
            image = torch.full((block.nbytes,), FILL, dtype=torch.uint8)
            block.view(image).copy_(now)
            count = int((image != self._storage(block)).sum())
            if count:
                said.append(f"wrote {count} bytes into the gaps between the rows of {block.name}")
        return said


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers of the same size: NaN equals itself, -0 differs from 0."""
    return tensor.view(_INTEGER[tensor.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits."""
    return torch.equal(bits(one), bits(other))


def _room_for(size: int) -> IO[bytes]:
    """A file without a name, its space reserved: in memory where there is room, else on disk."""
    places = [SHARED_MEMORY] if os.access(SHARED_MEMORY, os.W_OK) else []
    refused: OSError | None = None
    for place in (*places, Path(tempfile.gettempdir())):
        file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115
        try:
            if hasattr(os, "posix_fallocate"):
                # Without it a full file system would be a SIGBUS at the first touch.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                os.ftruncate(file.fileno(), size)
        except OSError as error:
            file.close()
            refused = error
        else:
            return file
    assert refused is not None
    raise OSError(refused.errno, f"no room for {size} bytes of inputs: {refused.strerror}")
