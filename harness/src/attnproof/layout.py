"""Memory layouts by name: from "bshd+offset" to strides.

A layout names the dimensions from the outermost to the innermost in memory, whatever their
logical order is: "bhsd" is contiguous, "bshd" keeps the heads of a position together, "bhds"
makes the head dimension strided. Tensors of fewer dimensions read the letters that they have
("bshd" puts an LSE in the order "bsh"); those of a mask or bias stand for its four dimensions
in order. Suffixes: "+offset" (the tensor starts one element into its storage, which takes
every alignment but the element's away), "+gap" (rows of the innermost dimension are
separated by gaps), "+expand" (mask and bias: the broadcast dimensions are there in full,
through stride 0; "expand" alone is "bhsd+expand"), "+far" (the entries of the outermost
dimension that has several are spread over 2^31 elements, so that offsets overflow 32 bits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attn_reference.inputs import key_count, output_shape
from attn_reference.problem import Problem

LETTERS = "bhsd"
SUFFIXES = ("offset", "gap", "expand", "far")
EXPANDABLE = ("mask", "bias")
OFFSET_ELEMENTS = 1
GAP_ELEMENTS = 16  # keeps the alignment of rows: a kernel may well need 16 bytes
FAR_ELEMENTS = 1 << 31
FAR_ALIGNMENT = 64

ACCEPTED = (
    f"an order of the letters {LETTERS}, from the outermost to the innermost in memory, "
    f"then any of {', '.join('+' + s for s in SUFFIXES)}; or 'expand'"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout, understood: the order of the letters and the suffixes."""

    order: str = LETTERS
    offset: bool = False
    gap: bool = False
    expand: bool = False
    far: bool = False


def parse_layout(text: str) -> Layout:
    """The layout of that name; ValueError says what is accepted."""
    order, *suffixes = text.split("+")
    if order == "expand":
        order, suffixes = LETTERS, ["expand", *suffixes]
    if sorted(order) != sorted(LETTERS):
        raise ValueError(f"layout {text!r}: {order!r} is not understood; accepted is {ACCEPTED}")
    for suffix in suffixes:
        if suffix not in SUFFIXES or suffixes.count(suffix) > 1:
            raise ValueError(
                f"layout {text!r}: '+{suffix}' is unknown or repeated; accepted is {ACCEPTED}"
            )
    return Layout(order=order, **{s: s in suffixes for s in SUFFIXES})


def strides_for(shape: Sequence[int], layout: str) -> tuple[tuple[int, ...], int, int]:
    """Where a tensor of this shape lies: (strides, extent, offset), all in elements.

    extent counts from the first element to the last, gaps between them included, and is 0
    for an empty tensor; a storage holds offset + extent elements. With "+expand" the
    dimensions of size 1 get stride 0. ValueError for an unknown layout or over 4 dimensions.
    """
    if len(shape) > len(LETTERS):
        raise ValueError(f"shape={tuple(shape)}: a layout has at most {len(LETTERS)} dimensions")
    parsed = parse_layout(layout)
    strides = [0] * len(shape)
    step = 1
    innermost = True
    for letter in reversed(parsed.order):
        dim = LETTERS.index(letter)
        if dim >= len(shape):
            continue
        strides[dim] = step
        step *= max(1, shape[dim])
        if innermost and parsed.gap:
            step += GAP_ELEMENTS
        innermost = False
    if parsed.far:
        dims = (LETTERS.index(letter) for letter in parsed.order)
        outermost = next((d for d in dims if d < len(shape) and shape[d] > 1), None)
        if outermost is not None:
            units = -(-FAR_ELEMENTS // (shape[outermost] - 1)) // FAR_ALIGNMENT + 1
            strides[outermost] = max(strides[outermost], units * FAR_ALIGNMENT)
    if parsed.expand:
        strides = [0 if n == 1 else s for n, s in zip(shape, strides, strict=True)]
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    extent = 0 if 0 in shape else last + 1
    return tuple(strides), extent, OFFSET_ELEMENTS if parsed.offset else 0


def expanded_shape(problem: Problem, tensor: str) -> tuple[int, ...] | None:
    """The shape that a mask or bias is expanded to, (B, Hq, Sq, Sk); None when it is not.

    ValueError when the layout of another tensor asks for it.
    """
    layout = problem.layout(tensor)
    if not parse_layout(layout).expand:
        return None
    if tensor not in EXPANDABLE:
        raise ValueError(
            f"layout {layout!r} of {tensor}: +expand is for {' and '.join(EXPANDABLE)}"
        )
    batch, heads, rows, _ = output_shape(problem)
    return (batch, heads, rows, key_count(problem))
