"""A small kernel with one planted fault at a time, as a source of the codegen gate.

It loads through device-side descriptors and has four warps: Triton 3.6 specialises warps for no
others. Run as a script, it prints what the gate says about each fault.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from rich.console import Console

from attnproof.codegen.compiling import compile_all
from attnproof.codegen.gate import compare
from attnproof.codegen.text import table
from triton_attention import codegen
from triton_attention.attnproof_backend import TritonKernel
from triton_attention.launch import Launch


@triton.jit
def attend(
    q, k, v, out, rows, keys,
    D: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    """One head, (rows, D) and (keys, D), contiguous; FAULT "" is the kernel as it should be."""
    i = tl.program_id(0) * BLOCK
    columns = tl.arange(0, D)[None, :]
    k_tiles = tl.make_tensor_descriptor(k, [keys, D], [D, 1], [KEYS, D])
    v_tiles = tl.make_tensor_descriptor(v, [keys, D], [D, 1], [KEYS, D])
    q_tile = tl.make_tensor_descriptor(q, [rows, D], [D, 1], [BLOCK, D]).load([i, 0])
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.full([BLOCK], 0.0, tl.float32)
    acc = tl.full([BLOCK, D], 0.0, tl.float32)
    for j in tl.range(0, keys, KEYS, warp_specialize=FAULT == "specialized"):
        if FAULT == "pointers":
            at = (j + tl.arange(0, KEYS))[:, None] * D + columns
            k_tile, v_tile = tl.load(k + at), tl.load(v + at)
        else:
            k_tile, v_tile = k_tiles.load([j, 0]), v_tiles.load([j, 0])
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        m_new = tl.maximum(m, tl.max(s, 1))
        if FAULT == "exp":
            p, rescale = tl.exp(s - m_new[:, None]), tl.exp(m - m_new)
        else:
            p, rescale = tl.exp2(s - m_new[:, None]), tl.exp2(m - m_new)
        l = l * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        if FAULT == "divide":
            acc /= l[:, None]
        if FAULT == "wrong":
            p = p[:, :, None]  # a dot of this does not compile
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
        m = m_new
    if FAULT != "stores":
        out_tiles = tl.make_tensor_descriptor(out, [rows, D], [D, 1], [BLOCK, D])
        out_tiles.store([i, 0], (acc / l[:, None]).to(out.dtype.element_ty))
    else:
        place = (i + tl.arange(0, BLOCK))[:, None] * D + columns
        tl.store(out + place, (acc / l[:, None]).to(out.dtype.element_ty))


def launch(
    *, fault: str = "", rows: int = 64, keys: int = 64, dim: int = 64, warps: int = 4,
    stages: int = 2, dtype: torch.dtype = torch.float16,
) -> Launch:  # fmt: skip
    """The kernel with a fault, or with tiles and options that are one."""
    q, k, v, out = (torch.empty(1024, dim, dtype=dtype) for _ in range(4))
    constants = {"D": dim, "BLOCK": rows, "KEYS": keys, "FAULT": fault}
    arguments = {"q": q, "k": k, "v": v, "out": out, "rows": 1024, "keys": 1024, **constants}
    options = {"num_warps": warps, "num_stages": stages}
    return Launch(kernel=attend, grid=(1024 // rows,), arguments=arguments, options=options)


# By name: compute capability, and the kernel. Those of Ampere load through pointers.
PLANTED: dict[str, tuple[int, dict[str, Any]]] = {
    "ampere": (80, {"fault": "pointers", "rows": 128, "dim": 128, "warps": 8}),
    "ampere, too few warps": (80, {"fault": "pointers", "rows": 128, "dim": 128}),
    "ampere, fp32": (80, {"fault": "pointers", "rows": 16, "keys": 16, "dtype": torch.float32}),
    "hopper": (90, {}),
    "hopper, pointers": (90, {"fault": "pointers"}),
    "hopper, no descriptor for out": (90, {"fault": "stores"}),
    "hopper, specialized": (90, {"fault": "specialized"}),
    "hopper, rows of 32": (90, {"rows": 32}),
    "hopper, fp32": (90, {"rows": 16, "keys": 16, "dtype": torch.float32}),
    "hopper, large tiles": (90, {"rows": 128, "keys": 128, "dim": 128, "warps": 8}),
    "hopper, large tiles, too few warps": (90, {"rows": 128, "keys": 128, "dim": 128}),
    "hopper, too many stages": (90, {"stages": 20}),
    "hopper, exp": (90, {"fault": "exp"}),
    "hopper, divide": (90, {"fault": "divide"}),
    "hopper, wrong": (90, {"fault": "wrong"}),
    "blackwell": (100, {"rows": 128, "dim": 128}),
    "blackwell, rows of 256": (100, {"rows": 256, "keys": 128, "dim": 128, "warps": 8}),
}


# Each fault, with the kernel as it should be.
FAULTS = {
    "ampere, too few warps": "ampere",
    "ampere, fp32": "ampere",
    "hopper, large tiles, too few warps": "hopper, large tiles",
    "hopper, too many stages": "hopper",
    "hopper, rows of 32": "hopper",
    "hopper, fp32": "hopper",
    "hopper, pointers": "hopper",
    "hopper, no descriptor for out": "hopper",
    "hopper": "hopper, specialized",
    "hopper, exp": "hopper",
    "hopper, divide": "hopper",
    "hopper, wrong": "hopper",
    "blackwell, rows of 256": "blackwell",
}


@dataclass(frozen=True)
class Planted:
    """The source; every kernel is a call of its own."""

    name: str = "planted"

    def calls(self) -> list[str]:
        return list(PLANTED)

    def kernels(self, call: str) -> list[TritonKernel]:
        capability, options = PLANTED[call]
        return [TritonKernel(call, launch(**options), capability)]

    def toolchain(self) -> Mapping[str, str]:
        return codegen.toolchain()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = compile_all(Planted(), folder=Path(folder)).kernels
    pinned = {fault: found[good].measured for fault, good in FAULTS.items()}
    compared = compare(pinned, {fault: found[fault] for fault in FAULTS})
    failing = {change.kernel for change in compared if change.fails}
    # What else differs in these is left out.
    shown = [change for change in compared if change.fails or change.kernel not in failing]
    Console(width=100).print(table(shown))


if __name__ == "__main__":
    main()
