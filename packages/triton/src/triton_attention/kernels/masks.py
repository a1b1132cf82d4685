"""Which keys a query sees: the file to change for another mask.

A *mask rule* is a device function ``rule(i, j, head, batch)`` that says, for query positions i and
key positions j that broadcast against each other, whether the key is visible. Write one with
``@triton.jit`` and pass it: ``attention(q, k, v, mask_rule=rule)``. It is joined with everything
else that hides keys, in forward and backward.

Causality and windows are one rule, the *band*: key j is visible to query i when
-left <= j - (i + diagonal) <= right. It also knows which tiles it hides altogether, so that they
are skipped, and which it shows altogether, so that nothing is masked there.
"""

import triton
import triton.language as tl

from .tensors import score_offsets


@triton.jit
def visible(i, j, head, place, rule, shape: tl.constexpr, MASK_RULE: tl.constexpr):
    """Whether query i sees key j, for positions that broadcast against each other."""
    seen = (i < place.len_q) & (j < place.len_k)
    if shape.bounded_left:
        seen &= j >= i + place.diagonal - place.left
    if shape.bounded_right:
        seen &= j <= i + place.diagonal + place.right
    if MASK_RULE is not None:
        seen &= MASK_RULE(i, j, head, place.batch)
    if rule.mask is not None:
        pointers = rule.mask + score_offsets(
            place, head, i, j, rule.mask_batch, rule.mask_head, rule.mask_row, rule.mask_column
        )
        seen &= tl.load(pointers, mask=seen, other=0) != 0
    return seen


@triton.jit
def key_range(first_row, last_row, place, shape: tl.constexpr, BLOCK: tl.constexpr):
    """What the band leaves of the keys for rows first_row to last_row, in tiles of BLOCK keys.

    (begin, whole, edge, end): keys before ``begin`` and from ``end`` on are hidden from every row,
    keys from ``whole`` up to ``edge`` visible to every row. All but ``end`` are multiples of BLOCK.
    """
    begin, whole = 0, 0
    if shape.bounded_left:
        begin = tl.maximum(first_row + place.diagonal - place.left, 0) // BLOCK * BLOCK
        whole = tl.cdiv(tl.maximum(last_row + place.diagonal - place.left, 0), BLOCK) * BLOCK
    end, edge = place.len_k, place.len_k
    if shape.bounded_right:
        end = tl.minimum(tl.maximum(last_row + place.diagonal + place.right + 1, 0), end)
        edge = tl.minimum(tl.maximum(first_row + place.diagonal + place.right + 1, 0), edge)
    edge = edge // BLOCK * BLOCK
    whole = tl.minimum(whole, tl.cdiv(end, BLOCK) * BLOCK)
    return begin, whole, tl.maximum(edge, whole), end


@triton.jit
def query_range(first_key, last_key, place, shape: tl.constexpr, BLOCK: tl.constexpr):
    """The same of the queries for keys first_key to last_key, in tiles of BLOCK queries."""
    begin, whole = 0, 0
    if shape.bounded_right:
        begin = tl.maximum(first_key - place.diagonal - place.right, 0) // BLOCK * BLOCK
        whole = tl.cdiv(tl.maximum(last_key - place.diagonal - place.right, 0), BLOCK) * BLOCK
    end, edge = place.len_q, place.len_q
    if shape.bounded_left:
        end = tl.minimum(tl.maximum(last_key - place.diagonal + place.left + 1, 0), end)
        edge = tl.minimum(tl.maximum(first_key - place.diagonal + place.left + 1, 0), edge)
    edge = edge // BLOCK * BLOCK
    whole = tl.minimum(whole, tl.cdiv(end, BLOCK) * BLOCK)
    return begin, whole, tl.maximum(edge, whole), end
