"""A correct target that takes its time, so that a run of it can be broken off in the middle.

``killed_once`` ends its process the first time that SLOW_MARK does not exist yet.
"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

SECONDS = 0.15


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Unfused, in fp64 inside."""
    time.sleep(SECONDS)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).double() for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return (torch.softmax(scale * (q.double() @ k.mT), dim=-1) @ v).to(q.dtype)


def killed_once(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """The same, but the third call of all is the end of the process that makes it."""
    calls = Path(os.environ["SLOW_CALLS"])
    with calls.open("a") as file:
        file.write("x")
    if calls.stat().st_size == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return attention(q, k, v, scale=scale)
