"""Backends as attention implementations of transformers 5: ``attn_implementation="attnproof-…"``.

``register`` enters each under one name in both registries of transformers, the functions that
compute attention and those that make its mask: with the first alone, the mask that arrives is
None, without a word. transformers is imported by ``register`` and not before; a backend is loaded
when a model first uses it.

What a model means is put into the terms of the backend:

- causal and nothing else: no mask, and bottom-right alignment (top-left for a square, where it is
  the same, and none for a single query, if the backend has only those);
- any other mask, for a backend that takes boolean masks: transformers' own, bool (B, 1, Sq, Sk);
- padding, for a backend that takes none: the tokens that are none are left out, and the others
  packed, or, without packing, computed one sequence after the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.problem import DTYPES, Problem

from ..backend import Backend, DeviceDependent
from ..targets import TargetSpec, load, registered

PREFIX = "attnproof-"
MASK = "boolean mask"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def implementation_name(backend: str) -> str:
    """The name for ``attn_implementation`` of a backend of that name: "attnproof-<backend>".

    With "Flash" for "flash", and a dot for all but letters, digits, dots and dashes: transformers
    takes a name with "flash" in it for one of its own, and "folder/file" for a kernel of its hub.
    """
    return PREFIX + re.sub(r"[^\w.-]", ".", backend.replace("flash", "Flash"))


def register(*backends: str | Backend) -> tuple[str, ...]:
    """Make backends, by name or as objects, attention implementations of transformers.

    Without arguments all registered backends, none of which is loaded yet. Gives their names for
    ``attn_implementation``. Raises ModuleNotFoundError without transformers, ValueError for an
    unknown backend.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    known = registered()
    names = []
    for backend in backends or tuple(known):
        if isinstance(backend, str) and backend not in known:
            raise ValueError(f"backend {backend!r}: unknown; registered are {', '.join(known)}")
        name = implementation_name(backend if isinstance(backend, str) else backend.name)
        made = Implementation(name, backend)
        AttentionInterface.register(name, made.attention)
        AttentionMaskInterface.register(name, made.mask)
        names.append(name)
    return tuple(names)


