"""Attention by its formula in fp64 on the CPU, and how results of kernels are held against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Of the largest magnitude of a tensor: out and gradients round P and dS to the dtype of q.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
LSE_TOLERANCE = 4e-6
DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: str = "none",
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    keep_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **places: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable; the arguments of V2, and what dropout kept."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    left, right = window
    group = q.shape[1] // k.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], -torch.inf)
    for entry, rows, keys, k_of, v_of in sequences(q, k, v, **places):

        def part(tensor: Tensor, at: tuple[Any, ...] = (entry, slice(None), rows, keys)) -> Tensor:
            sizes = (*q.shape[:3], at[3].stop if tensor.shape[3] == 1 else tensor.shape[3])
            return tensor.expand(sizes)[at]

        k_of, v_of = (t.repeat_interleave(group, 0) for t in (k_of, v_of))
        s = q[entry, :, rows] @ k_of.mT * scale
        if softcap:
            s = (s / softcap).tanh() * softcap
        if bias is not None:
            s = s + part(bias)
        len_q, len_k = s.shape[1:]
        diagonal = 0 if causal == "top-left" else len_k - len_q
        distance = torch.arange(len_k) - torch.arange(len_q)[:, None] - diagonal
        if alibi_slopes is not None:
            s = s - alibi_slopes[:, None, None] * distance.abs()
        seen = torch.ones_like(s, dtype=torch.bool)
        seen &= distance >= (-math.inf if left is None else -left)
        seen &= distance <= (math.inf if right is None else right)
        seen &= distance <= (math.inf if causal == "none" else 0)
        if mask is not None:
            seen &= part(mask)
        s = s.masked_fill(~seen, -torch.inf)
        # A sink is one more key, whose value is 0.
        sink = s.new_full((s.shape[0],), -torch.inf) if sinks is None else sinks
        s = torch.cat([s, sink[:, None, None].expand(-1, len_q, 1)], -1)
        empty = (s == -torch.inf).all(-1)
        s = s.masked_fill(empty[..., None], 0.0)
        p = s.softmax(-1)[..., :-1].masked_fill(empty[..., None], 0.0)
        if keep_mask is not None:
            p = p * part(keep_mask) / (1 - dropout_p)
        out[entry, :, rows] = p @ v_of
        lse[entry, :, rows] = s.logsumexp(-1).masked_fill(empty, -torch.inf)
    return out, lse


def sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    page_table: Tensor | None = None,
    **_: Any,
) -> Iterator[tuple[int, slice, slice, Tensor, Tensor]]:
    """Of each sequence: batch entry, rows, keys (in masks and biases), and its k and v."""
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        bounds = torch.stack([cu_seqlens_q, cu_seqlens_k]).tolist()
        for n in range(len(bounds[0]) - 1):
            rows, keys = (slice(cu[n], cu[n + 1]) for cu in bounds)
            yield 0, rows, keys, k[0, :, keys], v[0, :, keys]
        return
    for n in range(q.shape[0]):
        length = k.shape[2] if key_lengths is None else int(key_lengths[n])
        keys = slice(0, length)
        if page_table is None:
            yield n, slice(0, q.shape[2]), keys, k[n, :, keys], v[n, :, keys]
        else:
            pages = page_table[n, : -(-length // k.shape[2])].long()
            runs = (t[pages].transpose(0, 1).flatten(1, 2)[:, :length] for t in (k, v))
            yield n, slice(0, q.shape[2]), keys, *runs


def split(arguments: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fresh leaves that gradients are wanted of, and all other arguments."""
    names = [n for n in DIFFERENTIABLE if arguments.get(n) is not None]
    if arguments.get("page_table") is not None:
        names = [n for n in names if n not in ("k", "v")]
    leaves = {n: arguments[n].detach().requires_grad_() for n in names}
    return leaves, {n: value for n, value in arguments.items() if n not in leaves}


def results(
    function: Callable[..., Any], arguments: Mapping[str, Any], grads: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """What an implementation gives: out, lse, keep_mask with dropout, and gradients by name.

    grads: what comes in for out and, where it is there, for the LSE.
    """
    leaves, others = split(arguments)
    out, lse, *kept = function(**leaves, **others)
    flowing = (out, lse)[: len(grads)]
    found = torch.autograd.grad(flowing, list(leaves.values()), grads)
    results = {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, found, strict=True))
    return results | ({"keep_mask": kept[0]} if kept and kept[0] is not None else {})


def exact(value: Any) -> Any:
    """A value on the CPU, floats in fp64."""
    if not isinstance(value, Tensor):
        return value
    return value.cpu().double() if value.is_floating_point() else value.cpu()


def errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest error of each tensor, relative to its largest magnitude (or 1 for the LSE)."""
    measured = {}
    for name, truth in expected.items():
        value = exact(found[name])
        assert value.shape == truth.shape, name
        finite = truth.isfinite()
        if not torch.equal(value[~finite], truth[~finite]):
            measured[name] = math.inf
        elif not finite.any():
            measured[name] = 0.0
        else:
            largest = truth[finite].abs().max().item()
            largest = max(largest, 1.0) if name == "lse" else largest
            error = (value - truth)[finite].abs().max().item()
            measured[name] = error / largest if largest else error
            if math.isnan(error):
                measured[name] = math.inf
    return measured


def check(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    grads: tuple[Tensor, ...] | None = None,
    room: float = 1.0,
) -> dict[str, Tensor]:
    """Hold out, LSE and all gradients against the formula, within ``room`` times the tolerance.

    Gives what was found.
    """
    q, v = arguments["q"], arguments["v"]
    if grads is None:
        out = torch.randn(*q.shape[:3], v.shape[3]).to(q)
        grads = (out, torch.randn(q.shape[:3]).to(q.device))
    found = results(function, arguments, grads)
    plain = {name: exact(value) for name, value in arguments.items()}
    for name in ("return_lse", "return_keep_mask"):
        plain.pop(name, None)
    if "keep_mask" in found:
        plain["keep_mask"] = exact(found["keep_mask"])
    expected = results(attention, plain, tuple(exact(grad) for grad in grads))
    for name in expected:
        wanted = torch.float32 if name in ("lse", "sinks") else q.dtype
        assert found[name].dtype == wanted, name
    measured = errors(found, expected)
    for name, error in measured.items():
        limit = LSE_TOLERANCE if name == "lse" else TOLERANCE[q.dtype]
        assert error <= room * limit, f"{name} is off by {error:.1e}: {measured}"
    return found
