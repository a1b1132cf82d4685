"""What one call of ``attention`` was asked for: its tensors and options, checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, SupportsIndex

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CAUSAL = ("none", "top-left", "bottom-right")
LARGEST_HEAD_DIM = 256
Window = tuple[int | None, int | None]
TENSORS = (
    *("q", "k", "v", "alibi_slopes", "mask", "bias", "sinks"),
    *("key_lengths", "cu_seqlens_q", "cu_seqlens_k", "page_table"),
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """q (B, Hq, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv) and everything that may go with them.

    Packed (cu_seqlens_q): B is 1 and the sequences lie one after another. Paged (page_table): k is
    (pages, Hkv, page_size, D) and v likewise.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None = None
    causal: str = "none"
    window: Window | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    page_table: Tensor | None = None
    dropout_p: float = 0.0
    mask_rule: Any = None

    def __post_init__(self) -> None:
        for complaint in complaints(self):
            raise ValueError(complaint)

    def tensors(self) -> list[Tensor | None]:
        """The arguments that autograd has to keep, ``TENSORS`` in their order."""
        return [getattr(self, name) for name in TENSORS]

    def options(self) -> dict[str, Any]:
        """All other arguments, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TENSORS}

    @property
    def batches(self) -> int:
        """Sequences: batch entries, or packed ones."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def heads_q(self) -> int:
        """Query heads."""
        return self.q.shape[1]

    @property
    def heads_kv(self) -> int:
        """Heads of keys and values."""
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """Query heads that read the same keys."""
        return self.heads_q // self.heads_kv

    @property
    def seqlen_q(self) -> int:
        """Queries of the longest sequence."""
        return self.q.shape[2] if self.max_seqlen_q is None else operator.index(self.max_seqlen_q)

    @property
    def seqlen_k(self) -> int:
        """Keys of the longest sequence, or room for as many."""
        if self.page_table is not None:
            return self.page_table.shape[1] * self.k.shape[2]
        return self.k.shape[2] if self.max_seqlen_k is None else operator.index(self.max_seqlen_k)

    @property
    def page_size(self) -> int | None:
        """Keys of a page; None where keys are not paged."""
        return None if self.page_table is None else self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """Columns of q and k."""
        return self.q.shape[3]

    @property
    def head_dim_v(self) -> int:
        """Columns of v and out."""
        return self.v.shape[3]

    @property
    def softmax_scale(self) -> float:
        """The factor of q·k."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    @property
    def band(self) -> tuple[int | None, int | None]:
        """Keys to the left and to the right of the diagonal that a query sees; None: all.

        No key is further from a diagonal than there are queries and keys, all sequences together:
        bounds end there, as kernels add them to positions in 32 bits.
        """
        keys = self.seqlen_k if self.page_table is not None else self.k.shape[2]
        furthest = self.q.shape[2] + keys
        left, right = (
            None if bound is None else min(bound, furthest) for bound in self.window or (None, None)
        )
        if self.causal != "none":
            right = 0 if right is None else min(right, 0)
        return left, right

    @property
    def positions(self) -> dict[str, int]:
        """What kernels are told of lengths and the band, by the names of their parameters."""
        left, right = self.band
        return {
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "bottom_right": int(self.causal != "top-left"),
            "left": left or 0,
            "right": right or 0,
            "group": self.group,
        }

    @property
    def plain(self) -> bool:
        """Whether q, k and v are all that is read; all else are numbers, and nothing is random."""
        others = self.tensors()[3:]
        return not self.dropout_p and self.mask_rule is None and all(t is None for t in others)


def complaints(x: Arguments) -> Iterator[str]:
    """Every way in which the arguments do not fit each other, as sentences."""
    for name in ("q", "k", "v"):
        tensor = getattr(x, name)
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            yield f"{name} is {_described(tensor)}: accepted is a tensor of four dimensions"
            return
    yield from _matrices(x)
    yield from _numbers(x)
    yield from _lengths(x)
    keys = x.seqlen_k if x.cu_seqlens_k is None else x.k.shape[2]
    scores = (x.q.shape[0], x.heads_q, x.q.shape[2], keys)
    yield from _scores("mask", x.mask, torch.bool, scores, x)
    yield from _scores("bias", x.bias, x.q.dtype, scores, x)
    for name in ("alibi_slopes", "sinks"):
        yield from _form(name, getattr(x, name), torch.float32, (x.heads_q,), x)
    slopes = x.alibi_slopes
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        yield "alibi_slopes requires a gradient, and has none: accepted is one that is detached"


def _matrices(x: Arguments) -> Iterator[str]:
    if x.q.dtype not in DTYPES:
        yield f"q has dtype {x.q.dtype}: accepted are {', '.join(map(str, DTYPES))}"
    for name in ("k", "v"):
        tensor = getattr(x, name)
        if tensor.dtype != x.q.dtype or tensor.device != x.q.device:
            yield (
                f"{name} is {tensor.dtype} on {tensor.device}: accepted is {x.q.dtype} on "
                f"{x.q.device}, as q"
            )
    for name, size in (("q", x.head_dim), ("v", x.head_dim_v)):
        if not 1 <= size <= LARGEST_HEAD_DIM:
            yield f"{name} has head_dim {size}: accepted is 1 to {LARGEST_HEAD_DIM}"
    if x.k.shape[3] != x.head_dim:
        yield f"k has head_dim {x.k.shape[3]}: accepted is {x.head_dim}, as q"
    if x.v.shape[:3] != x.k.shape[:3]:
        yield f"v has shape {tuple(x.v.shape)}: accepted is {tuple(x.k.shape[:3])} and any head_dim"
    if not x.heads_kv or not x.heads_q or x.heads_q % x.heads_kv:
        yield f"q has {x.heads_q} heads: accepted is a multiple of {x.heads_kv}, as k has"
    if x.page_table is None and x.k.shape[0] != x.q.shape[0]:
        yield f"k has batch {x.k.shape[0]}: accepted is {x.q.shape[0]}, as q"


def _numbers(x: Arguments) -> Iterator[str]:
    if x.causal not in CAUSAL:
        yield f"causal={x.causal!r}: accepted are {', '.join(CAUSAL)}"
    if x.scale is not None and not _finite(x.scale):
        yield f"scale={x.scale!r}: accepted is a finite number, or None"
    if not (_finite(x.softcap) and x.softcap >= 0):
        yield f"softcap={x.softcap!r}: accepted is 0 (off) or more"
    if not (_finite(x.dropout_p) and 0 <= x.dropout_p < 1):
        yield f"dropout_p={x.dropout_p!r}: accepted is a number in [0, 1)"
    if x.window is not None and not _bounds(x.window):
        yield f"window={x.window!r}: accepted is None or (left, right), each None or 0 or more"
    if x.mask_rule is not None and not _jitted(x.mask_rule):
        yield f"mask_rule={x.mask_rule!r}: accepted is a function with @triton.jit, or None"


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _jitted(rule: object) -> bool:
    """Whether this is a device function, compiled or interpreted."""
    # Triton is not imported before it is known how it is to run kernels: see ``interpreter``.
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    return isinstance(rule, JITFunction | InterpretedFunction)


def _bounds(window: object) -> bool:
    """Whether these are two bounds, each None or 0 or more."""
    if not isinstance(window, tuple | list) or len(window) != 2:
        return False
    return all(bound is None or (isinstance(bound, int) and bound >= 0) for bound in window)


def _lengths(x: Arguments) -> Iterator[str]:
    batch = x.q.shape[0]
    yield from _form("key_lengths", x.key_lengths, torch.int32, (batch,), x)
    yield from _form("page_table", x.page_table, torch.int32, (batch, None), x)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        yield from _form(name, getattr(x, name), torch.int32, (None,), x)
    if x.page_table is not None and x.key_lengths is None:
        yield "key_lengths is missing: page_table needs it"
    packed = [
        getattr(x, f"{what}_{side}") for what in ("cu_seqlens", "max_seqlen") for side in "qk"
    ]
    if all(p is None for p in packed):
        return
    if any(p is None for p in packed):
        yield (
            "cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k go together: "
            "accepted is all of them or none"
        )
    if x.cu_seqlens_q.shape != x.cu_seqlens_k.shape:  # type: ignore[union-attr]
        yield "cu_seqlens_k has another length than cu_seqlens_q: accepted is the same"
    if not x.cu_seqlens_q.shape[0]:  # type: ignore[union-attr]
        yield "cu_seqlens_q has no elements: accepted is one more than there are sequences"
    if batch != 1:
        yield f"q has batch {batch}: accepted is 1 with cu_seqlens_q"
    yield from _longest("max_seqlen_q", x.max_seqlen_q, x.cu_seqlens_q)
    yield from _longest("max_seqlen_k", x.max_seqlen_k, x.cu_seqlens_k)
    for name in ("page_table", "key_lengths"):
        if getattr(x, name) is not None:
            yield f"{name} is given with cu_seqlens_q: accepted is one of them"


def _longest(name: str, longest: object, bounds: Any) -> Iterator[str]:
    """Bounds of sequences and the length that none exceeds."""
    if not _length(longest):
        yield f"{name} is {_described(longest)}: accepted is an int of 0 or more"
    elif bounds.device.type == "cpu":  # elsewhere, reading them would wait for the device
        most = int(bounds.diff().max()) if bounds.shape[0] > 1 else 0
        if most > operator.index(longest):  # type: ignore[arg-type]
            yield f"{name}={longest}: accepted is {most}, the longest sequence, or more"


def _length(value: object) -> bool:
    """Whether this is an int of 0 or more; a tensor is none, as its number is on a device."""
    if isinstance(value, Tensor) or not isinstance(value, SupportsIndex):
        return False
    try:
        return operator.index(value) >= 0
    except TypeError:
        return False


def _form(
    name: str,
    tensor: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    x: Arguments,
) -> Iterator[str]:
    if tensor is None:
        return
    fits = isinstance(tensor, Tensor) and tensor.dim() == len(shape)
    fits = fits and all(w is None or w == n for w, n in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != dtype or tensor.device != x.q.device:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        yield f"{name} is {_described(tensor)}: accepted is {dtype} ({sizes}) on {x.q.device}"


def _scores(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], x: Arguments
) -> Iterator[str]:
    """A mask or bias; behind the keys that a page table has room for it may end."""
    if tensor is None:
        return
    fits = isinstance(tensor, Tensor) and tensor.dim() == 4 and tensor.dtype == dtype
    if fits:
        found = list(tensor.shape)
        if x.page_table is not None and found[3] <= shape[3]:
            found[3] = 1
        fits = all(n in (1, size) for n, size in zip(found, shape, strict=True))
    if not fits or tensor.device != x.q.device:
        yield (
            f"{name} is {_described(tensor)}: accepted is {dtype} on {x.q.device} that broadcasts "
            f"to {shape}"
        )


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    return repr(value)
