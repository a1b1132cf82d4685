"""The three forms of the official library, as data: what each is called, and what it says how.

Sources: https://github.com/Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py (2.8.3),
hopper/flash_attn_interface.py and flash_attn/cute/interface.py (4.0.0b36).
"""

from __future__ import annotations

from dataclasses import dataclass

DENSE, VARLEN, KVCACHE = "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"
KV, QKV = "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"
VARLEN_KV, VARLEN_QKV = "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func"


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of the library."""

    name: str
    title: str
    module: str  # what is imported
    distributions: tuple[str, ...]  # the names that it is installed under, this one or that
    functions: tuple[str, ...]
    install: str  # a command
    oldest: tuple[int, ...] = ()  # the first version with the meaning that is relied on
    unbounded: int | None = -1  # its word for a side of a window without a bound
    lse_gradient: bool = False  # a gradient comes in through the LSE too


FLASH_ATTN_2 = Form(
    name="flash-attn-2",
    title="FlashAttention-2",
    module="flash_attn",
    distributions=("flash-attn",),
    functions=(DENSE, KV, QKV, VARLEN, VARLEN_KV, VARLEN_QKV, KVCACHE),
    install="pip install flash-attn --no-build-isolation",
    oldest=(2, 2),  # causal from the bottom right since 2.1, a cache since 2.2
)
FLASH_ATTN_3 = Form(
    name="flash-attn-3",
    title="FlashAttention-3",
    module="flash_attn_interface",
    distributions=("flash-attn-3", "flashattn-hopper"),
    functions=(DENSE, QKV, VARLEN, KVCACHE),
    install=(
        "git clone https://github.com/Dao-AILab/flash-attention && cd flash-attention/hopper && "
        "pip install --no-build-isolation ."
    ),
)
FLASH_ATTN_4 = Form(
    name="flash-attn-4",
    title="FlashAttention-4",
    module="flash_attn.cute",
    distributions=("flash-attn-4",),
    functions=(DENSE, VARLEN),
    install="pip install --pre flash-attn-4",
    unbounded=None,
    lse_gradient=True,
)
FORMS = {form.name: form for form in (FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4)}


def form_of(name: str) -> Form:
    """The form of that name; ValueError for an unknown one."""
    if name not in FORMS:
        raise ValueError(f"form={name!r}: accepted are {', '.join(FORMS)}")
    return FORMS[name]
