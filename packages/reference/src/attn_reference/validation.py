"""Do these tensors fit this problem? A clear ValueError when they do not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .inputs import Inputs, key_count, output_shape
from .problem import Problem

BLOCK = "bhqk"


def validate(inputs: Inputs, problem: Problem, *, backward: bool = False) -> None:
    """Raise a ValueError that names the first tensor that does not fit, how, and what would.

    Checked: which tensors are there, their shapes, dtypes and device, and that lengths and
    page numbers agree with the problem. ``backward`` also wants the gradients that come in.
    key_lengths and cu_seqlens may be missing: the problem has their values.
    """
    for complaint in complaints(inputs, problem, backward=backward):
        raise ValueError(complaint)


def complaints(inputs: Inputs, problem: Problem, *, backward: bool = False) -> Iterator[str]:
    """Every way in which the tensors do not fit the problem, as sentences."""
    others = {n: t for n, t in inputs.tensors().items() if not isinstance(t, Tensor)}
    if others:
        for name, value in others.items():
            yield f"{name} is a {type(value).__name__}: expected is a torch.Tensor"
        return
    yield from _presence(inputs, problem, backward)
    yield from _form(inputs, problem)
    if inputs.key_lengths is not None and problem.key_lengths is not None:
        yield from _values("key_lengths", inputs.key_lengths, problem.key_lengths)
    if problem.packed is not None:
        for side, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
            bounds = [0]
            for lengths in problem.packed:
                bounds.append(bounds[-1] + lengths[side])
            tensor = getattr(inputs, name)
            if tensor is not None:
                yield from _values(name, tensor, tuple(bounds))
    if problem.page_size is not None and inputs.page_table is not None:
        yield from _pages(inputs, inputs.page_table, problem)


def _presence(inputs: Inputs, problem: Problem, backward: bool) -> Iterator[str]:
    needed = {
        "mask": (problem.mask is not None, f"mask={problem.mask!r}"),
        "bias": (problem.bias is not None, f"bias={problem.bias!r}"),
        "alibi_slopes": (problem.alibi, f"alibi={problem.alibi}"),
        "sinks": (problem.sinks, f"sinks={problem.sinks}"),
        "page_table": (problem.page_size is not None, f"page_size={problem.page_size}"),
        "keep_mask": (problem.dropout > 0, f"dropout={problem.dropout}"),
    }
    for name, (need, because) in needed.items():
        tensor = getattr(inputs, name)
        if need and tensor is None:
            yield f"{name} is missing: the problem has {because}"
        if not need and tensor is not None:
            yield f"{name} is given, {_form_of(tensor)}, but the problem has {because}"
    allowed = {
        "key_lengths": (problem.key_lengths is not None, f"key_lengths={problem.key_lengths}"),
        "cu_seqlens_q": (problem.packed is not None, f"packed={problem.packed}"),
        "cu_seqlens_k": (problem.packed is not None, f"packed={problem.packed}"),
    }
    for name, (may, because) in allowed.items():
        tensor = getattr(inputs, name)
        if not may and tensor is not None:
            yield f"{name} is given, {_form_of(tensor)}, but the problem has {because}"
    if backward and inputs.grad_out is None:
        yield "grad_out is missing: gradients need the gradient of out"
    if backward and problem.lse_gradient and inputs.grad_lse is None:
        yield "grad_lse is missing: the problem has lse_gradient=True"


def _form(inputs: Inputs, problem: Problem) -> Iterator[str]:
    """Shape, dtype and device of every tensor that is there."""
    batch, heads_q, rows, _ = out_shape = output_shape(problem)
    keys, entries, kv_heads = key_count(problem), problem.batch, problem.kv_heads
    own, fp32 = (problem.torch_dtype,), (torch.float32,)
    # Logits and the LSE are fp32 beside 16-bit inputs, and may be fp64 beside fp64 inputs.
    logits = (torch.float32, torch.float64) if problem.dtype == "fp64" else fp32
    integers, booleans = (torch.int32,), (torch.bool,)
    paged = problem.page_size is not None
    # A shape entry of None takes any size.
    kv_start = (None, kv_heads, problem.page_size) if paged else (batch, kv_heads, keys)
    block = (batch, heads_q, rows, keys)
    expected: dict[str, tuple[tuple[int | None, ...], tuple[torch.dtype, ...]]] = {
        "q": ((batch, heads_q, rows, problem.head_dim), own),
        "k": ((*kv_start, problem.head_dim), own),
        "v": ((*kv_start, problem.value_dim), own),
        "mask": (_broadcast(block, problem.mask_shape), booleans),
        "bias": (_broadcast(block, problem.bias_shape), own),
        "alibi_slopes": ((heads_q,), logits),
        "sinks": ((heads_q,), logits),
        "key_lengths": ((entries,), integers),
        "cu_seqlens_q": ((entries + 1,), integers),
        "cu_seqlens_k": ((entries + 1,), integers),
        "page_table": ((entries, None), integers),
        "keep_mask": (block, booleans),
        "grad_out": (out_shape, own),
        "grad_lse": (out_shape[:-1], logits),
    }
    for name, tensor in inputs.tensors().items():
        shape, dtypes = expected[name]
        fits = len(shape) == tensor.dim() and all(
            want is None or want == size for want, size in zip(shape, tensor.shape, strict=True)
        )
        # A mask or bias that broadcasts may come expanded (through stride 0).
        expanded = name in ("mask", "bias") and tuple(tensor.shape) == block
        if not (fits or expanded):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            yield f"{name} has shape {tuple(tensor.shape)}: expected is ({sizes})"
        if tensor.dtype not in dtypes:
            yield f"{name} has dtype {tensor.dtype}: expected is {' or '.join(map(str, dtypes))}"
        if tensor.device != inputs.q.device:
            yield f"{name} is on {tensor.device}: expected is {inputs.q.device}, where q is"


def _broadcast(shape: tuple[int, ...], kept: str) -> tuple[int, ...]:
    return tuple(size if letter in kept else 1 for size, letter in zip(shape, BLOCK, strict=True))


def _values(name: str, tensor: Tensor, expected: tuple[int, ...]) -> Iterator[str]:
    found = tuple(tensor.flatten().tolist())
    if found != expected:
        yield f"{name} holds {found}: the problem has {expected}"


def _pages(inputs: Inputs, table: Tensor, problem: Problem) -> Iterator[str]:
    """Are there enough entries, and do those in use name pages that exist?"""
    if table.dim() != 2 or table.shape[0] != problem.batch:
        return  # said already
    assert problem.page_size is not None
    if inputs.v.shape[0] != inputs.k.shape[0]:
        yield f"v has {inputs.v.shape[0]} pages: expected is {inputs.k.shape[0]}, as k has"
    lengths = problem.key_lengths or (problem.keys,) * problem.batch
    for entry, length in enumerate(lengths):
        used = -(-length // problem.page_size)
        if table.shape[1] < used:
            yield (
                f"page_table has {table.shape[1]} pages per entry: "
                f"{length} keys need {used} of {problem.page_size}"
            )
            return
        wrong = [n for n in table[entry, :used].tolist() if not 0 <= n < inputs.k.shape[0]]
        if wrong:
            yield f"page_table names page {wrong[0]}: k has pages 0 to {inputs.k.shape[0] - 1}"
            return


def _form_of(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
