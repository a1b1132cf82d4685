"""Where this package meets the harness: every step as a backend."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_reference.inputs import Attention, Inputs, key_count, output_shape
from attn_reference.precision import Precision
from attn_reference.problem import DTYPES, FEATURES, GRADIENT_NAMES, Problem
from attnproof.backend import Capabilities
from attnproof.traffic.sources import Setting, Traffic

from . import ring_processes
from .closed_forms import formula
from .steps import RANKS, STEPS, Step
from .traffic import BACKWARD, FORWARD, PER_ROW, Workload, block_for, count

# Relative error of torch.exp and torch.tanh in fp32 beyond rounding (2^-24). On the CPU SLEEF
# promises 1 ulp, on CUDA the mathematical library of CUDA 2 ulp.
TORCH_FUNCTION_ERROR = {"cpu": 2.0**-24, "cuda": 2.0**-22}


@dataclass(frozen=True)
class StepBackend:
    """One step of the way from standard attention to FlashAttention."""

    step: Step

    @property
    def name(self) -> str:
        """As it is registered."""
        return self.step.name

    @property
    def capabilities(self) -> Capabilities:
        """All of a problem's semantics; gradients where the algorithm has a backward pass."""
        features = frozenset(FEATURES)
        if self.step.backward is None:
            features -= {"gradients", "lse gradient"}
        return Capabilities(
            dtypes=tuple(DTYPES),
            features=features,
            gradients=GRADIENT_NAMES if self.step.backward is not None else (),
            returns_lse=True,
            keep_mask=True,
            notes=(self.step.title,),
        )

    def precision(self, device: str) -> Precision:
        """That of the step, with the exponential and tanh of torch."""
        error = TORCH_FUNCTION_ERROR[device]
        return replace(self.step.precision, name=self.name, exp_error=error, tanh_error=error)

    def availability(self, device: str) -> str | None:
        """None when it can run on 'cpu' or 'cuda' here, else the reason."""
        if device == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA device here"
        return None

    def attention(self, inputs: Inputs, problem: Problem) -> Attention:
        """out, lse and, with dropout, the keep_mask.

        Dropout keeps what ``inputs.keep_mask`` says, or else draws from ``problem.seed``.
        """
        if problem.dropout and inputs.keep_mask is None:
            inputs = replace(inputs, keep_mask=_draw_keep_mask(problem, inputs.q.device))
        return self.compute(inputs, problem)

    def compute(self, inputs: Inputs, problem: Problem) -> Attention:
        """The same, with what dropout keeps given."""
        return self.step.attention(inputs, problem)


@dataclass(frozen=True)
class RingBackend(StepBackend):
    """The ring step over torch.distributed, in processes of its own that talk over gloo."""

    ranks: int = RANKS

    @property
    def name(self) -> str:
        """As it is registered."""
        return "ring-gloo"

    @property
    def capabilities(self) -> Capabilities:
        """Those of the ring step, on the CPU."""
        note = f"ring attention over torch.distributed: {self.ranks} processes, gloo, zig-zag"
        return replace(super().capabilities, devices=("cpu",), notes=(note,))

    def availability(self, device: str) -> str | None:
        """None when it can run on that device here, else the reason."""
        if device != "cpu":
            return "gloo computes on the CPU"
        return ring_processes.unavailable()

    def compute(self, inputs: Inputs, problem: Problem) -> Attention:
        """In the processes, which the first call starts."""
        return ring_processes.attention(inputs, problem, self.ranks)


def _draw_keep_mask(problem: Problem, device: torch.device) -> Tensor:
    """True with probability 1 - dropout, bool (B, Hq, Sq, Sk): the same for every device."""
    batch, heads, rows, _ = output_shape(problem)
    generator = torch.Generator().manual_seed(problem.seed)
    drawn = torch.rand((batch, heads, rows, key_count(problem)), generator=generator)
    return (drawn >= problem.dropout).to(device)


standard, two_pass, one_pass, tiled_v1, tiled_v2, split_kv, ring = map(StepBackend, STEPS.values())
ring_gloo = RingBackend(STEPS["ring"])


@dataclass(frozen=True)
class StepTraffic:
    """The traffic of one step, for ``attnproof traffic``."""

    name: str

    @property
    def title(self) -> str:
        """What the step is."""
        return STEPS[self.name].title

    def unsupported(self, setting: Setting) -> str | None:
        """None when it has such a pass, else the reason."""
        if setting.backward and self.name not in BACKWARD:
            return "has no backward pass"
        return None

    def count(self, setting: Setting) -> Traffic:
        """Counted by running it; a row and key at a time only where that is few steps."""
        block = block_for(setting.head_dim, setting.on_chip)
        load = Workload(
            seqlen_q=setting.seqlen,
            seqlen_k=setting.seqlen,
            head_dim=setting.head_dim,
            dtype=setting.dtype,
            causal=setting.causal,
            block_q=block,
            block_k=block,
        )
        run = self.name not in PER_ROW or setting.seqlen <= FEW_ROWS
        counted = (
            count(self.name, load, setting.backward)
            if run
            else formula(self.name, load, setting.backward)
        )
        return Traffic(**vars(counted), ran=run)


FEW_ROWS = 64
traffic = tuple(StepTraffic(name) for name in FORWARD)
