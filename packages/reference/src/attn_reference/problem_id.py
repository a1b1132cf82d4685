"""The id of a problem: its values as text, and back.

Parts are joined by underscores: sizes first, then the dtype, then what differs from the
defaults, as flags ("alibi") and assignments ("softcap=30").
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .problem import Problem

DTYPE = re.compile(r"(fp|bf)\d+")


def encode(problem: Problem) -> str:
    """The id of a problem."""
    p = problem
    if p.packed is not None:
        lengths = ",".join(f"{a}x{b}" for a, b in p.packed)
        parts = [f"packed={lengths}", f"h{p.heads_q}x{p.heads_kv}"]
    else:
        parts = [f"b{p.batch}", f"h{p.heads_q}x{p.heads_kv}", f"q{p.seqlen_q}", f"k{p.seqlen_k}"]
    parts.append(f"d{p.head_dim}")
    if p.head_dim_v != p.head_dim:
        parts.append(f"dv{p.head_dim_v}")
    parts.append(p.dtype)
    defaults = {f.name: f.default for f in fields(p)}
    for name, (prefix, text) in _ENCODE.items():
        if getattr(p, name) != defaults[name]:
            parts.append(prefix + text(p))
    return "_".join(parts)


def decode(text: str) -> dict[str, Any]:
    """The values that an id stands for; ValueError says which part is not understood."""
    values: dict[str, Any] = {}
    for part in text.split("_"):
        values.update(_decode(part, text))
    return values


def _number(value: float) -> str:
    text = repr(float(value))
    return text[:-2] if text.endswith(".0") else text


def _side(value: int | None) -> str:
    return "inf" if value is None else str(value)


def _layouts(problem: Problem) -> str:
    # Names of tensors hold underscores, which separate the parts of an id.
    return ",".join(f"{name.replace('_', '-')}:{layout}" for name, layout in problem.layouts)


# How each optional field is written: a prefix, and the text that follows it.
_ENCODE: dict[str, tuple[str, Callable[[Any], str]]] = {
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
    "layouts": ("layout=", _layouts),
    "distribution": ("dist=", lambda p: p.distribution),
    "seed": ("seed=", lambda p: str(p.seed)),
}


def _read_window(text: str) -> tuple[int | None, int | None]:
    left, right = (None if w == "inf" else int(w) for w in text.split(","))
    return left, right


def _read_integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _read_pairs(text: str) -> tuple[tuple[int, int], ...]:
    pairs = (pair.split("x") for pair in text.split(",") if pair)
    return tuple((int(a), int(b)) for a, b in pairs)


def _read_layouts(text: str) -> tuple[tuple[str, str], ...]:
    pairs = (pair.split(":") for pair in text.split(","))
    return tuple((name.replace("-", "_"), layout) for name, layout in pairs)


def _read_shaped(kind: str) -> Callable[[str], dict[str, Any]]:
    def read(text: str) -> dict[str, Any]:
        pattern, _, shape = text.partition("@")
        return {kind: pattern, f"{kind}_shape": shape}

    return read


_DECODE: dict[str, Callable[[str], dict[str, Any]]] = {
    "scale": lambda t: {"scale": float(t)},
    "causal": lambda t: {"causal": t},
    "window": lambda t: {"window": _read_window(t)},
    "softcap": lambda t: {"softcap": float(t)},
    "mask": _read_shaped("mask"),
    "bias": _read_shaped("bias"),
    "lens": lambda t: {"key_lengths": _read_integers(t)},
    "packed": lambda t: {"packed": _read_pairs(t)},
    "page": lambda t: {"page_size": int(t)},
    "dropout": lambda t: {"dropout": float(t)},
    "grad": lambda t: {"gradients": tuple(t.split(","))},
    "layout": lambda t: {"layouts": _read_layouts(t)},
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
    key, equals, text = part.partition("=")
    if equals and key in _DECODE:
        try:
            return _DECODE[key](text)
        except ValueError as error:
            raise ValueError(f"id {whole!r}: part {part!r} is not understood ({error})") from None
    for pattern, names in _SIZES:
        if match := pattern.fullmatch(part):
            return dict(zip(names, map(int, match.groups()), strict=True))
    if DTYPE.fullmatch(part):
        return {"dtype": part}
    raise ValueError(f"id {whole!r}: part {part!r} is not understood")
