"""A cache of keys and values that grows in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.append import append as append_kernel
from .kernels.tensors import matrix
from .launch import Launch, device_of
from .tiles import padded


@torch.library.custom_op("triton_attention::append_to_cache", mutates_args=("k_cache", "v_cache"))
def append_to_cache(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    page_table: Tensor | None = None,
) -> None:
    """Write k (B, H, n, D) and v (B, H, n, Dv) behind the first ``lengths``, (B,) int32, keys.

    k_cache is (B or more, H, capacity, D), with page_table, (B, pages) int32, (pages, H, page_size,
    D), and v_cache likewise, in any strides. An operator of torch, without gradients. Raises
    ValueError, naming the argument, for what does not fit. Keys beyond the capacity or behind a
    negative length, and pages that there are not, are not written; that is noticed (ValueError) on
    the CPU alone, since reading values of a GPU would wait for it.
    """
    batch, heads, rows, width = k.shape
    pages = batch if page_table is None else page_table.shape[1]
    page_size = k_cache.shape[2]
    capacity = page_size if page_table is None else pages * page_size
    for name, cache, new in (("k_cache", k_cache, k), ("v_cache", v_cache, v)):
        found = (cache.shape[1], cache.shape[3], cache.dtype, cache.device)
        if found != (heads, new.shape[3], k.dtype, k.device) or cache.shape[2] != page_size:
            raise ValueError(
                f"{name} is {_described(cache)}: accepted is (…, {heads}, {page_size}, "
                f"{new.shape[3]}) {k.dtype} on {k.device}, as {name[0]}"
            )
    if v.shape[:3] != k.shape[:3] or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            f"v is {_described(v)}: accepted is {tuple(k.shape[:3])} and any head_dim, {k.dtype} "
            f"on {k.device}"
        )
    for name, tensor, shape in (
        ("lengths", lengths, (batch,)),
        ("page_table", page_table, (batch, pages)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != torch.int32 or tensor.device != k.device:
            raise ValueError(
                f"{name} is {_described(tensor)}: accepted is torch.int32 {shape} on {k.device}"
            )
    if page_table is None and min(k_cache.shape[0], v_cache.shape[0]) < batch:
        raise ValueError(f"k_cache has {k_cache.shape[0]} entries: accepted are {batch} or more")
    there_are = min(k_cache.shape[0], v_cache.shape[0])
    if k.device.type == "cpu" and lengths.numel():
        refuse_outside("lengths", lengths, capacity - rows, f"the room for {rows} new keys")
        if page_table is not None and rows:
            keys = lengths[:, None] + torch.arange(rows)
            written = page_table.gather(1, keys // page_size)
            refuse_outside("page_table", written, there_are - 1, "the pages of the cache")
    table = None if page_table is None else page_table.contiguous()
    launch = Launch(
        kernel=append_kernel,
        grid=(rows * heads * batch,),
        arguments={
            "k": matrix(k),
            "v": matrix(v),
            "k_cache": matrix(k_cache),
            "v_cache": matrix(v_cache),
            "lengths": lengths.contiguous(),
            "table": table,
            "table_row": pages,
            "page_size": page_size,
            "capacity": capacity,
            "pages": there_are,
            "rows": rows,
            "heads": heads,
            "WIDTH": width,
            "WIDTH_V": v.shape[3],
            "PADDED": padded(width),
            "PADDED_V": padded(v.shape[3]),
        },
        options={"num_warps": 1},
    )
    with device_of(k):
        launch.run()


def refuse_outside(name: str, values: Tensor, most: int, what: str) -> None:
    """ValueError for values below 0 or above ``most``, which reads them."""
    if not values.numel():
        return
    low, high = (int(bound) for bound in values.aminmax())
    if low < 0 or high > most:
        raise ValueError(
            f"{name} has values from {low} to {high}: accepted are 0 to {most}, {what}"
        )


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


@append_to_cache.register_fake
def _(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    page_table: Tensor | None = None,
) -> None:
    return None
