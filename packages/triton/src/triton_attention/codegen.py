"""Which calls are compiled for the codegen gate, and what the compiler says about their kernels.

A call is named as "forward bf16 128 causal": pass, dtype, head_dim and what goes with it. Which
kernels it consists of is up to ``Launches``. Triton is imported when a call is compiled, not
before.
"""

from __future__ import annotations

import io
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import Arguments
from .launch import Launch
from .tiles import GPUS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BATCH, HEADS, SEQLEN, PAGE = 2, 4, 1024, 64
QUERY_HEADS = 32  # of decoding, with HEADS of keys
TENSOR_MEMORY = 512  # columns that a multiprocessor has, from sm_100 on

# The longest to compile come first: processes that share the work then end together.
EVERYWHERE = (
    "backward bf16 128 causal",
    "v1-backward fp16 64 causal",
    "v1-forward fp16 64 causal",
    "forward bf16 128 dense",
    "forward bf16 64 causal",
    "decode bf16 128 paged",
    "keep-mask fp16 64 dropout",
)
CALLS = {
    100: (
        "backward bf16 256 causal",
        "backward fp16 64 dense",
        "backward bf16 64 bias",
        "forward fp16 256 causal",
        "forward bf16 128 softcap-alibi",
        "forward fp16 64 window",
        "forward bf16 96 bias",
        "forward fp16 80 dropout",
        "forward bf16 128 varlen",
        "forward fp32 64 dense",
    ),
    90: (
        "hopper-backward bf16 128 causal",
        "hopper-backward fp16 64 dense",
        "backward fp16 256 window",
        "backward bf16 64 softcap-alibi",
        "backward bf16 128 bias",
        "backward bf16 80 varlen",
        "forward fp16 256 causal",
        "hopper-forward bf16 128 causal",
        "hopper-forward bf16 64 dense",
        "hopper-forward fp16 256 window",
        "forward bf16 128 causal",
        "forward bf16 128 window",
        "forward fp16 128 bias",
        "forward bf16 80 softcap-alibi",
        "forward fp16 96 dropout",
        "forward fp16 128 varlen",
        "forward bf16 64 rule",
        "forward fp32 128 dense",
        "decode fp16 64 dense",
    ),
    89: (
        "backward fp32 64 causal",
        "backward fp16 96 bias",
        "forward fp16 256 softcap-alibi",
        "forward fp16 128 window",
        "forward bf16 40 bias",
        "forward bf16 128 dropout",
        "forward bf16 64 varlen",
        "forward fp32 16 dense",
    ),
    86: (
        "backward bf16 64 dropout",
        "backward fp16 72 bias",
        "forward bf16 64 softcap-alibi",
        "forward bf16 96 window",
        "forward fp16 72 bias",
        "forward fp16 32 dropout",
        "forward fp16 128 varlen",
        "forward fp32 256 dense",
    ),
    80: (
        "backward bf16 256 bias",
        "backward fp16 80 softcap-alibi",
        "forward fp16 128 softcap-alibi",
        "forward fp16 80 window",
        "forward bf16 64 bias",
        "forward bf16 32 dropout",
        "forward bf16 128 varlen",
        "forward fp32 100 causal",
        "decode fp16 256 dense",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the compiler made of a kernel: text, and memory of a block of threads."""

    ttgir: str
    sass: str
    log: str  # of ptxas -v
    shared: int  # bytes
    tensor_memory: int  # columns


def calls() -> list[tuple[int, str]]:
    """Compute capabilities, and the names of what is compiled for them."""
    return [(capability, name) for capability in CALLS for name in _of(capability)]


def limits(capability: int) -> dict[str, int]:
    """How much of its memories a block of threads may use, named as in ``Said``."""
    tensor_memory = TENSOR_MEMORY if capability == 100 else 0
    return {"shared": GPUS[capability].shared_memory, "tensor_memory": tensor_memory}


def launches(capability: int, name: str) -> list[Launch]:
    """The launches of a call, with its tiles for that GPU. ValueError for a call not listed."""
    if (capability, name) not in calls():
        raise ValueError(f"call {name!r} for sm_{capability}: accepted are those of calls()")
    what, dtype, head_dim, feature = name.split()
    return PASSES[what](capability, DTYPES[dtype], int(head_dim), feature)


def read(launch: Launch, capability: int) -> Said:
    """Compile a launch, whether Triton's cache has it or not: a cached kernel has no log."""
    from triton import knobs

    from .compiled import compile_for

    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        with redirect_stdout(printed):
            kernel = compile_for(launch, capability)
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.nvdisasm.path, "-c", str(cubin)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Said(
        ttgir=kernel.asm["ttgir"],
        sass=sass,
        log=printed.getvalue(),
        shared=kernel.metadata.shared,
        tensor_memory=kernel.metadata.tmem_size or 0,
    )


def toolchain() -> dict[str, str]:
    """The versions of the tools that compile, by name: other ones make other code."""
    import triton
    from triton import knobs

    tools = {tool: getattr(knobs.nvidia, tool).version for tool in ("ptxas", "ptxas_blackwell")}
    return {"triton": triton.__version__, **tools}


def _of(capability: int) -> tuple[str, ...]:
    return (*EVERYWHERE, *CALLS[capability])


def _arguments(dtype: torch.dtype, head_dim: int, feature: str) -> Arguments:
    q, k, v = (torch.empty(BATCH, HEADS, SEQLEN, head_dim, dtype=dtype) for _ in range(3))
    x = Arguments(q=q, k=k, v=v)
    scores = (BATCH, HEADS, SEQLEN, SEQLEN)
    match feature:
        case "dense":
            return x
        case "causal":
            return replace(x, causal="bottom-right")
        case "window":
            return replace(x, causal="bottom-right", window=(256, 0))
        case "bias":
            mask = q.new_empty((BATCH, 1, 1, SEQLEN), dtype=torch.bool)
            return replace(x, mask=mask, bias=q.new_empty(scores))
        case "softcap-alibi":
            slopes = torch.empty(HEADS)
            return replace(x, causal="bottom-right", softcap=30.0, alibi_slopes=slopes)
        case "dropout":
            return replace(x, causal="bottom-right", dropout_p=0.1)
        case "varlen":
            bounds = torch.tensor([0, SEQLEN // 2, SEQLEN], dtype=torch.int32)
            q, k, v = (tensor[:1] for tensor in (q, k, v))
            return Arguments(
                q=q, k=k, v=v, causal="bottom-right", cu_seqlens_q=bounds, cu_seqlens_k=bounds,
                max_seqlen_q=SEQLEN // 2, max_seqlen_k=SEQLEN // 2,
            )  # fmt: skip
        case "rule":
            return replace(x, mask_rule=_prefix_lm())
        case "paged":
            pages = k.new_empty((BATCH * SEQLEN // PAGE, HEADS, PAGE, head_dim))
            table = torch.zeros(BATCH, SEQLEN // PAGE, dtype=torch.int32)
            lengths = torch.full((BATCH,), SEQLEN, dtype=torch.int32)
            return replace(
                x, k=pages, v=pages, key_lengths=lengths, page_table=table, causal="bottom-right"
            )
    raise AssertionError(feature)


def _seed(x: Arguments) -> Tensor | None:
    return torch.zeros(1, dtype=torch.int64) if x.dropout_p else None


def _forward(
    capability: int, dtype: torch.dtype, head_dim: int, feature: str, *, hopper: bool = False
) -> list[Launch]:
    from .v2_launches import Launches

    x = _arguments(dtype, head_dim, feature)
    return Launches(x, _seed(x), GPUS[capability], hopper).forward(splits=1).launches


def _decode(capability: int, dtype: torch.dtype, head_dim: int, feature: str) -> list[Launch]:
    """One query of many heads: a block of rows is shared, and keys are split."""
    from .v2_launches import Launches

    x = _arguments(dtype, head_dim, feature)
    x = replace(
        x, q=x.q.new_empty((BATCH, QUERY_HEADS, 1, head_dim)), sinks=torch.empty(QUERY_HEADS)
    )
    return Launches(x, gpu=GPUS[capability]).forward(splits=4).launches


def _backward(
    capability: int, dtype: torch.dtype, head_dim: int, feature: str, *, hopper: bool = False
) -> list[Launch]:
    from .v2_launches import Launches

    x = _arguments(dtype, head_dim, feature)
    made = Launches(x, _seed(x), GPUS[capability], hopper)
    out = torch.empty_like(x.q)
    wanted = {"q", "k", "v"} | ({"bias"} if x.bias is not None else set())
    return made.backward(out, _of_rows(out), out, None, wanted).launches


def _keep_mask(capability: int, dtype: torch.dtype, head_dim: int, feature: str) -> list[Launch]:
    from .v2_launches import Launches

    x = _arguments(dtype, head_dim, feature)
    return Launches(x, _seed(x), GPUS[capability]).keep_mask().launches


def _v1_forward(capability: int, dtype: torch.dtype, head_dim: int, feature: str) -> list[Launch]:
    from .v1 import forward_launch

    return forward_launch(_arguments(dtype, head_dim, feature), gpu=GPUS[capability]).launches


def _v1_backward(capability: int, dtype: torch.dtype, head_dim: int, feature: str) -> list[Launch]:
    from .v1 import backward_launch

    x = _arguments(dtype, head_dim, feature)
    out = torch.empty_like(x.q, dtype=torch.float32)
    saved = {"out": out, "l": _of_rows(out), "m": _of_rows(out)}
    grad_out = torch.empty_like(x.q)
    return backward_launch(x, saved, grad_out, None, gpu=GPUS[capability]).launches


def _of_rows(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape[:-1])


@cache
def _prefix_lm() -> Any:
    """A rule that hides as many keys as a user's might."""
    import triton

    @triton.jit
    def prefix_lm(i, j, head, batch):  # type: ignore[no-untyped-def]
        return (j <= i) | (j < 24)

    return prefix_lm


PASSES: dict[str, Callable[[int, torch.dtype, int, str], list[Launch]]] = {
    "forward": _forward,
    "hopper-forward": partial(_forward, hopper=True),
    "decode": _decode,
    "backward": _backward,
    "hopper-backward": partial(_backward, hopper=True),
    "keep-mask": _keep_mask,
    "v1-forward": _v1_forward,
    "v1-backward": _v1_backward,
}
