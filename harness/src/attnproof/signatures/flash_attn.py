"""The signature ``flash_attn``: the functions of the flash-attention library.

``flash_attn_func(q, k, v, …)`` with BSHD tensors, ``flash_attn_varlen_func`` with packed THD
tensors and ``flash_attn_with_kvcache`` with a cache, paged or not; causal from the bottom
right, windows inclusive. The target is one of these functions, or a module or file that
offers ``flash_attn_func`` and any of the others. Parameters that exist give the features.
Source: https://github.com/Dao-AILab/flash-attention (flash_attn/flash_attn_interface.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attn_reference.inputs import Attention, Inputs
from attn_reference.problem import Problem

from ..backend import Capabilities
from .common import (
    FunctionBackend,
    Parameters,
    SignatureMismatch,
    declared_capabilities,
    declared_precision,
    parameters_of,
    require_callable_with,
    scale_argument,
)
from .keep_mask import with_keep_mask

ACCEPTED = "(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, …)"
DENSE, VARLEN, KVCACHE = "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"

LSE_SWITCHES = ("return_attn_probs", "return_softmax_lse", "return_lse")
COMMON = "softmax_scale causal window_size softcap alibi_slopes"
CONTRACTS = {
    DENSE: Parameters.promised("q k v", f"dropout_p {COMMON} return_attn_probs"),
    VARLEN: Parameters.promised(
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
        f"dropout_p {COMMON} return_attn_probs",
    ),
    KVCACHE: Parameters.promised(
        "q k_cache v_cache", f"cache_seqlens block_table {COMMON} return_softmax_lse"
    ),
}
PASSED = {
    DENSE: ("dropout_p", *COMMON.split(), *LSE_SWITCHES),
    VARLEN: (
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "dropout_p",
        *COMMON.split(),
        *LSE_SWITCHES,
    ),
    KVCACHE: ("cache_seqlens", "block_table", "page_table", *COMMON.split(), *LSE_SWITCHES),
}
# Parameters that no other signature has.
MARKS = {"softmax_scale", "window_size", "k_cache", "deterministic", *LSE_SWITCHES[:2]}

# Which of these parameters each feature needs (any one of them).
PARAMETERS_OF = {
    "scale": ("softmax_scale",),
    "causal bottom-right": ("causal",),
    "window": ("window_size",),
    "softcap": ("softcap",),
    "alibi": ("alibi_slopes",),
    "dropout": ("dropout_p",),
    "key lengths": ("cache_seqlens",),
    "paged": ("block_table", "page_table"),
    "packed": ("cu_seqlens_q",),
}
ONLY_OF = {"key lengths": KVCACHE, "paged": KVCACHE, "packed": VARLEN}


@dataclass(frozen=True)
class Entry:
    """One function of the library: what it is called there, and its parameters."""

    kind: str
    function: Callable[..., Any]
    parameters: Parameters

    def offers(self, feature: str) -> bool:
        """Whether a parameter for that feature exists."""
        if ONLY_OF.get(feature, self.kind) != self.kind:
            return False
        return any(name in self.parameters for name in PARAMETERS_OF[feature])


def matches(parameters: Parameters) -> bool:
    """Whether the parameters begin as the library's do and some are its own."""
    begins = parameters.leading[:3] in (("q", "k", "v"), ("q", "k_cache", "v_cache"))
    return begins and bool(MARKS & set(parameters.named))


def adapt(target: Any, name: str) -> FunctionBackend:
    """A Backend that calls the function, or the functions that the module offers."""
    entries = _offered(target) if isinstance(target, ModuleType) else [_entry(target)]
    by_kind = {entry.kind: entry for entry in entries}
    capabilities = declared_capabilities(target, _capabilities(by_kind))
    return FunctionBackend(
        name=name,
        capabilities=capabilities,
        call=partial(with_keep_mask, partial(_call, by_kind)),
        declared=declared_precision(target),
    )


def _offered(module: ModuleType) -> list[Entry]:
    found = [kind for kind in CONTRACTS if callable(getattr(module, kind, None))]
    if DENSE not in found:
        others = f"; it offers {', '.join(found)}: name that with :{found[0]}" if found else ""
        raise SignatureMismatch(
            f"offers no {DENSE}, which signature flash_attn needs of a module or file{others}"
        )
    entries = []
    for kind in found:
        try:
            entries.append(_entry(getattr(module, kind), kind))
        except SignatureMismatch as error:
            raise SignatureMismatch(f"{kind}: {error}") from None
    return entries


def _entry(function: Callable[..., Any], kind: str | None = None) -> Entry:
    parameters = parameters_of(function)
    if kind is None:
        kind = _kind(function, parameters)
    parameters = parameters or CONTRACTS[kind]
    require_callable_with(parameters, PASSED[kind])
    return Entry(kind, function, parameters)


