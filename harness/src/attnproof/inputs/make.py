"""The inputs of a problem: the same bits on every machine, each tensor from its own stream."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_reference.inputs import Inputs, key_count, output_shape, standard_alibi_slopes
from attn_reference.problem import Problem

from .distributions import DISTRIBUTIONS, query_scale
from .patterns import BIAS_PATTERNS, MASK_PATTERNS, pattern
from .streams import Floats, Stream

__all__ = [
    "BIAS_PATTERNS",
    "DISTRIBUTIONS",
    "MASK_PATTERNS",
    "is_iid",
    "make_inputs",
    "make_keep_mask",
]

SPARE_PAGES = 3  # pages of a cache that no batch entry uses
# Standard deviations of the scores between which probabilities are neither all but equal nor
# all but one-hot: elsewhere the rounding errors of a row are not independent.
IID_SCORES = (0.2, 8.0)


def make_inputs(problem: Problem) -> Inputs:
    """The inputs that this problem names: contiguous tensors in canonical shapes, on the CPU.

    Keys beyond ``key_lengths``, the unused ends of pages and the unused pages hold NaN, in k and
    in v; entries of the page table beyond a sequence's length name such a page. Incoming
    gradients are made when the problem asks for gradients. keep_mask is not made: what dropout
    keeps is the target's to draw (``make_keep_mask`` is for those who need one).

    Raises ValueError, listing what is known, for an unknown distribution or pattern.
    """
    name, _, argument = problem.distribution.partition(":")
    distribute = pattern(DISTRIBUTIONS, name, "distribution")
    if argument and name != "normal":
        raise ValueError(f"distribution={problem.distribution!r}: {name} takes no argument")
    q, k, v = distribute(problem, argument)
    inputs = Inputs(q=_tensor(q, problem), k=_tensor(k, problem), v=_tensor(v, problem))
    if problem.mask is not None:
        make = pattern(MASK_PATTERNS, problem.mask, "mask")
        visible = make(Stream(problem.seed, "mask"), _broadcast(problem, problem.mask_shape))
        inputs.mask = torch.from_numpy(np.ascontiguousarray(visible))
    if problem.bias is not None:
        make = pattern(BIAS_PATTERNS, problem.bias, "bias")
        bias = make(Stream(problem.seed, "bias"), _broadcast(problem, problem.bias_shape))
        inputs.bias = _tensor(bias, problem)
    if problem.alibi:
        inputs.alibi_slopes = standard_alibi_slopes(problem.heads_q)
    if problem.sinks:
        inputs.sinks = torch.from_numpy(_sinks(problem))
    if problem.packed is not None:
        inputs.cu_seqlens_q = _bounds(length for length, _ in problem.packed)
        inputs.cu_seqlens_k = _bounds(length for _, length in problem.packed)
    if problem.key_lengths is not None:
        inputs.key_lengths = torch.tensor(problem.key_lengths, dtype=torch.int32)
        for b, length in enumerate(problem.key_lengths):
            inputs.k[b, :, length:] = math.nan
            inputs.v[b, :, length:] = math.nan
    if problem.page_size is not None:
        _into_pages(inputs, problem)
    if problem.gradients:
        inputs.grad_out = _tensor(_grad_out(problem, name), problem)
        if problem.lse_gradient:
            shape = output_shape(problem)[:-1]
            inputs.grad_lse = torch.from_numpy(Stream(problem.seed, "grad_lse").normal(shape))
    return inputs


def make_keep_mask(problem: Problem) -> Tensor:
    """What dropout might keep, True with probability 1 - dropout: bool (B, Hq, Sq, Sk)."""
    shape = _broadcast(problem, "bhqk")
    kept = Stream(problem.seed, "keep_mask").bernoulli(shape, 1 - problem.dropout)
    return torch.from_numpy(kept)


def is_iid(problem: Problem) -> bool:
    """Whether rounding errors are so independent that statistics of a whole row mean something.

    True for normal inputs whose scores spread neither so little that all probabilities are
    nearly equal, and round in the same direction, nor so much that one of them is all.
    """
    name, _, argument = problem.distribution.partition(":")
    if name != "normal":
        return False
    spread = abs(query_scale(argument) * problem.softmax_scale) * math.sqrt(problem.head_dim)
    if problem.softcap:
        spread = min(spread, problem.softcap)
    return IID_SCORES[0] <= spread <= IID_SCORES[1]


def _tensor(values: Floats, problem: Problem) -> Tensor:
    """Rounded once, from float32 to the problem's dtype."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(problem.torch_dtype)


def _broadcast(problem: Problem, shape: str) -> tuple[int, int, int, int]:
    """(B, Hq, Sq, Sk) with 1 where ``shape`` has a 1."""
    batch, heads, rows, _ = output_shape(problem)
    sizes = (batch, heads, rows, key_count(problem))
    b, h, q, k = (1 if letter == "1" else size for letter, size in zip(shape, sizes, strict=True))
    return b, h, q, k


def _bounds(lengths: Iterable[int]) -> Tensor:
    """Cumulative lengths from 0, int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _sinks(problem: Problem) -> Floats:
    """Sinks of about the weight of all keys together; every fourth head's outweighs any score."""
    sinks = Stream(problem.seed, "sinks").normal((problem.heads_q,))
    sinks += np.float32(0.6875 * problem.keys.bit_length())  # about ln(seqlen_k)
    sinks[3::4] = 100.0
    return sinks


def _grad_out(problem: Problem, distribution: str) -> Floats:
    """N(0, 1), or small integers for exact answers."""
    stream = Stream(problem.seed, "grad_out")
    shape = output_shape(problem)
    if distribution == "integers":
        return stream.integers(shape, -8, 8).astype(np.float32)
    return stream.normal(shape)


def _into_pages(inputs: Inputs, problem: Problem) -> None:
    """Scatter k and v over pages in random order, and write the page table."""
    assert problem.page_size is not None
    size = problem.page_size
    per_entry = -(-problem.keys // size)
    pages = problem.batch * per_entry + SPARE_PAGES
    order = Stream(problem.seed, "page_table").permutation(pages)
    table: NDArray[np.int64] = order[: problem.batch * per_entry].reshape(problem.batch, per_entry)
    lengths = problem.key_lengths or (problem.keys,) * problem.batch
    dense = {"k": inputs.k, "v": inputs.v}
    for name, tensor in dense.items():
        paged = tensor.new_full((pages, problem.kv_heads, size, tensor.shape[-1]), math.nan)
        for b, length in enumerate(lengths):
            for n, start in enumerate(range(0, length, size)):
                run = tensor[b, :, start : min(start + size, length)]
                paged[int(table[b, n]), :, : run.shape[1]] = run
        setattr(inputs, name, paged)
    for b, length in enumerate(lengths):
        table[b, -(-length // size) :] = order[-1]  # a page of NaN
    inputs.page_table = torch.from_numpy(table.astype(np.int32))