@dataclass
class Implementation:
    """The two functions that transformers calls, for one backend."""

    name: str
    backend: str | Backend
    _loaded: dict[str, Backend] = field(default_factory=dict)

    def on(self, device: str) -> Backend:
        """The backend on 'cpu' or 'cuda'; RuntimeError where it cannot run."""
        if device not in self._loaded:
            found = self.backend
            if isinstance(found, str):
                found = load(TargetSpec(found), device)
            elif isinstance(found, DeviceDependent):
                found = found.on_device(device)
            if reason := found.availability(device):
                raise RuntimeError(f"{self.name} cannot run on {device}: {reason}")
            self._loaded[device] = found
        return self._loaded[device]

    def mask(self, **given: Any) -> Tensor | None:
        """The mask of a forward pass, in the form that ``attention`` takes.

        None: causal or bidirectional as the module is, and nothing else. Bool (B, 1, Sq, Sk):
        True where visible. Bool (B, Sk): True where a key is a token, for backends without masks;
        NotImplementedError where more than padding is masked.
        """
        from transformers.masking_utils import (
            bidirectional_mask_function,
            causal_mask_function,
            sdpa_mask,
        )

        device = torch.device(given["device"]).type
        features = self.on(device).capabilities.features
        padding = given.get("attention_mask")
        queries, keys = given["q_length"], given["kv_length"]
        plain = given["mask_function"] in (causal_mask_function, bidirectional_mask_function)
        # Otherwise room for keys that are still to come, as a static cache has it.
        whole = not given["kv_offset"] and given["q_offset"] + queries == keys
        if plain and whole and (padding is None or bool(padding[:, :keys].all())):
            causal = given["mask_function"] is causal_mask_function
            if not causal or alignment(features, queries, keys) is not None:
                return None
        if MASK in features:
            given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            mask: Any = sdpa_mask(**given)
            if math.isnan(self.on(device).capabilities.empty_row_out):
                mask = mask | ~mask.any(-1, keepdim=True)  # a query of padding: anything but NaN
            made: Tensor = mask
            return made
        if not (plain and whole):
            raise NotImplementedError(
                f"{self.name}: takes no boolean mask, and more than padding is masked here"
            )
        return padding

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv): out (B, Sq, Hq, Dv),
        contiguous, and no weights.

        attention_mask: of ``mask``, or a bias (B, 1 or Hq, Sq, Sk) that is added to the scores.
        softcap, s_aux (sinks, (Hq,)) and position_bias are what models pass that have them.
        Raises NotImplementedError, with the reasons, for what the backend does not support.
        """
        backend = self.on(query.device.type)
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        inputs = Inputs(q=query, k=key, v=value)
        problem = Problem(
            batch=query.shape[0],
            heads_q=query.shape[1],
            heads_kv=key.shape[1],
            seqlen_q=query.shape[2],
            seqlen_k=key.shape[2],
            head_dim=query.shape[3],
            head_dim_v=value.shape[3],
            dtype=NAMES[query.dtype],
            scale=scaling,
            softcap=softcap or 0.0,
            sinks=s_aux is not None,
            dropout=dropout,
            # Where the backend draws what it drops from the problem.
            seed=int(torch.randint(2**31, ())) if dropout else 0,
        )
        if s_aux is not None:
            inputs = replace(inputs, sinks=s_aux.float())
        bias = position_bias
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            bias = attention_mask if bias is None else bias + attention_mask
            attention_mask, is_causal = None, False
        if bias is not None:
            inputs = replace(inputs, bias=bias.to(query.dtype))
            problem = replace(problem, bias="given", bias_shape=_broadcast(bias))
        if attention_mask is not None and attention_mask.ndim == 4:
            inputs = replace(inputs, mask=attention_mask)
            problem = replace(problem, mask="given", mask_shape=_broadcast(attention_mask))
        elif is_causal:
            features = backend.capabilities.features
            found = alignment(features, problem.seqlen_q, problem.keys)
            problem = replace(problem, causal=found or "bottom-right")
        if attention_mask is not None and attention_mask.ndim == 2:
            compute = _packed if "packed" in backend.capabilities.features else _one_by_one
            return compute(self._compute, backend, inputs, problem, attention_mask), None
        out = self._compute(backend, inputs, problem)
        return out.transpose(1, 2).contiguous(), None

    def _compute(self, backend: Backend, inputs: Inputs, problem: Problem) -> Tensor:
        if reasons := backend.capabilities.unsupported_reasons(problem):
            raise NotImplementedError(f"{self.name}: {'; '.join(reasons)}")
        return backend.attention(inputs, problem).out


def alignment(features: frozenset[str], queries: int, keys: int) -> str | None:
    """The causal alignment, of those that a backend has, that means bottom-right here; or None."""
    if "causal bottom-right" in features:
        return "bottom-right"
    if queries == keys and "causal top-left" in features:
        return "top-left"
    return "none" if queries == 1 else None


Compute = Callable[[Backend, Inputs, Problem], Tensor]


def _packed(
    compute: Compute, backend: Backend, inputs: Inputs, problem: Problem, tokens: Tensor
) -> Tensor:
    """Attention of those queries and keys that are ``tokens``, bool (B, Sk), packed: 0 elsewhere,
    (B, Sq, Hq, Dv)."""
    queries = tokens[:, -problem.seqlen_q :]
    packed = replace(
        inputs,
        q=_pack(inputs.q, queries),
        k=_pack(inputs.k, tokens),
        v=_pack(inputs.v, tokens),
        cu_seqlens_q=_bounds(queries),
        cu_seqlens_k=_bounds(tokens),
    )
    lengths = tuple(zip(queries.sum(1).tolist(), tokens.sum(1).tolist(), strict=True))
    out = compute(backend, packed, replace(problem, packed=lengths))
    return _unpacked(out, queries)


def _one_by_one(
    compute: Compute, backend: Backend, inputs: Inputs, problem: Problem, tokens: Tensor
) -> Tensor:
    """The same, a call for each sequence."""
    queries = tokens[:, -problem.seqlen_q :]
    parts = []
    for n in range(problem.batch):
        one = slice(n, n + 1)
        single = replace(
            inputs,
            q=_pack(inputs.q[one], queries[one]),
            k=_pack(inputs.k[one], tokens[one]),
            v=_pack(inputs.v[one], tokens[one]),
        )
        seqlen_q, seqlen_k = single.q.shape[2], single.k.shape[2]
        if seqlen_q:
            alone = replace(problem, batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
            parts.append(compute(backend, single, alone))
    return _unpacked(torch.cat(parts, 2), queries)


def _broadcast(mask: Tensor) -> str:
    """Which dimensions of a mask or bias broadcast, as ``Problem.mask_shape`` says it."""
    return "".join("1" if n == 1 else x for n, x in zip(mask.shape, "bhqk", strict=True))


def _pack(tensor: Tensor, tokens: Tensor) -> Tensor:
    """(B, H, S, D) to (1, H, tokens, D)."""
    return tensor.transpose(1, 2)[tokens].transpose(0, 1)[None]


def _unpacked(out: Tensor, queries: Tensor) -> Tensor:
    """(1, H, tokens, D) to (B, S, H, D)."""
    whole = out.new_zeros(*queries.shape, out.shape[1], out.shape[3])
    return whole.masked_scatter(queries[:, :, None, None], out[0].transpose(0, 1))


def _bounds(tokens: Tensor) -> Tensor:
    """Where each sequence begins and ends among all tokens, (B + 1,) int32."""
    return torch.nn.functional.pad(tokens.sum(1).cumsum(0), (1, 0)).to(torch.int32)
