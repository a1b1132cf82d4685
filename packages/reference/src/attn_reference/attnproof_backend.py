"""Where this package meets the harness: the reference in low precision, as a backend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnproof.backend import Capabilities

from .autograd import differentiable_attention
from .inputs import Attention, Inputs, key_count, output_shape
from .precision import FLASH, Precision
from .problem import DTYPES, FEATURES, GRADIENT_NAMES, Problem

# Relative error of torch.exp and torch.tanh in fp32 beyond rounding (2^-24). On the CPU SLEEF
# promises 1 ulp, at most 2^-23 of the value (measured: 0.06 * 2^-24). CUDA promises 2 ulp
# (measured on an H100: 1.5 * 2^-24 for exp, 2.3 * 2^-24 for tanh).
TORCH_FUNCTION_ERROR = {"cpu": 2.0**-24, "cuda": 2.0**-22}


@dataclass(frozen=True)
class Reference:
    """``attn_reference`` rounded like a flash kernel: fp32 inside, P in the dtype of V."""

    name: str = "reference"
    capabilities: Capabilities = field(
        default_factory=lambda: Capabilities(
            dtypes=tuple(DTYPES),
            features=frozenset(FEATURES),
            gradients=GRADIENT_NAMES,
            returns_lse=True,
            keep_mask=True,
            notes=("a few torch operations per head and chunk of rows: right, and slow",),
        )
    )

    def precision(self, device: str) -> Precision:
        """A flash kernel with the exponential and tanh of torch."""
        error = TORCH_FUNCTION_ERROR[device]
        return replace(FLASH, name="reference", exp_error=error, tanh_error=error)

    def availability(self, device: str) -> str | None:
        """None when it can run on 'cpu' or 'cuda' here, else the reason."""
        if device == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA device here"
        return None

    def attention(self, inputs: Inputs, problem: Problem) -> Attention:
        """out, lse and, with dropout, the keep_mask; differentiable in all that are declared.

        Dropout keeps what ``inputs.keep_mask`` says, or else draws from ``problem.seed``.
        """
        if problem.dropout and inputs.keep_mask is None:
            inputs = replace(inputs, keep_mask=draw_keep_mask(problem, inputs.q.device))
        return differentiable_attention(inputs, problem, self.precision(inputs.q.device.type))


def draw_keep_mask(problem: Problem, device: torch.device) -> Tensor:
    """True with probability 1 - dropout, bool (B, Hq, Sq, Sk): the same for every device."""
    batch, heads, rows, _ = output_shape(problem)
    generator = torch.Generator().manual_seed(problem.seed)
    drawn = torch.rand((batch, heads, rows, key_count(problem)), generator=generator)
    return (drawn >= problem.dropout).to(device)


reference = Reference()
