"""V2 with the meaning of the official library: a drop-in for ``flash_attn`` 2.8.3.

Names, order and defaults of the parameters are those of the library; tensors are (batch, seqlen,
heads, head_dim), packed (tokens, heads, head_dim). Causality, windows (inclusive, -1: without a
bound) and ALiBi are measured from the bottom right. What is more than there: fp32, a head_dim of v
of its own, pages of any size, softcap with dropout, gradients through the LSE. What is other:

- A query that sees no key has an LSE of -inf, where the library has +inf.
- ``S_dmask`` has the signs of the library's, 1 where kept and -1 where dropped, and not its sizes.
- ``deterministic`` is accepted: the backward pass always is.
- ``alibi_slopes`` of (batch, heads) are accepted by the dense functions, and by the others
  NotImplementedError.

Source: https://github.com/Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py (2.8.3).
"""

from .dense import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from .kvcache import flash_attn_with_kvcache
from .varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

# What the parameters cannot say to ``attnproof check triton_attention.flash_attn``.
attnproof_capabilities = {
    "dtypes": ["fp32", "fp16", "bf16"],
    "features": [
        *("gqa", "scale", "causal bottom-right", "window", "softcap", "alibi", "head_dim_v"),
        *("dropout", "key lengths", "paged", "packed", "lse gradient"),
    ],
    "page_size_multiple": 1,
}
attnproof_precision = {"name": "flash", "tanh_error": 2.0**-22}  # of the GPU: docs/triton.md
