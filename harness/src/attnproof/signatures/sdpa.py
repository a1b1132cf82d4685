"""The signature ``sdpa``: the contract of torch's ``scaled_dot_product_attention``.

``fn(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
enable_gqa=False)``, BHSD, causal from the top left, returns out. ``attn_mask`` is bool (True:
visible) or a bias in the dtype of the query, and does not go together with ``is_causal``.
Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import Precision
from attn_reference.problem import Problem

from ..backend import Capabilities
from ..precision import cpu_flash_precision, cuda_efficient_precision
from .common import (
    FunctionBackend,
    Parameters,
    declared_capabilities,
    declared_precision,
    parameters_of,
    require_callable_with,
    scale_argument,
)
from .keep_mask import with_keep_mask

ACCEPTED = "(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)"
FEATURES_OF = {
    "attn_mask": ("boolean mask", "bias"),
    "dropout_p": ("dropout",),
    "is_causal": ("causal top-left",),
    "scale": ("scale",),
    "enable_gqa": ("gqa",),
}
PASSED = tuple(FEATURES_OF)
EXCLUDES = (("causal top-left", "boolean mask"), ("causal top-left", "bias"))
CONTRACT = Parameters.promised("query key value", " ".join(PASSED))


def matches(parameters: Parameters) -> bool:
    """Whether the parameters begin with query, key, value and require nothing else unknown."""
    rest = set(parameters.required) - {"query", "key", "value"}
    return parameters.leading[:3] == ("query", "key", "value") and rest <= set(PASSED)


def adapt(function: Callable[..., Any], name: str) -> FunctionBackend:
    """A Backend that calls ``function`` with this signature."""
    parameters = parameters_of(function) or CONTRACT
    require_callable_with(parameters, PASSED)
    return FunctionBackend(
        name=name,
        capabilities=declared_capabilities(function, capabilities_of(parameters)),
        call=partial(with_keep_mask, partial(call, function, parameters)),
        prepared=partial(prepare, function, parameters),
        declared=(
            torch_precision
            if function is scaled_dot_product_attention
            else declared_precision(function)
        ),
    )


def capabilities_of(parameters: Parameters) -> Capabilities:
    """The features that the declared parameters give."""
    features = {"head_dim_v"}  # the contract lets E and Ev differ
    for name, gives in FEATURES_OF.items():
        if name in parameters:
            features |= set(gives)
    return Capabilities(
        features=frozenset(features),
        gradients=("q", "k", "v", *(("bias",) if "attn_mask" in parameters else ())),
        keep_mask="dropout_p" in parameters,
        excludes=EXCLUDES,
    )


def torch_precision(device: str) -> Precision:
    """That of torch's own function, which cannot carry an attribute: its least precise kernel."""
    return cpu_flash_precision() if device == "cpu" else cuda_efficient_precision()


def call(
    function: Callable[..., Any], parameters: Parameters, inputs: Inputs, problem: Problem
) -> Attention:
    """Call ``function`` on a problem within its capabilities."""
    return prepare(function, parameters, inputs, problem)()


def prepare(
    function: Callable[..., Any], parameters: Parameters, inputs: Inputs, problem: Problem
) -> Callable[[], Attention]:
    """That call, its arguments at hand."""
    options: dict[str, Any] = {
        "attn_mask": attention_mask(inputs),
        "dropout_p": problem.dropout,
        "is_causal": problem.causal == "top-left",
        "scale": scale_argument("scale", parameters, problem),
        "enable_gqa": problem.group > 1,
    }
    given = {name: value for name, value in options.items() if name in parameters}

    def called() -> Attention:
        out = function(inputs.q, inputs.k, inputs.v, **given)
        if not isinstance(out, Tensor):
            raise TypeError(
                f"the target returned a {type(out).__name__}; accepted is out, a tensor"
            )
        return Attention(out=out)

    return called


def attention_mask(inputs: Inputs) -> Tensor | None:
    """The one ``attn_mask``: the boolean mask, the bias, or the bias with -inf where hidden."""
    if inputs.mask is None or inputs.bias is None:
        return inputs.bias if inputs.mask is None else inputs.mask
    return torch.where(inputs.mask, inputs.bias, float("-inf"))
