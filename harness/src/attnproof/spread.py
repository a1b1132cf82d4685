"""Spreads the workers of pytest-xdist over GPUs and cores.

The harness does it for its own runs; ``pytest -n 8 -p attnproof.spread`` does it for any tests.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .environment import cores

GPUS = Path("/proc/driver/nvidia/gpus")


def pytest_configure(config: pytest.Config) -> None:
    """Give a worker its GPU and its cores, before torch can start; elsewhere do nothing."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        choose_gpu(worker["workerid"])
        share_cores(worker["workercount"])


def choose_gpu(worker: str) -> None:
    """Give each xdist worker (gw0, gw1, …) one of the caller's GPUs, in turn."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        devices = [name.strip() for name in given.split(",") if name.strip()]
    else:
        devices = [str(n) for n in range(len(list(GPUS.iterdir())))] if GPUS.is_dir() else []
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(worker.removeprefix("gw")) % len(devices)]


def share_cores(workers: int) -> None:
    """Give each xdist worker, and the target's process, its share of the cores, unless the caller
    has said otherwise: too many threads wait for each other."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))
