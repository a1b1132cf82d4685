"""Tensors as kernels get them: a pointer with its strides, and how tiles are loaded and stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Matrix(NamedTuple):
    """A tensor (batch, head, row, column): its pointer, and its strides in elements.

    Scores are (batch, head, query, key); what broadcasts has stride 0. All None: no such tensor.
    """

    ptr: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Vector(NamedTuple):
    """A tensor (batch, head, row), such as the LSE: its pointer, and its strides in elements."""

    ptr: Any
    batch: Any
    head: Any
    row: Any


NO_MATRIX = Matrix(None, None, None, None, None)
NO_VECTOR = Vector(None, None, None, None)


def matrix(tensor: Tensor | None) -> Matrix:
    """A tensor of four dimensions for a kernel; a dimension of size 1 broadcasts."""
    return NO_MATRIX if tensor is None else Matrix(tensor, *_strides(tensor))


def vector(tensor: Tensor | None) -> Vector:
    """A tensor of three dimensions for a kernel; a dimension of size 1 broadcasts."""
    return NO_VECTOR if tensor is None else Vector(tensor, *_strides(tensor))


def _strides(tensor: Tensor) -> tuple[int, ...]:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple(0 if size == 1 else stride for size, stride in sizes)


@triton.jit
def at(tensor, batch, head):
    """Pointer to row 0 (column 0) of one batch entry and head; offsets are 64 bits wide."""
    return tensor.ptr + batch.to(tl.int64) * tensor.batch + head.to(tl.int64) * tensor.head


@triton.jit
def first_row(batch, head, heads, rows):
    """Offset of row 0 of a batch entry and head in a contiguous tensor (batch, head, row)."""
    return (batch.to(tl.int64) * heads + head) * rows


@triton.jit
def score_offsets(place, query_head, i, j, batch, head, row, column):
    """Offsets, by these strides, of query i and key j in a tensor (batch, head, query, key)."""
    start = place.entry.to(tl.int64) * batch + query_head.to(tl.int64) * head
    rows = (i + place.start_q).to(tl.int64) * row
    return start + rows + (j + place.start_k).to(tl.int64) * column


@triton.jit
def load_rows(start, offsets, column, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a matrix as a tile [R, PADDED]; 0 beyond WIDTH columns and where not ``inside``.

    start: pointer to row 0; offsets: of the rows, int64 [R]; column: stride; inside: bool [R], or
    None when all are.
    """
    columns = tl.arange(0, PADDED)
    pointers = start + offsets[:, None] + (columns.to(tl.int64) * column)[None, :]
    if inside is None:
        if WIDTH == PADDED:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=columns[None, :] < WIDTH, other=0.0)
    else:
        if WIDTH == PADDED:
            tile = tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=inside[:, None] & (columns[None, :] < WIDTH), other=0.0)
    return tile


@triton.jit
def store_rows(tile, start, offsets, column, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A tile [R, PADDED] to the rows of a matrix that are ``inside``, in the matrix' dtype."""
    columns = tl.arange(0, PADDED)
    pointers = start + offsets[:, None] + (columns.to(tl.int64) * column)[None, :]
    stored = inside[:, None]
    if WIDTH != PADDED:
        stored = stored & (columns[None, :] < WIDTH)
    tl.store(pointers, tile.to(start.dtype.element_ty), mask=stored)
