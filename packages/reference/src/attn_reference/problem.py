"""Problem: a frozen set of plain values that says all there is to say about one attention.

Its id is short, readable and stable, and rebuilds it: ``Problem.from_id(p.id) == p``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch

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
        derived: dict[str, Any] = {}
        if self.packed is not None:
            packed = tuple((int(a), int(b)) for a, b in self.packed)
            derived["packed"] = packed
            derived["batch"] = len(packed)
            derived["seqlen_q"] = max((a for a, _ in packed), default=0)
            derived["seqlen_k"] = max((b for _, b in packed), default=0)
        elif self.seqlen_k is None:
            derived["seqlen_k"] = self.seqlen_q
        if self.heads_kv is None:
            derived["heads_kv"] = self.heads_q
        if self.head_dim_v is None:
            derived["head_dim_v"] = self.head_dim
        if self.key_lengths is not None:
            derived["key_lengths"] = tuple(int(n) for n in self.key_lengths)
        derived["gradients"] = tuple(n for n in GRADIENT_NAMES if n in self.gradients)
        derived["layouts"] = tuple(sorted(dict(self.layouts).items()))
        unknown = set(self.gradients) - set(GRADIENT_NAMES)
        if unknown:
            raise ValueError(
                f"gradients={self.gradients}: unknown {sorted(unknown)}; "
                f"accepted are {', '.join(GRADIENT_NAMES)}"
            )
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        for complaint in self._complaints():
            raise ValueError(complaint)

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
        need(self.heads_q % self.kv_heads == 0, "heads_q", f"a multiple of heads_kv={self.heads_kv}")
        need(self.dtype in DTYPES, "dtype", ", ".join(DTYPES))
        need(self.scale is None or math.isfinite(self.scale), "scale", "a finite number, or None")
        need(self.causal in CAUSAL_ALIGNMENTS, "causal", ", ".join(CAUSAL_ALIGNMENTS))
        need(
            self.window is None
            or (len(self.window) == 2 and all(w is None or w >= 0 for w in self.window)),
            "window",
            "None or (left, right), each None or 0 or more",
        )
        need(math.isfinite(self.softcap) and self.softcap >= 0, "softcap", "0 (off) or more")
        need(0 <= self.dropout < 1, "dropout", "a number in [0, 1)")
        for name in ("mask", "bias", "distribution"):
            value = getattr(self, name)
            need(
                (value is None and name != "distribution")
                or (isinstance(value, str) and PATTERN.fullmatch(value) is not None),
                name,
                "the name of a pattern, lower case",
            )
        for name in ("mask_shape", "bias_shape"):
            need(
                BROADCAST_SHAPE.fullmatch(getattr(self, name)) is not None,
                name,
                "bhqk with a 1 in place of each dimension that broadcasts",
            )
        need(self.page_size is None or self.page_size >= 1, "page_size", "None or 1 or more")
        if self.key_lengths is not None:
            need(
                len(self.key_lengths) == self.batch
                and all(0 <= n <= self.keys for n in self.key_lengths),
                "key_lengths",
                f"{self.batch} lengths (batch), each 0 to {self.keys} (seqlen_k)",
            )
            need(self.packed is None, "key_lengths", "None when packed is given")
        need(self.page_size is None or self.packed is None, "page_size", "None when packed is given")
        need(
            self.page_size is None or not {"k", "v"} & set(self.gradients),
            "gradients",
            "without k and v when page_size is given",
        )
        need("bias" not in self.gradients or self.bias is not None, "gradients", "bias needs a bias")
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
        """The optional parts of attention that this problem uses, in a fixed order."""
        uses = {
            "causal top-left": self.causal == "top-left",
            "causal bottom-right": self.causal == "bottom-right",
            "window": self.window is not None,
            "softcap": self.softcap > 0,
            "alibi": self.alibi,
            "boolean mask": self.mask is not None,
            "bias": self.bias is not None,
            "sinks": self.sinks,
            "scale": self.scale is not None,
            "gqa": self.group > 1,
            "head_dim_v": self.head_dim_v != self.head_dim,
            "key lengths": self.key_lengths is not None,
            "packed": self.packed is not None,
            "paged": self.page_size is not None,
            "dropout": self.dropout > 0,
            "gradients": bool(self.gradients),
            "lse gradient": self.lse_gradient,
        }
        return tuple(name for name, used in uses.items() if used)

    def layout(self, tensor: str) -> str:
        """The memory layout asked for that tensor; 'bhsd' is contiguous."""
        return dict(self.layouts).get(tensor, "bhsd")

    def replace(self, **changes: Any) -> Self:
        """A copy with those values; lengths of a packed problem follow ``packed``."""
        return replace(self, **changes)

    @property
    def id(self) -> str:
        """Short, readable, stable; underscores separate the parts."""
        if self.packed is not None:
            lengths = ",".join(f"{a}x{b}" for a, b in self.packed)
            parts = [f"packed={lengths}", f"h{self.heads_q}x{self.heads_kv}"]
        else:
            parts = [
                f"b{self.batch}",
                f"h{self.heads_q}x{self.heads_kv}",
                f"q{self.seqlen_q}",
                f"k{self.seqlen_k}",
            ]
        parts.append(f"d{self.head_dim}")
        if self.head_dim_v != self.head_dim:
            parts.append(f"dv{self.head_dim_v}")
        parts.append(self.dtype)
        for f in _OPTIONS:
            value = getattr(self, f)
            if value != _DEFAULTS[f]:
                parts.append(_ENCODE[f][0] + _ENCODE[f][1](self))
        return "_".join(parts)

    @classmethod
    def from_id(cls, text: str) -> Self:
        """Rebuild the problem that gave this id; ValueError says which part is not understood."""
        values: dict[str, Any] = {}
        for part in text.split("_"):
            values.update(_decode(part, text))
        return cls(**values)


def _number(value: float) -> str:
    text = repr(float(value))
    return text[:-2] if text.endswith(".0") else text


def _side(value: int | None) -> str:
    return "inf" if value is None else str(value)


def _window(text: str) -> Window:
    left, right = (None if w == "inf" else int(w) for w in text.split(","))
    return left, right


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    pairs = (pair.split("x") for pair in text.split(",") if pair)
    return tuple((int(a), int(b)) for a, b in pairs)


# How each optional field is written: a prefix, and the text that follows it.
_ENCODE: dict[str, tuple[str, Any]] = {
    "scale": ("scale=", lambda p: _number(p.scale)),
    "causal": ("causal=", lambda p: p.causal),
    "window": ("window=", lambda p: ",".join(_side(w) for w in p.window)),
    "softcap": ("softcap=", lambda p: _number(p.softcap)),
    "alibi": ("alibi", lambda p: ""),
    "mask": ("mask=", lambda p: f"{p.mask}@{p.mask_shape}"),
    "bias": ("bias=", lambda p: f"{p.bias}@{p.bias_shape}"),
    "sinks": ("sinks", lambda p: ""),
    "key_lengths": ("lens=", lambda p: ",".join(map(str, p.key_lengths))),
    "page_size": ("page=", lambda p: str(p.page_size)),
    "dropout": ("dropout=", lambda p: _number(p.dropout)),
    "gradients": ("grad=", lambda p: ",".join(p.gradients)),
    "lse_gradient": ("dlse", lambda p: ""),
    "layouts": ("layout=", lambda p: ",".join(f"{n}:{v}" for n, v in p.layouts)),
    "distribution": ("dist=", lambda p: p.distribution),
    "seed": ("seed=", lambda p: str(p.seed)),
}
_OPTIONS = tuple(_ENCODE)
_DEFAULTS = {f.name: f.default for f in fields(Problem)}


def _shaped(kind: str) -> Any:
    def read(text: str) -> dict[str, Any]:
        pattern, _, shape = text.partition("@")
        return {kind: pattern, f"{kind}_shape": shape}

    return read


_DECODE: dict[str, Any] = {
    "scale": lambda t: {"scale": float(t)},
    "causal": lambda t: {"causal": t},
    "window": lambda t: {"window": _window(t)},
    "softcap": lambda t: {"softcap": float(t)},
    "mask": _shaped("mask"),
    "bias": _shaped("bias"),
    "lens": lambda t: {"key_lengths": _ints(t)},
    "packed": lambda t: {"packed": _pairs(t)},
    "page": lambda t: {"page_size": int(t)},
    "dropout": lambda t: {"dropout": float(t)},
    "grad": lambda t: {"gradients": tuple(t.split(","))},
    "layout": lambda t: {"layouts": tuple(tuple(x.split(":", 1)) for x in t.split(","))},
    "dist": lambda t: {"distribution": t},
    "seed": lambda t: {"seed": int(t)},
}
_FLAGS: dict[str, dict[str, Any]] = {
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "dlse": {"lse_gradient": True},
}
_SIZES = (
    (re.compile(r"b(\d+)"), ("batch",)),
    (re.compile(r"h(\d+)x(\d+)"), ("heads_q", "heads_kv")),
    (re.compile(r"q(\d+)"), ("seqlen_q",)),
    (re.compile(r"k(\d+)"), ("seqlen_k",)),
    (re.compile(r"dv(\d+)"), ("head_dim_v",)),
    (re.compile(r"d(\d+)"), ("head_dim",)),
)


def _decode(part: str, whole: str) -> dict[str, Any]:
    """The fields that one part of an id stands for."""
    if part in _FLAGS:
        return _FLAGS[part]
    if part in DTYPES:
        return {"dtype": part}
    key, equals, text = part.partition("=")
    if equals and key in _DECODE:
        try:
            decoded: dict[str, Any] = _DECODE[key](text)
        except ValueError as error:
            raise ValueError(f"id {whole!r}: part {part!r} is not understood ({error})") from None
        return decoded
    for pattern, names in _SIZES:
        if match := pattern.fullmatch(part):
            return dict(zip(names, map(int, match.groups()), strict=True))
    raise ValueError(f"id {whole!r}: part {part!r} is not understood")
