"""The harness against kernels with one planted fault each: every one must be caught and named.

The real command line runs, on the smallest part of level quick that shows the fault.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PLANTED = Path(__file__).parent / "planted"


@dataclass(frozen=True, kw_only=True)
class Caught:
    """Where the command line must find a fault: rows of the table by feature that must fail and
    rows that must not (separated by commas), and a part of what it is said to look like."""

    chapter: str
    rows: str
    spares: str = ""
    dtype: str = "fp32"
    looks_like: str | None = None


# The faults that no harness may miss, each in the smallest part of level quick that shows it.
CAUGHT = {
    "scale_two_percent_off": Caught(
        chapter="numerics", rows="dense fp32,scale", looks_like="scale 1.02 times"
    ),
    "last_key_dropped_when_long": Caught(
        chapter="masks",
        dtype="bf16",
        rows="causal top-left,causal bottom-right",
        spares="window,boolean mask,bias,softcap,alibi,sinks",
        looks_like="without the last key",
    ),
    "last_tile_not_rescaled": Caught(
        chapter="numerics", rows="dense fp32,distributions", looks_like="not rescaled"
    ),
    "padded_keys_counted": Caught(
        chapter="numerics", rows="dense fp32", looks_like="row sum also counts zero keys"
    ),
    "window_left_exclusive": Caught(
        chapter="masks",
        rows="window",
        spares="causal top-left,boolean mask,bias,softcap,alibi",
        looks_like="one key short on the left",
    ),
    "bottom_right_for_top_left": Caught(
        chapter="masks",
        rows="causal top-left",
        spares="causal bottom-right,boolean mask,bias",
        looks_like="bottom-right causal alignment",
    ),
    "softcap_after_mask": Caught(
        chapter="masks",
        rows="softcap",
        spares="causal top-left,window,boolean mask,bias,alibi,sinks",
        looks_like="softcap applied after the mask",
    ),
    "head_by_modulo": Caught(
        chapter="heads", rows="gqa", spares="head_dim_v,many heads", looks_like="h % heads_kv"
    ),
    "lse_in_base_two": Caught(chapter="lse", rows="lse", looks_like="base 2"),
    "fully_masked_rows_nan": Caught(
        chapter="masks",
        rows="boolean mask,empty rows",
        spares="causal top-left,softcap,alibi",
        looks_like="in rows that see no key",
    ),
    "output_unwritten_without_keys": Caught(chapter="varlen", rows="key lengths", looks_like="NaN"),
    "dk_of_last_query_missing": Caught(
        chapter="gradients", rows="gradients fp32", looks_like="without the last query row"
    ),
    "delta_omitted": Caught(chapter="gradients", rows="gradients fp32", looks_like="without delta"),
    "reads_past_the_end": Caught(chapter="memory", rows="memory"),
    "writes_past_the_end": Caught(chapter="memory", rows="memory"),
    "scale_of_first_call": Caught(
        chapter="state", rows="state", looks_like="scale of an earlier call"
    ),
    "zeros_always": Caught(chapter="numerics", rows="dense fp32", looks_like="zeros"),
}
# Bugs that shipped in public kernels, and cheats: the same, kept for longer runs.
CAUGHT_TOO = {
    "exp2_without_log2e": Caught(chapter="heads", rows="gqa", looks_like="2 in the exponent"),
    "last_key_dropped": Caught(chapter="heads", rows="gqa", looks_like="without the last key"),
    "padded_keys_counted_unless_causal": Caught(
        chapter="heads", rows="gqa", looks_like="row sum also counts zero keys"
    ),
    "query_grid_rounded_down": Caught(chapter="memory", rows="memory", looks_like="never written"),
    "probabilities_in_e4m3": Caught(chapter="numerics", dtype="bf16", rows="dense bf16"),
    "output_accumulated_in_bf16": Caught(chapter="numerics", dtype="bf16", rows="long rows"),
    "window_right_plus_one": Caught(
        chapter="masks",
        rows="window",
        spares="boolean mask,bias,softcap,alibi",
        looks_like="one key long on the right",
    ),
    "top_left_in_backward": Caught(
        chapter="gradients", dtype="fp16", rows="gradients", looks_like="causal alignment"
    ),
    "causal_ignored_in_backward": Caught(
        chapter="gradients", rows="gradients", looks_like="causal mask ignored"
    ),
    "mask_polarity": Caught(
        chapter="masks",
        rows="boolean mask",
        spares="causal top-left,window,bias,alibi,sinks",
        looks_like="mask inverted",
    ),
    "mask_read_as_contiguous": Caught(chapter="layout", rows="layout", looks_like="mask"),
    "bias_row_stride_lost_in_mqa": Caught(chapter="masks", rows="two features"),
    "alibi_distance_off_by_one": Caught(
        chapter="masks", rows="alibi", spares="window,bias,softcap,sinks", looks_like="ALiBi"
    ),
    "alibi_sign": Caught(
        chapter="masks", rows="alibi", spares="window,bias,softcap,sinks", looks_like="ALiBi"
    ),
    "sink_per_tile": Caught(
        chapter="masks", rows="sinks", spares="window,bias,softcap,alibi", looks_like="sink"
    ),
    "hidden_first_tile_nan": Caught(chapter="masks", rows="boolean mask", looks_like="NaN"),
    "head_times_group": Caught(chapter="heads", rows="gqa", looks_like="h * group"),
    "head_tile_crosses_group": Caught(chapter="heads", rows="gqa"),
    "lse_gradient_ignored": Caught(
        chapter="gradients", rows="lse gradient", looks_like="through the LSE ignored"
    ),
    "grad_out_assumed_contiguous": Caught(chapter="layout", rows="layout"),
    "out_read_with_strides_of_grad_out": Caught(chapter="layout", rows="layout"),
    "v_indexed_with_head_dim": Caught(chapter="gradients", dtype="bf16", rows="gradients"),
    "values_read_past_the_end": Caught(chapter="memory", rows="memory"),
    "result_cached": Caught(chapter="state", rows="state", looks_like="earlier call"),
    "inputs_zeroed": Caught(chapter="heads", rows="gqa"),
    "gc_search": Caught(chapter="heads", rows="gqa", looks_like="zeros"),
    "lazy_result": Caught(chapter="heads", rows="gqa"),
}
# One for each way of finding out; the others run where slow tests do.
EXEMPLARY = {
    "window_left_exclusive",
    "head_by_modulo",
    "scale_of_first_call",
    "reads_past_the_end",
    "writes_past_the_end",
}
EVERY = [
    pytest.param(fault, caught, id=fault, marks=() if fault in EXEMPLARY else pytest.mark.slow)
    for fault, caught in (CAUGHT | CAUGHT_TOO).items()
]


def test_every_fault_must_be_caught() -> None:
    declared = runpy.run_path(str(PLANTED / "faults.py"))["FAULTS"]
    assert set(CAUGHT) | set(CAUGHT_TOO) == set(declared)


def check(target: str, folder: Path, *options: str) -> tuple[int, str, dict[str, Any]]:
    """Exit status, output and JSON of the command line."""
    result = folder / "result.json"
    main = "from attnproof.cli.main import main; main()"
    command = [sys.executable, "-c", main, "check", f"{PLANTED / 'faulty.py'}:{target}"]
    done = subprocess.run(
        [*command, "--device=cpu", f"--json={result}", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.exists(), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads(result.read_text())


@pytest.mark.parametrize(("fault", "caught"), EVERY)
def test_each_fault_is_caught_and_named(fault: str, caught: Caught, tmp_path: Path) -> None:
    status, out, result = check(
        fault, tmp_path, f"--chapter={caught.chapter}", f"--dtype={caught.dtype}", "--workers=1"
    )
    assert status == 1, out
    rows = {row["feature"]: row for row in result["features"]}
    for feature in caught.rows.split(","):
        assert rows[feature]["deviates"] + rows[feature]["crashed"] > 0, out
        assert feature in result["summary"]["line"]
    for feature in filter(None, caught.spares.split(",")):
        assert rows[feature]["deviates"] + rows[feature]["crashed"] == 0, out
    if caught.looks_like is not None:
        assert caught.looks_like in " ".join(result["summary"]["looks_like"]), out


@pytest.mark.slow
def test_the_correct_copy_conforms(tmp_path: Path) -> None:
    status, out, result = check("correct", tmp_path)
    assert status == 0, out
    # What it does not do is declared; everything else was judged, and nothing was vacuous.
    assert {case["verdict"] for case in result["cases"]} == {"conforms", "unsupported"}
    assert {row["feature"] for row in result["features"] if not row["conforms"]} == {
        "dropout",
        "graph replay",
        "packed",
        "paged",
        "side stream",
    }
