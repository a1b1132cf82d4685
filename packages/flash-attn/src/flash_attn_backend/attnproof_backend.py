"""Where this package meets the harness: the three forms of the library as backends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import FLASH, Precision
from attn_reference.problem import Problem
from attnproof.backend import Capabilities
from attnproof.backends.availability import unavailable
from attnproof.installation import Compilation
from attnproof.requirement import Requirement
from attnproof.signatures.keep_mask import with_keep_mask

from .forms import FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4, Form
from .functions import attention, attention_varlen, attention_with_kvcache
from .limits import DTYPES, limits
from .loading import installed_version, numbers, why_not

DEVICES = ("cuda",)
# Version 2.8.3 for sm_90 alone, on 16 cores; nobody has measured FlashAttention-3.
COMPILATIONS = {
    FLASH_ATTN_2.name: Compilation(archs_variable="FLASH_ATTN_CUDA_ARCHS", minutes=26, jobs=15),
    FLASH_ATTN_3.name: Compilation(),
}
TANH_ERROR = 2.0**-11  # of tanh.approx.f32, as the PTX manual gives it


@dataclass(frozen=True)
class FlashAttnBackend:
    """One form of the library."""

    form: Form
    requirement: Requirement

    @property
    def name(self) -> str:
        """As it is registered."""
        return self.form.name

    @property
    def capabilities(self) -> Capabilities:
        """Those of the version that is installed, on the GPU that is here."""
        installed = installed_version(self.form)
        gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        found = limits(self.form, None if installed is None else numbers(installed), gpu)
        return Capabilities(
            dtypes=DTYPES,
            devices=DEVICES,
            features=found.features,
            gradients=found.gradients,
            head_dim_max=found.head_dim_max,
            head_dim_multiple=found.head_dim_multiple,
            page_size_multiple=found.page_size_multiple,
            returns_lse=True,
            empty_row_lse=found.empty_row_lse,
            keep_mask="dropout" in found.features,
            excludes=found.excludes,
            notes=(
                f"{self.form.title}, {self.form.module} {installed or 'not installed'}",
                "causality is aligned from the bottom right",
                *found.lacks,
            ),
        )

    @property
    def install(self) -> str:
        """The command that installs the library."""
        return self.form.install

    @property
    def installed(self) -> bool:
        """Whether the library is there, usable or not."""
        return installed_version(self.form) is not None

    @property
    def compilation(self) -> Compilation | None:
        """What compiling the library takes."""
        return COMPILATIONS.get(self.form.name)

    def precision(self, device: str) -> Precision:
        """A fused kernel: scores and accumulators in fp32 (the dQ of FlashAttention-2 and -4 by
        atomic additions), P and dS cast to the dtype of the inputs, the hardware's tanh."""
        return replace(FLASH, name=self.name, tanh_error=TANH_ERROR)

    def availability(self, device: str) -> str | None:
        """None when the library can be used on 'cuda' here, else the reason and the remedy."""
        return unavailable(device, DEVICES) or why_not(self.form)

    def attention(self, inputs: Inputs, problem: Problem) -> Attention:
        """out, lse and, with dropout, the keep_mask."""
        return with_keep_mask(partial(_call, self.form.name), inputs, problem)


def _call(form: str, inputs: Inputs, problem: Problem) -> Attention:
    """The function of the library that is for such problems."""
    given: dict[str, Any] = {
        "form": form,
        "scale": problem.scale,
        "causal": problem.causal,
        "window": problem.window,
        "softcap": problem.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "sinks": inputs.sinks,
        "dropout_p": problem.dropout,
    }
    tensors = (inputs.q, inputs.k, inputs.v)
    if problem.packed is not None:
        assert inputs.cu_seqlens_q is not None
        assert inputs.cu_seqlens_k is not None
        out, lse = attention_varlen(
            *tensors,
            cu_seqlens_q=inputs.cu_seqlens_q,
            cu_seqlens_k=inputs.cu_seqlens_k,
            max_seqlen_q=problem.seqlen_q,
            max_seqlen_k=problem.keys,
            square=all(queries == keys for queries, keys in problem.packed),
            **given,
        )
    elif problem.key_lengths is not None or problem.page_size is not None:
        lengths = inputs.key_lengths
        if lengths is None:  # pages alone do not say where the keys end
            lengths = inputs.q.new_full((problem.batch,), problem.keys, dtype=torch.int32)
        out, lse = attention_with_kvcache(
            *tensors, cache_seqlens=lengths, page_table=inputs.page_table, **given
        )
    else:
        out, lse = attention(*tensors, **given)
    return Attention(out=out, lse=lse)


flash_attn_2 = FlashAttnBackend(
    FLASH_ATTN_2, Requirement(who=FLASH_ATTN_2.module, arch_min="sm_80")
)
flash_attn_3 = FlashAttnBackend(
    FLASH_ATTN_3, Requirement(who=FLASH_ATTN_3.module, archs=("sm_90",), cuda_min="12.3")
)
flash_attn_4 = FlashAttnBackend(
    FLASH_ATTN_4, Requirement(who=FLASH_ATTN_4.module, arch_min="sm_90")
)
