"""Tuning, as far as it goes without a GPU: what is tried, what compiles, what is chosen."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[1]
# In a process that does not interpret Triton, which others in this one may have made it do.
PROGRAM = """
import json, sys
from triton_attention.tiles_table import HopperTiles, Tiles
from tune import Candidate, best, candidates, compiles

def tl(m, n, warps=4, stages=1):
    return Tiles(block_m=m, block_n=n, num_warps=warps, num_stages=stages)

good = Candidate("hopper", "forward", 64, HopperTiles(consumers=2, passing=64, stages=2))
large = Candidate("hopper", "forward", 128, HopperTiles(consumers=2, passing=128, stages=4))
keys = Candidate("pointers", "keys", 64, tl(64, 64))
a, b = (Candidate("pointers", "forward", 64, tl(64, n)) for n in (64, 128))
rates = {
    a: {"512": 300.0, "2048": 310.0, "8192": 320.0},
    b: {"512": 200.0, "2048": 305.0, "8192": 330.0},
}
found = {c.id: {"tflops": rate} for c, rate in rates.items()}
print(json.dumps({
    "good": compiles(good, 90), "large": compiles(large, 90), "keys": compiles(keys, 80),
    "kernels": {
        f"{gpu} {direction} {width}":
            sorted({c.kernel for c in candidates(direction, width, gpu)})
        for gpu in (80, 90) for direction in ("forward", "keys") for width in (64, 256)
    },
    "unique": len({c.id for c in candidates("forward", 64, 90)})
              == len(list(candidates("forward", 64, 90))),
    "best": [[row.rows, row.tiles.block_n, row.gpu, row.measured["tflops"]]
             for row in best(found, [a, b], 90)],
}))
"""


def run(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_candidates_and_the_best_of_them():
    done = run(sys.executable, "-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["good"] is None
    assert found["keys"] is None
    assert found["large"].startswith("shared memory: ")
    assert found["unique"]
    assert found["kernels"] == {
        "80 forward 64": ["pointers"],
        "80 forward 256": ["pointers"],
        "80 keys 64": ["pointers"],
        "80 keys 256": ["pointers"],
        "90 forward 64": ["hopper", "pointers"],
        "90 forward 256": ["hopper", "pointers"],
        "90 keys 64": ["hopper", "pointers"],
        "90 keys 256": ["pointers"],
    }
    # 512 and 2048 have the same winner, and share a row; the longest is for all that are longer.
    assert found["best"] == [[2048, 64, 90, 310.0], [None, 128, 90, 330.0]]


def test_without_a_gpu_it_says_so(tmp_path):
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        [sys.executable, TOOLS / "tune.py", tmp_path / "results"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 3
    assert "no CUDA device" in done.stdout
