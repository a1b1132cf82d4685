"""torch's FlexAttention, compiled: the rules of a problem as a score_mod and a block mask.

A score_mod holds what changes a score (softcap, bias, ALiBi), a mask_mod what hides a key
(causality, window, lengths, packed sequences, the boolean mask). Both are written with indices
alone, so that the kernel for which they are compiled, and torch's own uncompiled function,
compute the same. To be judged, a kernel is compiled for each dtype, head dimension and set of
rules, not for each problem: sizes are dynamic, and the numbers of the rules are tensors. To be
timed, it is compiled for the sizes of the problem, which is faster. In fp32 torch's own choice
of tiles takes up to minutes to compile (products without tensor cores are unrolled); smaller ones
are asked for, which changes nothing but the tiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
)

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import FLASH
from attn_reference.problem import Problem

from ..backend import Capabilities
from ..requirement import Requirement
from ..signatures.common import FunctionBackend
from .positions import without_padding

SMALLEST_HEAD_DIM = 16  # Triton's dot takes no less
ROWS = 32  # of a tile in fp32
GRAPHS = 1 << 14  # more than any run compiles; beyond its limit Dynamo gives up
TANH_ERROR = 2.0**-22  # of CUDA's library, relative, as measured for the Triton backend

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Diagonal = Callable[[Tensor, Tensor], Tensor]  # (b, i): the key that lies on query i's diagonal


def attention(function: Callable[..., Any], inputs: Inputs, problem: Problem) -> Attention:
    """Attention by ``function``, which is ``flex_attention``, compiled or not."""
    return prepare(inputs, problem)(function)


def prepare(
    inputs: Inputs, problem: Problem, *, lse: bool = True
) -> Callable[[Callable[..., Any]], Attention]:
    """That of any such function, with score_mod and block mask made once."""
    diagonal = diagonal_of(inputs, problem)
    changes = score_mod(inputs, problem, diagonal)
    block_mask = block_mask_of(inputs, problem, diagonal)
    asked = {"return_aux": AuxRequest(lse=True)} if lse else {}

    def attend(function: Callable[..., Any]) -> Attention:
        found = function(
            inputs.q,
            without_padding(inputs.k, inputs),
            without_padding(inputs.v, inputs),
            score_mod=changes,
            block_mask=block_mask,
            scale=problem.softmax_scale,
            enable_gqa=problem.group > 1,
            **asked,
        )
        return Attention(out=found[0], lse=found[1].lse) if lse else Attention(out=found)

    return attend


def compiled(inputs: Inputs, problem: Problem) -> Attention:
    """Attention by the kernel that is compiled for problems like this one.

    NotImplementedError for head dimensions that the kernel's template does not take, and where the
    kernel needs more shared memory than the GPU has.
    """
    _refuse(problem)
    attend = prepare(inputs, problem)
    with _compiling():
        return attend(partial(_of_any_size(), kernel_options=tiles(problem)))


def prepare_compiled(inputs: Inputs, problem: Problem) -> Callable[[], Attention]:
    """Attention by the kernel that is compiled for this problem, as FlexAttention is meant to be
    used: its sizes are known, its block mask is made once, and no LSE, which a second kernel turns
    into natural logarithms, is asked for. It refuses what ``compiled`` refuses."""
    _refuse(problem)
    attend = prepare(inputs, problem, lse=False)
    function = partial(_of_one_size(problem), kernel_options=tiles(problem))
    called = False

    def call() -> Attention:
        nonlocal called
        if called:  # a user's call changes no settings, which takes time of its own
            return attend(function)
        with _compiling():
            result = attend(function)
        called = True
        return result

    return call


def _refuse(problem: Problem) -> None:
    least = min(problem.head_dim, problem.value_dim)
    if least < SMALLEST_HEAD_DIM:
        raise NotImplementedError(f"head_dim {least} is below the {SMALLEST_HEAD_DIM} of Triton")


@contextmanager
def _compiling() -> Iterator[None]:
    """Settings for a call that may compile; what does not fit the GPU becomes unsupported."""
    import torch._dynamo
    import torch._inductor.config

    try:
        with (
            torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS),
            # A run has a process for each core: none of them needs a pool of its own.
            torch._inductor.config.patch(compile_threads=1),
        ):
            yield
    except RuntimeError as error:
        if "out of resource" not in str(error):
            raise
        raise NotImplementedError(f"no kernel of torch fits this GPU: {error}") from error


def tiles(problem: Problem) -> dict[str, int | bool] | None:
    """The tiles of the kernels, as ``kernel_options`` names them; None leaves them to torch."""
    if problem.dtype != "fp32":
        return None
    backward = dict.fromkeys(("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), 32)
    # The kernel for decoding has the queries of a group of heads in one tile.
    if problem.seqlen_q * problem.group <= ROWS:
        return {"BLOCK_N": 16} | backward
    forward = {"BLOCK_M": ROWS, "BLOCK_N": 16, "FORCE_USE_FLEX_ATTENTION": True}
    return forward | backward


def score_mod(inputs: Inputs, problem: Problem, diagonal: Diagonal) -> ScoreMod | None:
    """What changes a score, in the order of the reference; None where nothing does."""
    bias = _full(inputs.bias, problem, inputs)
    slopes = inputs.alibi_slopes
    if not problem.softcap and bias is None and slopes is None:
        return None
    cap = _number(problem.softcap, torch.float32, inputs) if problem.softcap else None
    if bias is not None and bias.requires_grad:
        bias = bias.contiguous()  # else the kernel adds its gradient up, in the dtype of the bias

    def changed(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if bias is not None:
            score = score + bias[b, h, i, j]
        if slopes is not None:
            score = score - slopes[h] * (j - diagonal(b, i)).abs()
        return score

    return changed


def mask_mods(inputs: Inputs, problem: Problem, diagonal: Diagonal) -> list[MaskMod]:
    """The rules of which each says whether a key may be seen."""
    rules: list[MaskMod] = []
    sides = problem.window or (None, None)
    left, right = (None if n is None else _number(n, torch.int32, inputs) for n in sides)
    if left is not None:
        rules.append(lambda b, h, i, j: j >= diagonal(b, i) - left)
    if problem.causal != "none":
        rules.append(lambda b, h, i, j: j <= diagonal(b, i))
    elif right is not None:
        rules.append(lambda b, h, i, j: j <= diagonal(b, i) + right)
    if (lengths := inputs.key_lengths) is not None:
        rules.append(lambda b, h, i, j: j < lengths[b])
    if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
        of_query = _sequence_of(inputs.cu_seqlens_q, inputs.q.shape[2])
        of_key = _sequence_of(inputs.cu_seqlens_k, inputs.k.shape[2])
        rules.append(lambda b, h, i, j: of_query[i] == of_key[j])
    if (mask := _full(inputs.mask, problem, inputs)) is not None:
        rules.append(lambda b, h, i, j: mask[b, h, i, j])
    return rules


def block_mask_of(inputs: Inputs, problem: Problem, diagonal: Diagonal) -> BlockMask | None:
    """The rules, and the blocks in which they leave something; None where there are none."""
    rules = mask_mods(inputs, problem, diagonal)
    if not rules:
        return None
    batch, heads, len_q, _ = inputs.q.shape
    shape = (1, 1) if inputs.mask is None else inputs.mask.shape[:2]
    by_batch = inputs.key_lengths is not None or shape[0] > 1
    return create_block_mask(
        and_masks(*rules),
        batch if by_batch else None,
        heads if shape[1] > 1 else None,
        len_q,
        inputs.k.shape[2],
        device=inputs.q.device,
    )


def diagonal_of(inputs: Inputs, problem: Problem) -> Diagonal:
    """Where the diagonal lies that causality, windows and ALiBi are measured from."""
    from_the_end = problem.causal != "top-left"
    if inputs.cu_seqlens_q is not None and inputs.cu_seqlens_k is not None:
        # Of a packed sequence the beginnings lie on it, or the ends.
        shift = (inputs.cu_seqlens_k - inputs.cu_seqlens_q)[int(from_the_end) :]
        shift = shift[_sequence_of(inputs.cu_seqlens_q, inputs.q.shape[2])]
        return lambda b, i: i + shift[i]
    if inputs.key_lengths is not None and from_the_end:
        offsets = inputs.key_lengths - problem.seqlen_q
        return lambda b, i: i + offsets[b]
    if not from_the_end:
        return lambda b, i: i
    offset = _number(problem.keys - problem.seqlen_q, torch.int32, inputs)
    return lambda b, i: i + offset


def _sequence_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """The number of the sequence that each position belongs to, (total,)."""
    positions = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True)


def _full(tensor: Tensor | None, problem: Problem, inputs: Inputs) -> Tensor | None:
    """A mask or bias with all its dimensions, which may still share memory."""
    if tensor is None:
        return None
    return tensor.expand(inputs.q.shape[0], problem.heads_q, inputs.q.shape[2], inputs.k.shape[2])


def _number(value: float, dtype: torch.dtype, inputs: Inputs) -> Tensor:
    """A number of the problem as a tensor: otherwise it would be compiled in."""
    return inputs.q.new_full((), value, dtype=dtype)


@cache
def _of_any_size() -> Callable[..., Any]:
    # Not a full graph would be another implementation, uncompiled.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@cache
def _of_one_size(problem: Problem) -> Callable[..., Any]:
    """Compiled for that problem alone, by code of its own: graphs of other problems, which Dynamo
    keeps by code, neither count toward its limits nor are looked through by a call."""
    of = flex_attention
    code = of.__code__.replace()
    own = FunctionType(code, of.__globals__, of.__name__, of.__defaults__, of.__closure__)
    own.__kwdefaults__ = of.__kwdefaults__
    return torch.compile(own, dynamic=False, fullgraph=True)


flex = FunctionBackend(
    name="flex",
    capabilities=Capabilities(
        devices=("cuda",),
        features=frozenset(
            {
                "causal top-left",
                "causal bottom-right",
                "window",
                "softcap",
                "alibi",
                "boolean mask",
                "bias",
                "scale",
                "gqa",
                "head_dim_v",
                "key lengths",
                "packed",
                "lse gradient",
            }
        ),
        gradients=("q", "k", "v", "bias"),
        head_dim_max=256,
        returns_lse=True,
        empty_inputs=False,
    ),
    call=compiled,
    prepared=prepare_compiled,
    declared=replace(FLASH, name="torch-cuda-flex", tanh_error=TANH_ERROR),
    # What Triton generates code for.
    requirement=Requirement(who="flex", arch_min="sm_70", dtypes=(("bf16", "sm_80"),)),
)
