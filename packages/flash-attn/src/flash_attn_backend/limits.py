"""What each form takes, by its version and by the GPU, as data.

Of FlashAttention-2 the sources of 2.8.3 say it (csrc/flash_attn/flash_api.cpp and
src/flash_bwd_launch_template.h), of FlashAttention-3 hopper/flash_api.cpp, of FlashAttention-4
flash_attn/cute/interface.py (4.0.0b36).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .forms import FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4, Form

Capability = tuple[int, int]  # compute capability: (9, 0)

RULES = frozenset({"causal top-left", "causal bottom-right", "window"})
COMMON = RULES | {"scale", "softcap", "gqa", "packed", "key lengths", "paged", "gradients"}
DTYPES = ("fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a form takes on one GPU; features by the names that ``attn_reference.problem`` has."""

    features: frozenset[str]
    gradients: tuple[str, ...] = ("q", "k", "v")
    excludes: tuple[tuple[str, str], ...] = ()  # features that do not go together
    head_dim_max: int = 256
    head_dim_multiple: int = 1
    page_size_multiple: int = 1
    empty_row_lse: float = float("-inf")
    lacks: tuple[str, ...] = field(default=())  # what there is no feature for, in sentences


LIMITS = {
    FLASH_ATTN_2.name: Limits(
        features=COMMON | {"alibi", "dropout"},
        excludes=(
            ("gradients", "key lengths"),
            ("gradients", "paged"),
            ("dropout", "key lengths"),
            ("dropout", "paged"),
            ("dropout", "softcap"),
        ),
        page_size_multiple=256,
        empty_row_lse=float("inf"),  # softmax.h: "sum == 0.f … INFINITY"
        lacks=("no gradient comes in through the LSE", "no sinks, no mask or bias as a tensor"),
    ),
    FLASH_ATTN_3.name: Limits(
        features=COMMON | {"head_dim_v"},
        excludes=(("gradients", "key lengths"), ("gradients", "paged")),
        head_dim_multiple=8,
        lacks=(
            "no dropout",
            "no gradient comes in through the LSE",
            "no ALiBi, no sinks, no mask or bias as a tensor",
        ),
    ),
    FLASH_ATTN_4.name: Limits(
        features=COMMON | {"head_dim_v", "sinks", "lse gradient"},
        gradients=("q", "k", "v", "sinks"),
        excludes=(("gradients", "paged"),),
        head_dim_multiple=8,
        lacks=(
            "no dropout",
            "no ALiBi, no mask or bias as a tensor",
            "nothing is appended to a cache, rotated or padded on the left",
        ),
    ),
}

# The version of FlashAttention-2 that brought a feature.
SINCE = {
    "window": (2, 3),
    "alibi": (2, 4),
    "paged": (2, 5),
    "softcap": (2, 6),
}


def limits(form: Form, version: tuple[int, ...] | None, capability: Capability | None) -> Limits:
    """What the form takes in that version and on that GPU; None: the newest, Hopper."""
    found = LIMITS[form.name]
    if form is FLASH_ATTN_2 and version is not None:
        missing = {feature for feature, since in SINCE.items() if version < since}
        found = replace(found, features=found.features - missing)
    if form is FLASH_ATTN_4 and capability is not None and capability[0] == 12:
        # Blackwell of workstations runs the kernels for Ampere, in 99 KB of shared memory.
        found = replace(
            found,
            features=found.features - {"paged"},
            gradients=("q", "k", "v"),
            excludes=(*found.excludes, ("gradients", "softcap"), ("gradients", "sinks")),
            head_dim_max=128,
        )
    return found


def refusals(
    form: Form,
    capability: Capability,
    *,
    shape: tuple[int, ...],
    head_dim_v: int,
    dropout: bool,
    softcap: bool,
    gradients: bool,
    splits: bool,
) -> Iterator[str]:
    """Why the form does not take this, a sentence each, beyond what ``Limits`` has a field for.

    ``shape`` is that of the queries, (batch, heads, seqlen, head_dim).
    """
    head_dim = shape[-1]
    generation = f"compute capability {capability[0]}.{capability[1]}"
    if form is FLASH_ATTN_2:
        if 0 in (shape[0], shape[2]):
            yield f"a batch or query length of 0, as in {shape}, is not supported"
        if dropout and gradients and head_dim > 192 and capability not in LARGE_SHARED_MEMORY:
            # run_mha_bwd_hdim256 launches nothing there, and the gradients are never written.
            yield f"on {generation} there is no backward with dropout of head_dim above 192"
    elif form is FLASH_ATTN_3:
        pair = (128 < head_dim <= 192 and 96 < head_dim_v <= 128) or (
            head_dim <= 64 and head_dim_v <= 512
        )
        if head_dim_v != head_dim and not pair:
            yield (
                f"head_dim {head_dim} with {head_dim_v} of V is not supported: different ones are "
                "129 to 192 with 97 to 128, and up to 64 with up to 512"
            )
    elif form is FLASH_ATTN_4:
        if capability[0] in (10, 11):
            if max(head_dim, head_dim_v) > 128 and (head_dim, head_dim_v) not in BLACKWELL:
                yield (
                    f"head_dim {head_dim} with {head_dim_v} of V is not supported on {generation}: "
                    "above 128 there are 192 with 128, and 256 with 256"
                )
            if head_dim == head_dim_v == 256 and softcap and gradients:
                yield f"on {generation} there is no backward with softcap of head_dim 256"
        elif splits:
            yield f"on {generation} keys are not split (num_splits)"


# With more than 144 KB of shared memory per block.
LARGE_SHARED_MEMORY = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0))
BLACKWELL = ((192, 128), (256, 256))
