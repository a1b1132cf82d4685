"""New keys and values written into a cache behind those that it holds."""

import triton
import triton.language as tl

from .tensors import at


@triton.jit(do_not_specialize=["table_row", "page_size", "capacity", "pages", "rows", "heads"])
def append(
    k, v, k_cache, v_cache, lengths, table, table_row, page_size, capacity, pages, rows, heads,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr,
):  # fmt: skip
    """Row t of k and v (batch, head, row) becomes key lengths[batch] + t of the cache.

    The cache is (page, head, row): key n is row n % page_size of the page table[batch, n //
    page_size], or of the page ``batch`` where there is no table. What does not fit into its
    ``capacity``, or into one of the ``pages`` that there are, is not written, and nothing behind a
    negative length: no value of a tensor leads out of the cache. Grid: one program per row, head
    and batch entry.
    """
    program = tl.program_id(0)
    row, rest = program % rows, program // rows
    head, batch = rest % heads, rest // heads
    length = tl.load(lengths + batch)
    key = length + row
    fits = (length >= 0) & (key >= 0) & (key < capacity)  # a sum of 32 bits may be negative
    page = batch
    if table is not None:
        entry = table + batch.to(tl.int64) * table_row
        page = tl.load(entry + key // page_size, mask=fits, other=0)
        fits = fits & (page >= 0) & (page < pages)
    place = (key % page_size).to(tl.int64)
    row = row.to(tl.int64)
    new, old = at(k, batch, head) + row * k.row, at(k_cache, page, head) + place * k_cache.row
    _copy(new, k.column, old, k_cache.column, fits, WIDTH, PADDED)
    new, old = at(v, batch, head) + row * v.row, at(v_cache, page, head) + place * v_cache.row
    _copy(new, v.column, old, v_cache.column, fits, WIDTH_V, PADDED_V)


@triton.jit
def _copy(source, step, target, target_step, fits, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    inside = (columns < WIDTH) & fits
    values = tl.load(source + columns.to(tl.int64) * step, mask=inside)
    tl.store(target + columns.to(tl.int64) * target_step, values, mask=inside)