def _kind(function: Callable[..., Any], parameters: Parameters | None) -> str:
    if parameters is None:
        named = getattr(function, "__name__", "")
        return named if named in CONTRACTS else DENSE
    if "cu_seqlens_q" in parameters:
        return VARLEN
    return KVCACHE if "k_cache" in parameters else DENSE


def _capabilities(entries: Mapping[str, Entry]) -> Capabilities:
    """What the parameters of the functions together give."""
    features = {"gqa"}
    for feature in PARAMETERS_OF:
        if any(entry.offers(feature) for entry in entries.values()):
            features.add(feature)
    trains = bool({DENSE, VARLEN} & set(entries))
    paged = entries.get(KVCACHE)
    return Capabilities(
        dtypes=("fp16", "bf16"),
        features=frozenset(features),
        gradients=("q", "k", "v") if trains else (),
        head_dim_max=256,
        page_size_multiple=256 if paged and "block_table" in paged.parameters else 1,
        returns_lse=any(s in e.parameters for e in entries.values() for s in LSE_SWITCHES),
        keep_mask="dropout" in features,
        excludes=(
            ("gradients", "key lengths"),
            ("gradients", "paged"),
            ("dropout", "key lengths"),
            ("dropout", "paged"),
        ),
    )


def _call(entries: Mapping[str, Entry], inputs: Inputs, problem: Problem) -> Attention:
    entry = _choose(entries, problem)
    for feature in problem.features:
        if feature in PARAMETERS_OF and not entry.offers(feature):
            raise NotImplementedError(
                f"{feature}: {entry.kind} has no parameter {PARAMETERS_OF[feature][0]}"
            )
    options = {
        name: value
        for name, value in _options(entry, inputs, problem).items()
        if name in entry.parameters
    }
    q, k, v = (_to_library(t, problem) for t in (inputs.q, inputs.k, inputs.v))
    return _read(entry.function(q, k, v, **options), problem)


def _choose(entries: Mapping[str, Entry], problem: Problem) -> Entry:
    if problem.packed is not None:
        kinds = [VARLEN]
    elif problem.page_size is not None or problem.key_lengths is not None:
        kinds = [KVCACHE]
    else:
        kinds = [DENSE, KVCACHE]
    for kind in kinds:
        if kind in entries:
            return entries[kind]
    raise NotImplementedError(f"this problem needs {kinds[0]}; offered are {', '.join(entries)}")


def _options(entry: Entry, inputs: Inputs, problem: Problem) -> dict[str, Any]:
    return {
        "softmax_scale": scale_argument("softmax_scale", entry.parameters, problem),
        "causal": problem.causal == "bottom-right",
        "window_size": _window(entry, problem),
        "softcap": problem.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "dropout_p": problem.dropout,
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "cu_seqlens_k": inputs.cu_seqlens_k,
        "max_seqlen_q": problem.seqlen_q,
        "max_seqlen_k": problem.keys,
        "cache_seqlens": _cache_seqlens(inputs, problem),
        "block_table": inputs.page_table,
        "page_table": inputs.page_table,
        **dict.fromkeys(LSE_SWITCHES, True),
    }


def _window(entry: Entry, problem: Problem) -> tuple[int | None, int | None]:
    """The window, with the library's own word for unbounded: -1, or None where that is default."""
    default = entry.parameters.defaults.get("window_size", (-1, -1))
    unbounded = None if default is None or None in default else -1
    left, right = problem.window or (None, None)
    return (unbounded if left is None else left, unbounded if right is None else right)


def _cache_seqlens(inputs: Inputs, problem: Problem) -> Tensor | int | None:
    """The lengths; all keys of a paged cache, whose pages do not say where they end."""
    if inputs.key_lengths is None and problem.page_size is not None:
        return inputs.q.new_full((problem.batch,), problem.keys, dtype=torch.int32)
    return inputs.key_lengths


def _to_library(tensor: Tensor, problem: Problem) -> Tensor:
    """BHSD to BSHD; packed (1, H, T, D) to (T, H, D); pages (P, H, page, D) to (P, page, H, D)."""
    moved = tensor.transpose(1, 2)
    return moved[0] if problem.packed is not None else moved


def _read(returned: Any, problem: Problem) -> Attention:
    """out, or (out, lse, …): the LSE is (B, H, S), for packed problems (H, T)."""
    out, lse = returned, None
    if isinstance(returned, tuple | list) and len(returned) >= 2:
        out, lse = returned[:2]
    if not isinstance(out, Tensor):
        raise TypeError(
            f"the target returned a {type(returned).__name__}; accepted are out and (out, lse, …)"
        )
    if problem.packed is not None:
        return Attention(out=out[None].transpose(1, 2), lse=None if lse is None else lse[None])
    return Attention(out=out.transpose(1, 2), lse=lse)
