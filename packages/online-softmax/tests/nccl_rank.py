"""A rank of ``ring_processes.Team`` that computes on a GPU and talks over NCCL."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from online_softmax import ring_processes


@cache
def gpus() -> dist.ProcessGroup:
    """The ranks once more, as a group that talks over NCCL; each takes the GPU of its number."""
    torch.cuda.set_device(dist.get_rank())
    group = dist.new_group(backend="nccl")
    assert group is not None
    assert dist.get_backend(group) == "nccl"
    return group


def compute(options: dict[str, Any], **job: Any) -> dict[str, Tensor]:
    """The job of a rank, on its GPU."""
    options = options | {"group": gpus()}
    for name, value in job.items():
        if isinstance(value, Tensor):
            job[name] = value.cuda()
    return ring_processes.compute(options=options, **job)
