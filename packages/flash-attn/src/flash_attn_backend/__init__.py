"""The official flash_attn library, FlashAttention-2, -3 and -4, behind one set of functions.

``attention(q, k, v, form="flash-attn-2")`` and its siblings take and return the canonical layout
(batch, heads, seqlen, head_dim). Nothing is imported before a form is asked for.
"""

from .forms import FORMS
from .functions import (
    attention,
    attention_kvpacked,
    attention_qkvpacked,
    attention_varlen,
    attention_varlen_kvpacked,
    attention_varlen_qkvpacked,
    attention_with_kvcache,
)
from .loading import LibraryUnusable, load, why_not
from .options import Options

__all__ = [
    "FORMS",
    "LibraryUnusable",
    "Options",
    "attention",
    "attention_kvpacked",
    "attention_qkvpacked",
    "attention_varlen",
    "attention_varlen_kvpacked",
    "attention_varlen_qkvpacked",
    "attention_with_kvcache",
    "load",
    "why_not",
]
