"""Whether torch runs a call now, or records and transforms it: only then tensors have values and
memory that kernels can be given."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)

# Neither has a public name; torch's own libraries ask these, too.
_modes = torch._C._len_torch_dispatch_stack  # make_fx, fake tensors
_transforms = torch._C._functorch.peek_interpreter_stack  # vmap, grad, jvp


def traced(tensors: Iterable[object]) -> bool:
    """Whether a call with these is to be one of operators, which torch knows how to record."""
    if torch.compiler.is_compiling() or _modes() or _transforms() is not None:
        return True
    return any(
        isinstance(each, Tensor) and (type(each) not in PLAIN or each.is_meta) for each in tensors
    )


def readable(tensor: Tensor) -> bool:
    """Whether reading its values waits for no device, and gives any."""
    return tensor.device.type == "cpu" and not traced((tensor,))
