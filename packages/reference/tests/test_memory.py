"""The oracle of a long context fits beside its inputs."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc/self"),
]

# Prints by how many bytes the peak of the resident memory rose over what it was with the inputs.
MEASURE = """
import torch
torch.set_num_threads(1)
from attn_reference import Inputs, Problem, attention, gradients

problem = Problem(
    heads_q=8, heads_kv={heads_kv}, seqlen_q={rows}, seqlen_k=131_072, head_dim=128, dtype="bf16",
    gradients=("q", "k", "v"),
)
def filled(heads, length):
    return torch.empty(1, heads, length, 128, dtype=torch.bfloat16).uniform_(-1, 1)
inputs = Inputs(
    q=filled(8, {rows}), k=filled({heads_kv}, 131_072), v=filled({heads_kv}, 131_072),
    grad_out=filled(8, {rows}),
)
torch.ones(64, 64, dtype=torch.float64).matmul(torch.ones(64, 64, dtype=torch.float64))
def resident(which):  # VmRSS: now, VmHWM: at the peak
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(which))
before = resident("VmRSS")
{call}
print(resident("VmHWM") - before)
"""


def added_bytes(call: str, *, heads_kv: int = 8, rows: int = 128) -> int:
    """What the call adds to a process that holds its inputs."""
    program = MEASURE.format(call=call, heads_kv=heads_kv, rows=rows)
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600
    )
    return int(finished.stdout)


@pytest.mark.parametrize("heads_kv", [8, 1])
def test_forward_of_131072_keys_adds_less_than_a_gigabyte(heads_kv):
    added = added_bytes("attention(inputs, problem)", heads_kv=heads_kv)
    assert 2 * 131_072 * 128 * 8 < added < 1e9  # at least one head of k and v in fp64


def test_the_measurement_sees_a_conversion_of_everything():
    assert added_bytes("wide = inputs.k.double(), inputs.v.double()") > 1e9


def test_the_measurement_sees_scores_that_are_not_in_chunks():
    whole = "import attn_reference.sequences as s; s.CHUNK_ELEMENTS = 1 << 30"
    call = f"{whole}\nattention(inputs, problem)"
    assert added_bytes(call, heads_kv=1, rows=64) > 1e9


def test_backward_adds_less_than_a_gigabyte_to_its_results():
    results = 2 * 8 * 131_072 * 128 * 8  # dk and dv in fp64
    added = added_bytes("gradients(inputs, problem)", rows=32)
    assert added < results + 1e9
