"""Where this package meets the harness: V1 and V2 as backends, interpreted on the CPU, what is
counted of them, and what their kernels compile to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import FLASH, Precision
from attn_reference.problem import FEATURES, GRADIENT_NAMES, Problem
from attnproof.backend import Capabilities
from attnproof.codegen.sources import Compiled
from attnproof.requirement import Requirement
from attnproof.traffic.sources import Setting, Traffic

from . import codegen as compiled_calls
from . import interpreter
from .arguments import LARGEST_HEAD_DIM
from .closed_forms import formula
from .launch import Launch
from .traffic import V1, V2, Workload, block_for, count

AMPERE = Requirement(who="Triton", arch_min="sm_80")  # as its README says
# Relative errors beyond fp32 rounding, as measured on an H100 (tests/test_precision.py).
TANH_ERROR = {"cpu": 0.0, "cuda": 2.0**-22}


@dataclass(frozen=True)
class TritonBackend:
    """One version of FlashAttention, on a GPU, or on the CPU through Triton's interpreter."""

    name: str
    capabilities: Capabilities
    requirement: Requirement = AMPERE

    def precision(self, device: str) -> Precision:
        """A fused kernel: everything in fp32, P and dS cast to the dtype of the inputs."""
        return replace(FLASH, name=self.name, tanh_error=TANH_ERROR[device])

    def availability(self, device: str) -> str | None:
        """None when it can run on 'cpu' or 'cuda' here, else the reason.

        Whether this process interprets kernels or compiles them is decided here.
        """
        if device == "cpu":
            try:
                interpreter.enable()
            except RuntimeError as error:
                return str(error)
        elif not torch.cuda.is_available():
            return "torch finds no CUDA device here"
        elif interpreter.enabled():
            return f"{interpreter.VARIABLE} is set: Triton interprets its kernels on the CPU"
        return None

    def attention(self, inputs: Inputs, problem: Problem) -> Attention:
        """out, lse and, with dropout, the keep_mask."""
        call = self._call(inputs, problem)
        if self.name == "triton-v1":
            out, lse = call(return_lse=True)
            return Attention(out=out, lse=lse)
        out, lse, keep_mask = call(return_lse=True, return_keep_mask=True)
        return Attention(out=out, lse=lse, keep_mask=keep_mask)

    def prepare(self, inputs: Inputs, problem: Problem) -> Callable[[], Attention]:
        """The call that a benchmark times: for out alone, the lengths made once."""
        call = self._call(inputs, problem)
        return lambda: Attention(out=call())

    def _call(self, inputs: Inputs, problem: Problem) -> Callable[..., Any]:
        """The function of this version with the arguments that a problem comes to."""
        arguments: dict[str, Any] = {"scale": problem.scale, "causal": problem.causal}
        function: Callable[..., Any]
        if self.name == "triton-v1":
            from .v1 import attention as function
        else:
            from .v2 import attention as function

            arguments |= _v2_arguments(inputs, problem)
        return partial(function, inputs.q, inputs.k, inputs.v, **arguments)


def _v2_arguments(inputs: Inputs, problem: Problem) -> dict[str, Any]:
    """What V2 takes besides; lengths that only the problem has become tensors."""

    def lengths(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=inputs.q.device)

    arguments: dict[str, Any] = {
        "window": problem.window,
        "softcap": problem.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "mask": inputs.mask,
        "bias": inputs.bias,
        "sinks": inputs.sinks,
        "dropout_p": problem.dropout,
        "page_table": inputs.page_table,
    }
    key_lengths = inputs.key_lengths
    if key_lengths is None and inputs.page_table is not None:
        key_lengths = lengths([problem.keys] * problem.batch)
    arguments["key_lengths"] = key_lengths
    if problem.packed is not None:
        arguments |= {
            "cu_seqlens_q": inputs.cu_seqlens_q,
            "cu_seqlens_k": inputs.cu_seqlens_k,
            "max_seqlen_q": problem.seqlen_q,
            "max_seqlen_k": problem.keys,
        }
    return arguments


