"""The memory of interpreted kernels: every access is checked and counted.

A pointer is an index into the tensor that it came from, not an address. So what it may address goes
with it wherever it is added to, reshaped or carried, and loads and stores are indexing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock

from .accesses import OBSERVERS, OutOfBounds, Region
from .short_floats import Array, to_bfloat16


class Handle(stock.TensorHandle):  # type: ignore[misc]
    """An array with its Triton dtype; that of pointers has int64 indices into their region.

    Pointers without a region come from no tensor argument, or from more than one.
    """

    def __init__(self, data: Array, dtype: Any, region: Region | None = None) -> None:
        self.data, self.dtype, self.region = data, dtype, region


def like(handle: Any, data: Array) -> Handle:
    """Other elements of the same dtype, or pointers into the same region."""
    return Handle(data, handle.dtype.scalar, getattr(handle, "region", None))


@cache
def array_dtype(dtype: Any) -> np.dtype[Any]:
    """Of the array that holds numbers of a Triton dtype."""
    found: np.dtype[Any] = stock._get_np_dtype(dtype)
    return found


class Memory(stock.InterpreterBuilder):  # type: ignore[misc]
    """Pointers, loads, stores and atomic operations, and the shapes of what is loaded."""

    # Shapes, which take pointers along

    def create_splat(self, ret_ty: Any, arg: Any) -> Handle:
        """A scalar, seen in every place."""
        shape, data = tuple(ret_ty.shape), arg.data
        return like(arg, np.ndarray(shape, data.dtype, data, strides=(0,) * len(shape)))

    def create_broadcast(self, arg: Any, shape: Sequence[int]) -> Handle:
        """Dimensions of size 1, seen in every place."""
        return like(arg, np.broadcast_to(arg.data, tuple(shape)))

    def create_expand_dims(self, arg: Any, axis: int) -> Handle:
        """One more dimension of size 1."""
        return like(arg, arg.data[(slice(None),) * axis + (None,)])

    def create_reshape(self, arg: Any, shape: Sequence[int], allow_reorder: bool) -> Handle:
        """In row-major order."""
        return like(arg, arg.data.reshape(tuple(shape)))

    def create_trans(self, arg: Any, perm: Sequence[int]) -> Handle:
        """Dimensions permuted."""
        return like(arg, arg.data.transpose(tuple(perm)))

    def create_select(self, cond: Any, lhs: Any, rhs: Any) -> Handle:
        """Bits are unchanged; of pointers into two regions none is left."""
        result = like(lhs, np.where(cond.data, lhs.data, rhs.data))
        if result.region is not getattr(rhs, "region", None):
            result.region = None
        return result

    # Pointers

    def create_addptr(self, ptr: Any, offset: Any) -> Handle:
        """Some elements further."""
        return like(ptr, ptr.data + offset.data.astype(np.int64, copy=False))

    def create_bitcast(self, src: Any, dst_type: Any) -> Handle:
        """The same bits; a pointer to elements of another size loses its region."""
        target = dst_type.scalar
        if not target.is_ptr():
            return Handle(src.data.view(array_dtype(target)), target)
        return Handle(src.data, target, src.region if _size(src.dtype) == _size(target) else None)

    def create_ptr_to_int(self, src: Any, dst_type: Any) -> Handle:
        """The address."""
        return self.create_bitcast(_address(src), dst_type)

    def create_int_to_ptr(self, src: Any, dst_type: Any) -> Handle:
        """A pointer that may address nothing."""
        return Handle(src.data, dst_type.scalar)

    # Accesses

    def create_load(self, ptr: Any, *hints: Any) -> Handle:
        """All elements."""
        region, indices = self._addressed("load", ptr, None)
        return _loaded(ptr, region.bits[indices])

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *hints: Any) -> Handle:
        """Elements whose mask is true, elsewhere ``other``, or 0 where there is none."""
        if mask.data.all():
            return self.create_load(ptrs)
        region, indices = self._addressed("load", ptrs, mask.data)
        if other is None:
            bits = np.zeros(ptrs.data.shape, region.bits.dtype)
        else:
            bits = other.data.view(region.bits.dtype).copy()
        bits[mask.data] = region.bits[indices]
        return _loaded(ptrs, bits)

    def create_store(self, ptr: Any, val: Any, *hints: Any) -> None:
        """All elements; of several to one place the last stays."""
        region, indices = self._addressed("store", ptr, None)
        region.bits[indices] = val.data.view(region.bits.dtype)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *hints: Any) -> None:
        """Elements whose mask is true."""
        region, indices = self._addressed("store", ptrs, mask.data)
        region.bits[indices] = value.data.view(region.bits.dtype)[mask.data]

    def create_atomic_rmw(
        self, rmwOp: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any
    ) -> Handle:
        """One element after the other."""
        if val.dtype.is_bf16():
            raise NotImplementedError("atomic addition of bf16 is not interpreted: add fp32")
        self._addressed("atomic", ptr, mask.data)
        operands = map(_dense, (_address(ptr), val, mask))
        return like(val, super().create_atomic_rmw(rmwOp, *operands, sem, scope).data)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Handle:
        """One element after the other."""
        self._addressed("atomic", ptr, None)
        operands = map(_dense, (_address(ptr), cmp, val))
        return like(val, super().create_atomic_cas(*operands, sem, scope).data)

    def _addressed(self, access: str, ptr: Any, mask: Array | None) -> tuple[Region, Array]:
        """The region and the indices that are accessed, checked and counted."""
        region = getattr(ptr, "region", None)
        if region is None:
            raise OutOfBounds(
                f"{access} in program {self.grid_idx}: its pointer comes from no tensor argument, "
                "or from more than one"
            )
        indices = ptr.data if mask is None else ptr.data[mask]
        region.check(access, indices, self.grid_idx)
        for accesses in OBSERVERS:
            if access != "store":
                accesses.load(region, indices.size)
            if access != "load":
                accesses.store(region, indices.size)
        return region, indices

    # Blocks of a tensor: descriptors and block pointers

    def create_make_tensor_descriptor(
        self, base: Any, shape: Any, strides: Any, tensor_shape: Any, is_signed: Any, padding: Any
    ) -> Any:
        """ValueError where TMA would not accept it."""
        if _address(base).data.item() % 16:
            raise ValueError("the base of a tensor descriptor must be aligned to 16 bytes")
        if any(stride.data.item() * _size(base.dtype) % 16 for stride in strides[:-1]):
            raise ValueError("the strides of a tensor descriptor must be multiples of 16 bytes")
        return stock.TensorDescHandle(base, shape, strides, tensor_shape, padding)

    def create_descriptor_load(self, desc: Any, indices: Any, *hints: Any) -> Handle:
        """A block, padded beyond the end of the tensor."""
        return self._load_block(desc, indices, range(desc.ndim), desc.padding)

    def create_descriptor_store(self, desc: Any, value: Any, indices: Any) -> None:
        """A block, up to the end of the tensor."""
        pointers, inside = _block(desc, indices, range(desc.ndim))
        self.create_masked_store(pointers, value, inside)

    def create_tensor_pointer_load(
        self, ptr: Any, boundary_check: Any, padding_option: Any, *hints: Any
    ) -> Handle:
        """A block, padded beyond the end of the tensor in the dimensions that are checked."""
        return self._load_block(ptr, ptr.offsets, boundary_check, padding_option)

    def create_tensor_pointer_store(
        self, ptr: Any, value: Any, boundary_check: Any, *hints: Any
    ) -> None:
        """A block, up to the end of the tensor in the dimensions that are checked."""
        pointers, inside = _block(ptr, ptr.offsets, boundary_check)
        self.create_masked_store(pointers, value, inside)

    def _load_block(self, block: Any, offsets: Any, checked: Any, padding: Any) -> Handle:
        pointers, inside = _block(block, offsets, checked)
        other = None
        if padding == ir.PADDING_OPTION.PAD_NAN:
            element = pointers.get_element_ty()
            nan = np.full(pointers.data.shape, math.nan, np.float32)
            number = to_bfloat16(nan) if element.is_bf16() else nan.astype(array_dtype(element))
            other = Handle(number, element)
        return self.create_masked_load(pointers, inside, other)


def _size(pointer: Any) -> int:
    """Bytes of what a pointer points to."""
    return max(1, int(pointer.element_ty.primitive_bitwidth) // 8)


def _loaded(pointer: Any, bits: Array) -> Handle:
    element = pointer.get_element_ty()
    return Handle(bits.view(array_dtype(element)), element)


def _address(pointer: Any) -> Handle:
    region = pointer.region
    return Handle((pointer.data * region.itemsize + region.address).astype(np.uint64), tl.uint64)


def _dense(handle: Any) -> Handle:
    """Triton's atomic operations do not heed strides."""
    return like(handle, np.ascontiguousarray(handle.data))


def _block(block: Any, offsets: Any, checked: Iterable[int]) -> tuple[Handle, Handle]:
    """Pointers to a block of a tensor, and which of them are inside of it where that is checked."""
    shape = tuple(block.block_shape)
    indices, inside = block.base.data, np.True_
    for axis, extent in enumerate(shape):
        along = [1] * len(shape)
        along[axis] = extent
        place = (offsets[axis].data.astype(np.int64) + np.arange(extent)).reshape(along)
        indices = indices + place * block.strides[axis].data
        if axis in checked:
            inside = inside & (place >= 0) & (place < block.shape[axis].data)
    return like(block.base, indices), Handle(np.broadcast_to(inside, shape), tl.int1)
