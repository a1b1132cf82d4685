"""Run as a script, in a process that does not interpret: prints, as JSON, what kernels of V2 are
compiled to for GPUs that need not be there. {name: {"ttgir": ..., "shared": ..., "limit": ...}}
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton

from triton_attention.arguments import Arguments
from triton_attention.compiled import compile_for
from triton_attention.launch import Launch
from triton_attention.tiles import GPUS
from triton_attention.tiles_table import Tiles
from triton_attention.v2_launches import Launches


def launches(capability: int, dim: int, hopper: bool = False, **options: Any) -> Launches:
    """Of one call in bf16, for that GPU."""
    q, k, v = (torch.empty(2, 4, 1024, dim, dtype=torch.bfloat16) for _ in range(3))
    return Launches(Arguments(q=q, k=k, v=v, **options), gpu=GPUS[capability], hopper=hopper)


def forward(capability: int, dim: int, tiles: Tiles | None = None, **options: Any) -> Launch:
    """Forward without splits."""
    return launches(capability, dim, **options).forward(tiles, splits=1).launches[0]


def backward(capability: int, dim: int, hopper: bool = False) -> dict[str, Launch]:
    """The two large kernels of backward."""
    made = launches(capability, dim, hopper, causal="bottom-right")
    out = torch.empty_like(made.x.q)
    lse = torch.empty(out.shape[:-1])
    _, keys, queries = made.backward(out, lse, out, None, {"q", "k"}).launches
    return {"keys": keys, "queries": queries}


def even() -> Any:
    """A rule, whose name another has too."""

    @triton.jit
    def rule(i, j, head, batch):  # type: ignore[no-untyped-def]
        return (i + j) % 2 == 0

    return rule


def odd() -> Any:
    """The other."""

    @triton.jit
    def rule(i, j, head, batch):  # type: ignore[no-untyped-def]
        return (i + j) % 2 == 1

    return rule


def main() -> None:
    """Compile and print."""
    jobs: dict[str, tuple[int, Launch]] = {}
    for capability in (80, 90):
        for dim in (64, 128):
            launch = forward(capability, dim, causal="bottom-right")
            jobs[f"forward-{capability}-{dim}"] = capability, launch
    for dim in (64, 128):
        jobs[f"hopper-forward-{dim}"] = 90, forward(90, dim, hopper=True, causal="bottom-right")
        for name, launch in backward(90, dim, hopper=True).items():
            jobs[f"hopper-{name}-{dim}"] = 90, launch
    # With these tiles the warps do not fit below each other: planted, for the check to find.
    wide = Tiles(block_m=64, block_n=64, num_warps=8, num_stages=2)
    low = Tiles(block_m=16, block_n=64)
    jobs["planted-reduction-80"] = 80, forward(80, 128, low)
    jobs["planted-reduction-90"] = 90, forward(90, 64, low)
    jobs["planted-conversion-90"] = 90, forward(90, 128, wide)
    # The tightest: the least shared memory.
    jobs["forward-86-256"] = 86, forward(86, 256, causal="bottom-right")
    for capability, dim in ((86, 128), (86, 256), (90, 128)):
        for name, launch in backward(capability, dim).items():
            jobs[f"{name}-{capability}-{dim}"] = capability, launch
    jobs["rule-even"] = 90, forward(90, 64, mask_rule=even())
    jobs["rule-odd"] = 90, forward(90, 64, mask_rule=odd())
    found = {}
    for name, (capability, launch) in jobs.items():
        kernel = compile_for(launch, capability)
        found[name] = {
            "ttgir": kernel.asm["ttgir"],
            "shared": kernel.metadata.shared,
            "limit": GPUS[capability].shared_memory,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
