"""The attention functions that transformers' models call: BHSD in, BSHD out.

Models hand them one 4D mask that holds causality, windows and padding, or, for a square causal
problem, none and ``is_causal``; so does this. The mask hides with -inf, bool for SDPA. What lies
beyond the lengths is zero, as in a model, where padding is a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import EAGER, Precision
from attn_reference.problem import Problem

from ..backend import Capabilities
from ..precision import cpu_eager_precision
from ..signatures.keep_mask import with_keep_mask
from ..signatures.sdpa import torch_precision
from .library import LibraryBackend
from .positions import distance_from_diagonal, visible, without_padding

INSTALL = "pip install 'transformers>=5.17'"
HIDING = frozenset({"window", "boolean mask", "key lengths"})
FEATURES = HIDING | {
    "causal top-left",
    "causal bottom-right",
    "bias",
    "scale",
    "gqa",
    "head_dim_v",
    "dropout",
}

MakeMask = Callable[[Inputs, Problem], Tensor | None]


def call(
    function: Callable[..., Any], make_mask: MakeMask, inputs: Inputs, problem: Problem
) -> Attention:
    """Attention by a function of transformers, which gets the mask that ``make_mask`` makes."""
    mask = make_mask(inputs, problem)
    module = SimpleNamespace(
        num_key_value_groups=problem.group, is_causal=problem.causal != "none", training=True
    )
    out, _ = function(
        module,
        inputs.q,
        without_padding(inputs.k, inputs),
        without_padding(inputs.v, inputs),
        mask,
        scaling=problem.softmax_scale,
        dropout=problem.dropout,
        is_causal=problem.causal != "none" and mask is None,
    )
    return Attention(out=out.transpose(1, 2))


def sdpa_mask(inputs: Inputs, problem: Problem) -> Tensor | None:
    """Bool, or a bias where there is one; none for a square that is causal and nothing else."""
    square = problem.seqlen_q == problem.keys
    if square and inputs.bias is None and HIDING.isdisjoint(problem.features):
        return None
    seen = _seen(inputs, problem)
    if inputs.bias is None:
        return seen
    return inputs.bias if seen is None else torch.where(seen, inputs.bias, -math.inf)


def eager_mask(inputs: Inputs, problem: Problem) -> Tensor | None:
    """In the dtype of q: the bias, or 0, and -inf where hidden.

    NotImplementedError when a query sees no key: the softmax of nothing but -inf is NaN.
    """
    seen = _seen(inputs, problem)
    if seen is None:
        mask = inputs.bias
    else:
        bias = inputs.q.new_zeros(()) if inputs.bias is None else inputs.bias
        mask = torch.where(seen, bias, -math.inf)
    # While a CUDA graph is captured nothing can be looked at: the calls before it have.
    capturing = inputs.q.is_cuda and torch.cuda.is_current_stream_capturing()
    if mask is not None and not capturing and bool(mask.isneginf().all(-1).any()):
        raise NotImplementedError("a query that sees no key, for which its softmax gives NaN")
    return mask


def _seen(inputs: Inputs, problem: Problem) -> Tensor | None:
    """Which keys a query sees, bool (B or 1, Hq or 1, Sq, Sk); None: all of them."""
    if problem.causal == "none" and not HIDING.intersection(problem.features):
        return None
    return visible(inputs, problem, distance_from_diagonal(inputs, problem))


def _sdpa(inputs: Inputs, problem: Problem) -> Attention:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return call(sdpa_attention_forward, sdpa_mask, inputs, problem)


def _eager(inputs: Inputs, problem: Problem) -> Attention:
    from transformers.models.llama.modeling_llama import eager_attention_forward

    return call(eager_attention_forward, eager_mask, inputs, problem)


def _eager_precision(device: str) -> Precision:
    return cpu_eager_precision() if device == "cpu" else EAGER


CAPABILITIES = Capabilities(
    features=FEATURES, gradients=("q", "k", "v", "bias"), empty_inputs=False, keep_mask=True
)
transformers_sdpa = LibraryBackend(
    name="transformers-sdpa",
    module="transformers",
    install=INSTALL,
    capabilities=CAPABILITIES,
    call=partial(with_keep_mask, _sdpa),
    declared=torch_precision,
)
transformers_eager = LibraryBackend(
    name="transformers-eager",
    module="transformers",
    install=INSTALL,
    capabilities=CAPABILITIES,
    call=partial(with_keep_mask, _eager),
    declared=_eager_precision,
)
