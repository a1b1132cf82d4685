"""The signature ``attnproof``: canonical tensors, features by the parameters that are declared.

``fn(q, k, v, *, scale, causal, window, …)`` with q (B, Hq, Sq, D), k (B, Hkv, Sk, D),
v (B, Hkv, Sk, Dv) returns out (B, Hq, Sq, Dv), or (out, lse), or (out, lse, keep_mask).
Only parameters that the function declares are passed, by keyword.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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

ACCEPTED = "(q, k, v, scale, causal, window, …), none of them required but q, k and v"

# The features that a problem may have when all these parameters are declared.
FEATURES_OF: dict[tuple[str, ...], tuple[str, ...]] = {
    ("scale",): ("scale",),
    ("causal",): ("causal top-left", "causal bottom-right"),
    ("window",): ("window",),
    ("softcap",): ("softcap",),
    ("alibi_slopes",): ("alibi",),
    ("mask",): ("boolean mask",),
    ("bias",): ("bias",),
    ("sinks",): ("sinks",),
    ("key_lengths",): ("key lengths",),
    ("cu_seqlens_q", "cu_seqlens_k"): ("packed",),
    ("key_lengths", "page_table"): ("paged",),
    ("dropout_p",): ("dropout",),
}
PASSED = tuple(
    dict.fromkeys(
        [name for names in FEATURES_OF for name in names]
        + ["max_seqlen_q", "max_seqlen_k", "return_lse", "return_keep_mask"]
    )
)


def matches(parameters: Parameters) -> bool:
    """Whether the parameters begin with q, k, v and nothing but what is passed is required."""
    rest = set(parameters.required) - {"q", "k", "v"}
    return (
        parameters.leading[:3] == ("q", "k", "v")
        and rest <= set(PASSED)
        and not isinstance(parameters.defaults.get("causal"), bool)
    )


def adapt(function: Callable[..., Any], name: str) -> FunctionBackend:
    """A Backend that calls ``function`` with this signature."""
    parameters = parameters_of(function) or Parameters.promised("q k v", " ".join(PASSED))
    require_callable_with(parameters, PASSED)
    if isinstance(parameters.defaults.get("causal"), bool):
        raise SignatureMismatch(
            "its parameter 'causal' is a bool; signature attnproof passes 'none', 'top-left' or "
            "'bottom-right'"
        )
    capabilities = declared_capabilities(function, _capabilities(parameters))

    def call(inputs: Inputs, problem: Problem) -> Attention:
        options = _options(inputs, problem, parameters)
        return _read(function(inputs.q, inputs.k, inputs.v, **options))

    return FunctionBackend(
        name=name,
        capabilities=capabilities,
        call=partial(with_keep_mask, call),
        declared=declared_precision(function),
    )


def _capabilities(parameters: Parameters) -> Capabilities:
    # Shapes are part of the contract, so grouped heads and a head_dim_v of its own need no
    # parameter; NotImplementedError or attnproof_capabilities declines them.
    features = {"gqa", "head_dim_v"}
    for names, gives in FEATURES_OF.items():
        if all(name in parameters for name in names):
            features |= set(gives)
    return Capabilities(
        features=frozenset(features),
        gradients=("q", "k", "v", *(n for n in ("bias", "sinks") if n in parameters)),
        returns_lse="return_lse" in parameters,
        keep_mask="dropout_p" in parameters,
        excludes=(("dropout", "paged"),),
    )


def _options(inputs: Inputs, problem: Problem, parameters: Parameters) -> dict[str, Any]:
    values: dict[str, Any] = {
        "scale": scale_argument("scale", parameters, problem),
        "causal": problem.causal,
        "window": problem.window,
        "softcap": problem.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "mask": inputs.mask,
        "bias": inputs.bias,
        "sinks": inputs.sinks,
        "key_lengths": _key_lengths(inputs, problem),
        "cu_seqlens_q": inputs.cu_seqlens_q,
        "cu_seqlens_k": inputs.cu_seqlens_k,
        "page_table": inputs.page_table,
        "dropout_p": problem.dropout,
        "max_seqlen_q": problem.seqlen_q,
        "max_seqlen_k": problem.keys,
        "return_lse": True,
        "return_keep_mask": True,
    }
    return {name: value for name, value in values.items() if name in parameters}


def _key_lengths(inputs: Inputs, problem: Problem) -> Tensor | None:
    if inputs.key_lengths is None and problem.page_size is not None:
        # Pages alone do not say where the keys end.
        return torch.full((problem.batch,), problem.keys, dtype=torch.int32, device=inputs.q.device)
    return inputs.key_lengths


def _read(returned: Any) -> Attention:
    if isinstance(returned, Tensor):
        return Attention(out=returned)
    if isinstance(returned, tuple | list) and 1 <= len(returned) <= 3:
        out, lse, keep_mask = (*returned, None, None)[:3]
        return Attention(out=out, lse=lse, keep_mask=keep_mask)
    size = f" of {len(returned)}" if isinstance(returned, tuple | list) else ""
    raise TypeError(
        f"the target returned a {type(returned).__name__}{size}; accepted are out, (out, lse) and "
        "(out, lse, keep_mask)"
    )
