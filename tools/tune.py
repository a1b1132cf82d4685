"""Find the fastest tiles for the GPU at hand, and write them to the table that ships.

Usage: python tools/tune.py RESULTS [--pass P...] [--dim D...] [--seqlen S...] [--kernel K...]
       [--seconds N] [--write]

Every candidate of a pass (forward, keys, queries) is compiled, in as many processes as there are
cores; judged, by the harness, on problems whose tiles are cut off at every end; and, if it
conforms, timed: median of rounds with a flushed L2, 16,384 tokens of hidden size 2048, full and
causal. RESULTS.jsonl gets a line for each as it is known, and a second run goes on from it.
--write puts the fastest of each pass, width and length into the table that ships, tiles.json of
triton_attention, for the compute capability of this GPU; neighbouring lengths with the same tiles
share a row.
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from rich.progress import track

from attn_reference.inputs import Attention, Gradients
from attn_reference.problem import Problem
from attnproof.inputs.make import make_inputs
from attnproof.judge.judging import judge
from attnproof.plan import CallResult
from triton_attention import tiles_table
from triton_attention.arguments import Arguments
from triton_attention.attnproof_backend import triton_v2
from triton_attention.compiled import compile_for
from triton_attention.hopper_launches import HOPPER as HOPPER_CAPABILITY
from triton_attention.tiles import GPUS
from triton_attention.tiles_table import (
    FORWARD,
    HOPPER,
    KEYS,
    POINTERS,
    QUERIES,
    HopperTiles,
    Row,
    Tiles,
)  # fmt: skip
from triton_attention.v2_launches import Launches

TOKENS, HIDDEN = 16384, 2048
PASSES, KERNELS = (FORWARD, KEYS, QUERIES), (POINTERS, HOPPER)
PRODUCTS = {FORWARD: 2, KEYS: 4, QUERIES: 3}  # of a tile
DTYPE = torch.bfloat16
WIDTHS, LENGTHS = (64, 128, 256), (512, 2048, 8192)
ROUNDS_MS = 60


@dataclass(frozen=True)
class Candidate:
    """What is tried."""

    kernel: str
    direction: str
    width: int
    tiles: Tiles | HopperTiles

    @property
    def id(self) -> str:
        """Readable, and in the file the key."""
        sizes = "-".join(str(value) for value in asdict(self.tiles).values())
        return f"{self.direction}-{self.width}-{self.kernel}-{sizes}"


def candidates(direction: str, width: int, capability: int) -> Iterator[Candidate]:
    """Those of a pass and head_dim; what the GPU has no room for does not compile."""
    for m, n, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)):
        tiles = Tiles(block_m=m, block_n=n, num_warps=warps, num_stages=stages)
        yield Candidate(POINTERS, direction, width, tiles)
    if capability != HOPPER_CAPABILITY or (width > 128 and direction != FORWARD):
        return
    for consumers, passing, stages in itertools.product((2, 3), (32, 64, 128), (2, 3, 4)):
        tiles_ = HopperTiles(consumers=consumers, passing=passing, stages=stages)
        yield Candidate(HOPPER, direction, width, tiles_)


def launched(one: Candidate, x: Arguments, saved: dict[str, Any] | None, gpu: int) -> Any:
    """The launches of a candidate's pass; for a GPU that is not there, ``saved`` is made up."""
    launches = Launches(x, gpu=GPUS[gpu], hopper=False)
    if one.direction == FORWARD:
        return launches.forward(one.tiles, splits=1)
    if saved is None:
        out = torch.empty_like(x.q)
        saved = {"out": out, "lse": torch.empty(out.shape[:-1]), "grad_out": out}
    wanted = {"k", "v"} if one.direction == KEYS else {"q"}
    tiles = {one.direction: one.tiles}
    return launches.backward(saved["out"], saved["lse"], saved["grad_out"], None, wanted, tiles)


def compiles(one: Candidate, capability: int) -> str | None:
    """None, or why not. In a process of its own: Triton keeps what it compiles on disk."""
    q = torch.empty(2, 2, 1024, one.width, dtype=DTYPE)
    try:
        for causal in ("none", "bottom-right"):
            x = Arguments(q=q, k=q.clone(), v=q.clone(), causal=causal)
            compiled = compile_for(launched(one, x, None, capability).launches[-1], capability)
            needed, room = compiled.metadata.shared, GPUS[capability].shared_memory
            if needed > room:
                return f"shared memory: {needed} bytes of {room}"
    except Exception as error:  # whatever a compiler says
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
    return None


def deviates(one: Candidate, gpu: int) -> str | None:
    """None when it conforms on problems that cut its tiles off, else what the harness says."""
    for causal, window in (("none", None), ("top-left", None), ("bottom-right", (70, 20))):
        problem = Problem(
            batch=2, seqlen_q=300, seqlen_k=333, heads_q=4, heads_kv=2, head_dim=one.width,
            dtype="bf16", causal=causal, window=window,
            gradients=() if one.direction == FORWARD else ("q", "k", "v"),
        )  # fmt: skip
        inputs = make_inputs(problem)
        on_gpu = {name: tensor.cuda() for name, tensor in inputs.tensors().items()}
        x = Arguments(q=on_gpu["q"], k=on_gpu["k"], v=on_gpu["v"], causal=causal, window=window)
        ready = Launches(x, hopper=False)
        found = (launched(one, x, None, gpu) if one.direction == FORWARD else ready.forward()).run()
        gradients = {}
        if one.direction != FORWARD:
            saved = {**found, "grad_out": on_gpu["grad_out"]}
            other = ready.backward(
                found["out"], found["lse"], on_gpu["grad_out"], None, {"q", "k", "v"}
            ).run()
            gradients = {**other, **launched(one, x, saved, gpu).run()}
        result = CallResult(
            attention=Attention(out=found["out"].cpu(), lse=found["lse"].cpu()),
            gradients=Gradients(**{name: gradients[name].cpu() for name in problem.gradients}),
        )
        precision = triton_v2.precision("cuda")
        verdict = judge(problem, inputs, result, precision, triton_v2.capabilities)
        if str(verdict.status) != "conforms":
            return f"{problem.id}: {verdict.status}: {verdict.reason}"
    return None


