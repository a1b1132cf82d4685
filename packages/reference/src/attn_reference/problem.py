"""Problem: a frozen set of plain values that says all there is to say about one attention.

Its id is short, readable and stable, and rebuilds it: ``Problem.from_id(p.id) == p``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch

from .problem_id import decode, encode

DTYPES: Mapping[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
CAUSAL_ALIGNMENTS = ("none", "top-left", "bottom-right")
GRADIENT_NAMES = ("q", "k", "v", "bias", "sinks")
BROADCAST_SHAPE = re.compile(r"[b1][h1][q1][k1]")
PATTERN = re.compile(r"[a-z0-9][a-z0-9.+:-]*")
TENSOR_NAME = re.compile(r"[a-z]+(_[a-z]+)*")
LAYOUT = re.compile(r"[a-z0-9+]+")
# What a field is when it is None.
FOLLOWS = {"seqlen_k": "seqlen_q", "heads_kv": "heads_q", "head_dim_v": "head_dim"}
SIZES = ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v")
INTEGERS = (*SIZES, "page_size", "seed")
NUMBERS = ("scale", "softcap", "dropout")
FLAGS = ("alibi", "sinks", "lse_gradient")

Window = tuple[int | None, int | None]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention computation, out = softmax(mask(softcap(scale QKᵀ) + bias)) V.

    Canonical shapes: q (batch, heads_q, seqlen_q, head_dim), k (batch, heads_kv, seqlen_k,
    head_dim), v (batch, heads_kv, seqlen_k, head_dim_v), out (batch, heads_q, seqlen_q,
    head_dim_v), lse (batch, heads_q, seqlen_q). Packed problems have batch 1 and the
    sequences one after another; paged problems keep k and v in pages (see ``Inputs``).

    The *diagonal* that causality, windows and ALiBi are measured from is key
    j = i + offset for query i, with offset 0 for top-left alignment and
    len_k - len_q otherwise, where len_q and len_k are the true lengths of the sequence.
    """

    batch: int = 1
    heads_q: int = 1
    heads_kv: int | None = None  # None: heads_q
    seqlen_q: int = 64
    seqlen_k: int | None = None  # None: seqlen_q
    head_dim: int = 64
    head_dim_v: int | None = None  # None: head_dim
    dtype: str = "fp32"
    scale: float | None = None  # None: 1/sqrt(head_dim)
    causal: str = "none"
    window: Window | None = None  # (left, right), inclusive; None on a side: unbounded
    softcap: float = 0.0  # 0: off
    alibi: bool = False
    mask: str | None = None  # name of a pattern of the boolean mask; True: visible
    mask_shape: str = "bhqk"  # a 1 in place of a letter broadcasts that dimension
    bias: str | None = None  # name of a pattern of the additive bias
    bias_shape: str = "bhqk"
    sinks: bool = False  # one logit per query head joins the row sum (and the LSE)
    key_lengths: tuple[int, ...] | None = None  # per batch entry, 0..seqlen_k
    packed: tuple[tuple[int, int], ...] | None = None  # (len_q, len_k) of each sequence
    page_size: int | None = None
    dropout: float = 0.0
    gradients: tuple[str, ...] = ()  # which inputs need gradients
    lse_gradient: bool = False  # a gradient comes in through the LSE too
    layouts: tuple[tuple[str, str], ...] = ()  # (tensor, memory layout), see attnproof.inputs
    distribution: str = "normal"
    seed: int = 0

    def __post_init__(self) -> None:
        """Bring every value into its one form and fill in what follows from others."""
        self._set("gradients", tuple(n for n in GRADIENT_NAMES if n in self._gradient_names()))
        self._set_pairs("layouts", str, "pairs of a tensor's name and a layout")
        self._set("layouts", tuple(sorted(self.layouts)))
        if self.packed is not None:
            self._set_pairs(
                "packed", int, "a pair (len_q, len_k) for each sequence, each 0 or more"
            )
            self._set("batch", len(self.packed))
            self._set("seqlen_q", max((a for a, _ in self.packed), default=0))
            self._set("seqlen_k", max((b for _, b in self.packed), default=0))
        for name, follows in FOLLOWS.items():
            if getattr(self, name) is None:
                self._set(name, getattr(self, follows))
        for name in ("mask", "bias"):
            if getattr(self, name) is None:
                self._set(f"{name}_shape", "bhqk")
        for name in ("key_lengths", "window"):
            if getattr(self, name) is not None:
                self._set(name, tuple(getattr(self, name)))
        for complaint in self._type_complaints() or self._complaints():
            raise ValueError(complaint)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _set_pairs(self, name: str, of: type, accepted: str) -> None:
        """Make a field a tuple of pairs, which other values are read from."""
        given = getattr(self, name)
        try:
            pairs = tuple((one, other) for one, other in given)
        except (TypeError, ValueError):
            pairs = ((None, None),)
        if not all(isinstance(value, of) for pair in pairs for value in pair):
            raise ValueError(f"{name}={given!r}: accepted is {accepted}")
        self._set(name, pairs)

    def _gradient_names(self) -> tuple[str, ...]:
        names = tuple(self.gradients)
        if unknown := sorted(set(names) - set(GRADIENT_NAMES)):
            accepted = ", ".join(GRADIENT_NAMES)
            raise ValueError(f"gradients={names!r}: unknown {unknown}; accepted are {accepted}")
        return names

    def _type_complaints(self) -> list[str]:
        """Values of another type than the field's, which no comparison would survive."""
        wrong: list[str] = []
        for names, types, accepted in (
            (INTEGERS, int, "an integer"),
            (NUMBERS, (int, float), "a number"),
            (FLAGS, bool, "True or False"),
        ):
            for name in names:
                value = getattr(self, name)
                is_bool = isinstance(value, bool) and types is not bool
                optional = value is None and _DEFAULTS[name] is None
                if is_bool or not (optional or isinstance(value, types)):
                    wrong.append(f"{name}={value!r}: accepted is {accepted}")
        return wrong

    def _complaints(self) -> list[str]:
        """Every way in which the values contradict each other, as sentences."""
        said: list[str] = []

        def need(holds: bool, name: str, accepted: str) -> None:
            if not holds:
                said.append(f"{name}={getattr(self, name)!r}: accepted is {accepted}")

        for name in ("batch", "seqlen_q", "seqlen_k"):
            need(getattr(self, name) >= 0, name, "0 or more")
        for name in ("heads_q", "heads_kv", "head_dim", "head_dim_v"):
            need(getattr(self, name) >= 1, name, "1 or more")
        if said:
            return said
        need(
            self.heads_q % self.kv_heads == 0, "heads_q", f"a multiple of heads_kv={self.heads_kv}"
        )
        need(self.dtype in DTYPES, "dtype", ", ".join(DTYPES))
        need(self.scale is None or math.isfinite(self.scale), "scale", "a finite number, or None")
        need(self.causal in CAUSAL_ALIGNMENTS, "causal", ", ".join(CAUSAL_ALIGNMENTS))
        need(
            self.window is None
            or (len(self.window) == 2 and all(w is None or _length(w) for w in self.window)),
            "window",
            "None or (left, right), each None or 0 or more",
        )
        need(math.isfinite(self.softcap) and self.softcap >= 0, "softcap", "0 (off) or more")
        need(0 <= self.dropout < 1, "dropout", "a number in [0, 1)")
        for name in ("mask", "bias", "distribution"):
            value = getattr(self, name)
            need(
                (value is None and name != "distribution") or _matches(PATTERN, value),
                name,
                "the name of a pattern, lower case",
            )
        for name in ("mask_shape", "bias_shape"):
            need(
                _matches(BROADCAST_SHAPE, getattr(self, name)),
                name,
                "bhqk with a 1 in place of each dimension that broadcasts",
            )
        need(
            all(_matches(TENSOR_NAME, n) and _matches(LAYOUT, text) for n, text in self.layouts)
            and len(dict(self.layouts)) == len(self.layouts),
            "layouts",
            "a pair of name and layout, such as ('q', 'bshd+offset'), for each tensor at most",
        )
        need(self.page_size is None or self.page_size >= 1, "page_size", "None or 1 or more")
        if self.packed is not None:
            need(
                all(_length(n) for pair in self.packed for n in pair),
                "packed",
                "a pair (len_q, len_k) for each sequence, each 0 or more",
            )
            for name in ("key_lengths", "page_size"):
                need(getattr(self, name) is None, name, "None when packed is given")
        elif self.key_lengths is not None:
            need(
                len(self.key_lengths) == self.batch
                and all(_length(n) and n <= self.keys for n in self.key_lengths),
                "key_lengths",
                f"{self.batch} lengths (batch), each 0 to {self.keys} (seqlen_k)",
            )
        need(
            self.page_size is None or not {"k", "v"} & set(self.gradients),
            "gradients",
            "without k and v when page_size is given",
        )
        need(
            "bias" not in self.gradients or self.bias is not None, "gradients", "bias needs a bias"
        )
        need("sinks" not in self.gradients or self.sinks, "gradients", "sinks needs sinks=True")
        return said

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        assert self.heads_kv is not None
        return self.heads_kv

    @property
    def keys(self) -> int:
        """Number of keys, seqlen_k."""
        assert self.seqlen_k is not None
        return self.seqlen_k

    @property
    def value_dim(self) -> int:
        """head_dim_v."""
        assert self.head_dim_v is not None
        return self.head_dim_v

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads_q // self.kv_heads

    @property
    def softmax_scale(self) -> float:
        """The factor of QKᵀ."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k, v and out."""
        return DTYPES[self.dtype]

    @property
    def features(self) -> tuple[str, ...]:
        """The optional parts of attention that this problem uses, in the order of FEATURES."""
        return tuple(name for name, used in _USES.items() if used(self))

    def layout(self, tensor: str) -> str:
        """The memory layout asked for that tensor; 'bhsd' is contiguous."""
        return dict(self.layouts).get(tensor, "bhsd")

    def replace(self, **changes: Any) -> Self:
        """A copy with those values; lengths of a packed problem follow ``packed``."""
        return replace(self, **changes)

    @property
    def id(self) -> str:
        """Short, readable, stable; underscores separate the parts."""
        return encode(self)

    @classmethod
    def from_id(cls, text: str) -> Self:
        """Rebuild the problem that gave this id; ValueError says which part is not understood."""
        return cls(**decode(text))


def _length(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


_DEFAULTS = {f.name: f.default for f in fields(Problem)}

_USES: dict[str, Callable[[Problem], bool]] = {
    "causal top-left": lambda p: p.causal == "top-left",
    "causal bottom-right": lambda p: p.causal == "bottom-right",
    "window": lambda p: p.window is not None,
    "softcap": lambda p: p.softcap > 0,
    "alibi": lambda p: p.alibi,
    "boolean mask": lambda p: p.mask is not None,
    "bias": lambda p: p.bias is not None,
    "sinks": lambda p: p.sinks,
    "scale": lambda p: p.scale is not None,
    "gqa": lambda p: p.group > 1,
    "head_dim_v": lambda p: p.head_dim_v != p.head_dim,
    "key lengths": lambda p: p.key_lengths is not None,
    "packed": lambda p: p.packed is not None,
    "paged": lambda p: p.page_size is not None,
    "dropout": lambda p: p.dropout > 0,
    "gradients": lambda p: bool(p.gradients),
    "lse gradient": lambda p: p.lse_gradient,
}
FEATURES = tuple(_USES)  # every name that Problem.features can hold