V1_FEATURES = frozenset(
    {
        "causal top-left",
        "causal bottom-right",
        "scale",
        "gqa",
        "head_dim_v",
        "gradients",
        "lse gradient",
    }
)
triton_v1 = TritonBackend(
    "triton-v1",
    Capabilities(
        features=V1_FEATURES,
        head_dim_max=256,
        returns_lse=True,
        notes=("FlashAttention V1 in Triton: blocks of keys outside, blocks of queries inside",),
    ),
)
triton_v2 = TritonBackend(
    "triton-v2",
    Capabilities(
        features=frozenset(FEATURES),
        gradients=GRADIENT_NAMES,
        head_dim_max=256,
        returns_lse=True,
        keep_mask=True,
        notes=("FlashAttention V2 in Triton: blocks of queries outside, one rescale",),
    ),
)


@dataclass(frozen=True)
class TritonTraffic:
    """The traffic of one version, for ``attnproof traffic``."""

    name: str
    title: str

    def unsupported(self, setting: Setting) -> str | None:
        """None when it has kernels for such tiles, else the reason.

        This process interprets kernels from here on, if that can still be decided: counting what
        torch does has it import Triton, to be compiled.
        """
        with suppress(RuntimeError):
            interpreter.enable()
        if not 1 <= setting.head_dim <= LARGEST_HEAD_DIM:
            return f"head_dim={setting.head_dim}: accepted is 1 to {LARGEST_HEAD_DIM}"
        try:
            block_for(setting.head_dim, setting.on_chip)
        except ValueError as error:
            return str(error)
        return None

    def count(self, setting: Setting) -> Traffic:
        """Counted by running it, where that is few tiles and kernels are interpreted."""
        if reason := self.unsupported(setting):
            raise ValueError(reason)
        load = Workload(
            seqlen=setting.seqlen,
            head_dim=setting.head_dim,
            dtype=setting.dtype,
            causal=setting.causal,
            block=block_for(setting.head_dim, setting.on_chip),
        )
        run = load.blocks**2 <= FEW_TILES and interpreter.enabled()
        counted = (count if run else formula)(self.name, load, setting.backward)
        return Traffic(**vars(counted), ran=run)


FEW_TILES = 1024  # that take no more than seconds
traffic = (
    TritonTraffic(V1, "FlashAttention V1 in Triton"),
    TritonTraffic(V2, "FlashAttention V2 in Triton"),
)


@dataclass(frozen=True)
class TritonKernel:
    """A launch as it is compiled for a compute capability, for ``attnproof golden``."""

    name: str
    launch: Launch
    capability: int

    @property
    def limits(self) -> Mapping[str, int]:
        """Shared memory in bytes, tensor memory in columns."""
        return compiled_calls.limits(self.capability)

    def key(self) -> str:
        """That of Triton's cache."""
        from .compiled import key_for

        return key_for(self.launch, self.capability)

    def compile(self) -> Compiled:
        """Compile it, and list its instructions."""
        return Compiled(**vars(compiled_calls.read(self.launch, self.capability)))


@dataclass(frozen=True)
class TritonCodegen:
    """The kernels of V1 and V2; each is named "sm_90 forward bf16 128 causal: forward"."""

    name: str = "triton"

    def calls(self) -> Sequence[str]:
        """What is compiled, as "sm_90 forward bf16 128 causal"."""
        return [f"sm_{capability} {name}" for capability, name in compiled_calls.calls()]

    def kernels(self, call: str) -> Sequence[TritonKernel]:
        """The kernels that the call launches."""
        architecture, _, name = call.partition(" ")
        capability = int(architecture.removeprefix("sm_"))
        return [
            TritonKernel(f"{call}: {launch.kernel.__name__}", launch, capability)
            for launch in compiled_calls.launches(capability, name)
        ]

    def toolchain(self) -> Mapping[str, str]:
        """Triton, and the assemblers that it brings."""
        return compiled_calls.toolchain()


codegen = TritonCodegen()
