"""Is this machine fit to judge on, which backends run here, and what to do about those that do not.

Everything that can fail or hang is asked in a process of its own, and cut off in time: torch is not
imported here. What was not answered is said, and the rest of the report is there.
"""

from __future__ import annotations

import time
from typing import Any

from ..environment import without_torch
from ..registry import registered
from . import probing
from .asking import unanswered
from .findings import findings
from .toolchain import commands, tools

SECONDS = 8.0  # for all probes together; Python starts and ends in the rest of ten


def examine(device: str = "auto", seconds: float = SECONDS) -> dict[str, Any]:
    """The report as plain values, for JSON; takes little longer than ``seconds``.

    device: 'auto', 'cpu' or 'cuda', for which the backends are asked.
    """
    until = time.monotonic() + seconds
    answers = probing.run(
        {
            "hardware": probing.module("hardware"),
            "libraries": probing.module("libraries"),
            "backends": probing.module("asking", device, str(until - ENDING_SECONDS)),
            **commands(),
        },
        seconds,
    )
    hardware = answers["hardware"].values()
    libraries = _merged(answers["libraries"].values())
    environment = libraries.get("environment") or without_torch()
    report = {
        "environment": environment,
        "device": _device(device, environment),
        "hardware": {
            "driver": None,
            "driver_cuda": None,
            "problem": answers["hardware"].problem,
            **{k: v for k, v in _merged(hardware).items() if k != "gpu"},
            "gpus": [line["gpu"] for line in hardware if "gpu" in line],
        },
        "torch": libraries.get("torch"),
        "triton": libraries.get("triton"),
        "tools": tools(answers),
        "backends": _backends(answers["backends"]),
        "problems": {name: a.problem for name, a in answers.items() if a.problem and name in OURS},
    }
    return report | {"findings": findings(report)}


OURS = ("hardware", "libraries", "backends")
ENDING_SECONDS = 0.5  # for the last answers to be written


def _merged(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for line in lines for name, value in line.items()}


def _device(device: str, environment: dict[str, Any]) -> str:
    if device != "auto":
        return device
    return "cuda" if environment["gpus"] else "cpu"


def _backends(answer: probing.Answer) -> list[dict[str, Any]]:
    """An entry for every registered backend, whether it answered or not."""
    told = {line["backend"]["name"]: line["backend"] for line in answer.values()}
    reason = f"it was not asked: {answer.problem or 'the process that asks ended'}"
    return [told.get(name) or unanswered(point, reason) for name, point in registered().items()]
