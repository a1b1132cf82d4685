"""From products q·k to scores: scale, softcap, bias, ALiBi, and what is hidden.

Exponentials are powers of two, which is what the hardware computes: exp(s - m) is
exp2(s * unit - m * unit) with unit = log2(e). Where nothing stands between q·k and the softmax the
scale is folded into ``unit``, and a score costs one multiply-add before its exponential.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .masks import visible
from .tensors import score_offsets


class Rule(NamedTuple):
    """What makes a score of a product; None for what does not apply."""

    scale: Any
    unit: Any  # log2(e), or scale * log2(e) where the scale is folded
    softcap: Any
    alibi_slopes: Any  # pointer, (heads,) fp32
    # Not as Matrix: Triton 3.6 loses constants in tuples of tuples.
    bias: Any  # pointer, (batch, head, query, key), with its strides in elements
    bias_batch: Any
    bias_head: Any
    bias_row: Any
    bias_column: Any
    mask: Any  # the same, bool, True: visible
    mask_batch: Any
    mask_head: Any
    mask_row: Any
    mask_column: Any


@triton.jit
def tile(
    products,
    i,
    j,
    head,
    place,
    rule,
    MASKED: tl.constexpr,
    shape: tl.constexpr,
    MASK_RULE: tl.constexpr,
):
    """Scores of a tile, -inf where hidden if MASKED, and with a softcap their slope.

    i, j: positions of queries and keys, int32, that broadcast to the shape of ``products``; head:
    query head, a scalar or like i. The slope is d score / d (scale * product).
    """
    scores, slope = products, products
    if not shape.folded:
        scores = products * rule.scale
    if rule.softcap is not None:
        capped = tanh(scores / rule.softcap)
        scores, slope = capped * rule.softcap, 1.0 - capped * capped
    if rule.alibi_slopes is not None:
        distance = tl.abs(i + place.diagonal - j)
        scores -= tl.load(rule.alibi_slopes + head) * distance.to(tl.float32)
    if MASKED:
        seen = visible(i, j, head, place, rule, shape, MASK_RULE)
        if rule.bias is not None:
            pointers = rule.bias + score_offsets(
                place, head, i, j, rule.bias_batch, rule.bias_head, rule.bias_row, rule.bias_column
            )
            scores += tl.load(pointers, mask=seen, other=0.0).to(tl.float32)
        scores = tl.where(seen, scores, float("-inf"))
    return scores, slope


@triton.jit
def tanh(x):
    """tanh in fp32, with a small relative error everywhere (measured in the tests).

    From exp2 where that loses no digits; near 0 the odd polynomial of degree 11 whose relative
    error on |x| <= 0.64 is smallest, 2^-27 (Lawson's iteration).
    """
    z = x * x
    series = -0.05370965600013733 + z * (0.020538819953799248 + z * -0.005591016262769699)
    near = x + x * z * (-0.33333268761634827 + z * (0.133310928940773 + z * series))
    powers = tl.exp2(tl.abs(x) * -2.8853900817779268)  # 2 log2(e)
    far = (1.0 - powers) / (1.0 + powers)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))
