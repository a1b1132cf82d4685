"""FlashAttention V1 and V2 in Triton, to be read, changed and used.

``attention`` is V2, ``attention_v1`` the algorithm of the first paper. V2 with torch's meaning is
``scaled_dot_product_attention``, with that of the flash-attention library the package
``triton_attention.flash_attn``.
Where torch finds no GPU, Triton interprets the kernels, on CPU tensors. Nothing is imported before
it is asked for, so that ``interpreter.enable()`` can come first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sdpa import scaled_dot_product_attention
    from .v1 import attention as attention_v1
    from .v2 import attention

__all__ = ["attention", "attention_v1", "scaled_dot_product_attention"]
_FUNCTIONS = {
    "attention": ("v2", "attention"),
    "attention_v1": ("v1", "attention"),
    "scaled_dot_product_attention": ("sdpa", "scaled_dot_product_attention"),
}


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    from . import interpreter

    if not torch.cuda.is_available() and "triton.language" not in sys.modules:
        interpreter.enable()
    module, function = _FUNCTIONS[name]
    found = globals()[name] = getattr(import_module(f".{module}", __name__), function)
    return found
