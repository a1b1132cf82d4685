"""Where in a tensor an element of its flat order lies."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def position(flat: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """The index of element ``flat`` (a number in a tensor) of a tensor of that shape.

    By numpy: torch's unravel_index imports sympy first, which takes longer than most cases.
    """
    return tuple(int(x) for x in np.unravel_index(int(flat), tuple(shape)))
