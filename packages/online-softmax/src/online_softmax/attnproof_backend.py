"""Where this package meets the harness: every step as a backend."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_reference.inputs import Attention, Inputs, key_count, output_shape
from attn_reference.precision import Precision
from attn_reference.problem import DTYPES, FEATURES, GRADIENT_NAMES, Problem
from attnproof.backend import Capabilities

from .steps import STEPS, Step

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
        return replace(self.step.precision, name=self.step.name, exp_error=error, tanh_error=error)

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
        return self.step.attention(inputs, problem)


def _draw_keep_mask(problem: Problem, device: torch.device) -> Tensor:
    """True with probability 1 - dropout, bool (B, Hq, Sq, Sk): the same for every device."""
    batch, heads, rows, _ = output_shape(problem)
    generator = torch.Generator().manual_seed(problem.seed)
    drawn = torch.rand((batch, heads, rows, key_count(problem)), generator=generator)
    return (drawn >= problem.dropout).to(device)


standard, two_pass, one_pass, tiled_v1, tiled_v2, split_kv = map(StepBackend, STEPS.values())