def milliseconds(one: Candidate, seqlen: int, causal: str, gpu: int) -> float:
    """Median over rounds, the L2 flushed before each."""
    shape = (TOKENS // seqlen, HIDDEN // one.width, seqlen, one.width)
    q, k, v, grad_out = (torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(4))
    x = Arguments(q=q, k=k, v=v, causal=causal)
    saved = None
    if one.direction != FORWARD:
        saved = {**Launches(x, hopper=False).forward().run(), "grad_out": grad_out}
    result = launched(one, x, saved, gpu)
    last = result.launches[-1]  # without delta, which all share
    for launch in result.launches:
        launch.run()
    return float(triton.testing.do_bench(last.run, warmup=10, rep=ROUNDS_MS, return_mode="median"))


def tflops(one: Candidate, seqlen: int, gpu: int) -> float:
    """Geometric mean of full and causal, TFLOP/s of the pass's own products."""
    rates = []
    for causal, share in (("none", 1.0), ("bottom-right", 0.5)):
        operations = 2 * PRODUCTS[one.direction] * TOKENS * HIDDEN * seqlen * share
        rates.append(operations / milliseconds(one, seqlen, causal, gpu) / 1e9)
    return math.sqrt(rates[0] * rates[1])


def measured(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run has found, by candidate."""
    if not path.exists():
        return {}
    lines = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    return {line["id"]: line for line in lines}


def best(
    found: dict[str, dict[str, Any]], tried: Sequence[Candidate], capability: int
) -> Iterator[Row]:
    """Rows of the fastest, for each kernel, pass and width; the longest length has no limit."""
    for (kernel, direction, width), group in itertools.groupby(
        sorted(tried, key=lambda c: (c.kernel, c.direction, c.width)),
        key=lambda c: (c.kernel, c.direction, c.width),
    ):
        of = {c: found.get(c.id, {}).get("tflops", {}) for c in group}
        lengths = sorted({int(length) for rates in of.values() for length in rates})
        rows: list[Row] = []
        for length in lengths:
            winner = max(of, key=lambda c: of[c].get(str(length), 0.0))
            rate = round(of[winner][str(length)], 1)
            row = Row(
                kernel=kernel, direction=direction, itemsize=2, width=width, gpu=capability,
                rows=length, tiles=winner.tiles, measured={"tflops": rate},
            )  # fmt: skip
            if rows and rows[-1].tiles == row.tiles:
                rows.pop()
            rows.append(row)
        if rows:
            yield from rows[:-1]
            yield replace(rows[-1], rows=None)


def main(argv: Sequence[str]) -> int:
    """Tune."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("results", type=Path)
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--dim", type=int, nargs="+", choices=WIDTHS, default=WIDTHS)
    parser.add_argument("--seqlen", type=int, nargs="+", default=LENGTHS)
    parser.add_argument(
        "--kernel", nargs="+", choices=(POINTERS, HOPPER), default=(POINTERS, HOPPER)
    )
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here: tiles are tuned on the GPU that they are for")
        return 3
    properties = torch.cuda.get_device_properties(0)
    capability = 10 * properties.major + properties.minor
    if capability not in GPUS:
        print(f"sm_{capability}: accepted is one of {sorted(GPUS)}")
        return 3
    end = time.monotonic() + options.seconds
    tried = [
        candidate
        for direction, width in itertools.product(options.passes, options.dim)
        for candidate in candidates(direction, width, capability)
        if candidate.kernel in options.kernel
    ]
    path = options.results.with_suffix(".jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = measured(path)
    left = [candidate for candidate in tried if candidate.id not in found]
    cores = len(os.sched_getaffinity(0))
    with (
        path.open("a", encoding="utf-8") as file,
        ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool,
    ):
        problems = pool.map(compiles, left, itertools.repeat(capability))
        for one, problem in track(zip(left, problems, strict=True), "tiles", total=len(left)):
            if time.monotonic() > end:
                pool.shutdown(cancel_futures=True)
                break
            line: dict[str, Any] = {"id": one.id, "gpu": properties.name}
            if problem is None:
                problem = deviates(one, capability)
            if problem is not None:
                line["problem"] = problem
            else:
                rates = {s: tflops(one, s, capability) for s in options.seqlen}
                line["tflops"] = {str(s): round(rate, 1) for s, rate in rates.items()}
            file.write(json.dumps(line) + "\n")
            file.flush()
            found[one.id] = line
    wrong = [line for line in found.values() if "deviates" in line.get("problem", "")]
    for line in wrong:
        print(f"{line['id']}: {line['problem']}")
    rows = list(best(found, tried, capability))
    for row in rows:
        print(
            f"{row.kernel} {row.direction} width {row.width} rows {row.rows}: {row.tiles} "
            f"{row.measured['tflops']} TFLOP/s"
        )
    if options.write:
        replaced = {(r.kernel, r.direction, r.itemsize, r.width, r.gpu) for r in rows}
        kept = [
            row for row in tiles_table.read()
            if (row.kernel, row.direction, row.itemsize, row.width, row.gpu) not in replaced
        ]  # fmt: skip
        tiles_table.write([*kept, *rows])
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
