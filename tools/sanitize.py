"""Run the Triton kernels once on a cover of their variants, for compute-sanitizer to watch.

Usage: compute-sanitizer --tool TOOL --error-exitcode 9 python tools/sanitize.py [K/N | --planted]

The cover: of the cases of level quick one for each combination of features, dtype, head_dim and
shape of the mask, forward and backward. Nothing is judged here; ``attnproof check`` does that. K/N
runs every Nth problem from the Kth on, counted from 0. With --planted two kernels run instead: one
reads, uninitialised, behind the end of a tensor, which memcheck and initcheck must find; one reads
shared memory that another warp has just written, without a barrier between, which racecheck must
find. Set PYTORCH_NO_CUDA_MEMORY_CACHING=1, or tensors share allocations.
"""

import sys

import torch
import triton
import triton.language as tl

from attn_reference.problem import Problem
from attnproof import cases
from attnproof.inputs.make import make_inputs
from attnproof.plan import Call
from attnproof.worker.calling import compute, require_gradients
from triton_attention.attnproof_backend import triton_v1, triton_v2

LONGEST_Q, LONGEST_K = 600, 1100


def cover() -> list[Problem]:
    """The problems."""
    chosen: dict[object, Problem] = {}
    for case in cases.all_cases("quick"):
        p = case.problem
        if p.seqlen_q <= LONGEST_Q and p.keys <= LONGEST_K:
            key = (p.features, p.dtype, p.head_dim, p.mask_shape, p.bias_shape)
            chosen.setdefault(key, p)
    return list(chosen.values())


def on_gpu(problem: Problem) -> Call:
    """A call with its inputs there."""
    inputs = make_inputs(problem)
    for name, tensor in inputs.tensors().items():
        setattr(inputs, name, tensor.cuda())
    return Call(problem=problem, inputs=inputs)


@triton.jit
def wrong(values, results, count, BLOCK: tl.constexpr):
    """Copies, but the mask of the load is missing."""
    place = tl.arange(0, BLOCK)
    tl.store(results + place, tl.load(values + place), mask=place < count)


# Triton puts barriers where they belong, so that the race is not written in it.
RACE = """
extern "C" __global__ void race(float* results) {
    __shared__ float shared[256];
    shared[threadIdx.x] = threadIdx.x;
    results[threadIdx.x] = shared[(threadIdx.x + 64) % 256];
}
"""


def planted() -> None:
    """Reads 24 elements of nothing behind 1000 that were never written, and races for 256."""
    values, results = (torch.empty(1000, device="cuda") for _ in range(2))
    wrong[(1,)](values, results, 1000, BLOCK=1024)
    race = torch.cuda._compile_kernel(RACE, "race")
    race(grid=(1, 1, 1), block=(256, 1, 1), args=[results])


def main() -> None:
    """Run them all."""
    if "--planted" in sys.argv:
        planted()
    else:
        first, step = map(int, sys.argv[1].split("/")) if sys.argv[1:] else (0, 1)
        ran = 0
        for problem in cover()[first::step]:
            for backend in (triton_v1, triton_v2):
                if not backend.capabilities.unsupported_reasons(problem):
                    call = on_gpu(problem)
                    compute(call, require_gradients(call), backend, "cuda")
                    ran += 1
        print(f"{ran} calls of V1 and V2")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
