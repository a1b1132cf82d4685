"""Small problems that use every feature, and random inputs for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attn_reference import Inputs, Problem, standard_alibi_slopes
from attn_reference.inputs import key_count, output_shape


def pytest_configure(config: pytest.Config) -> None:
    # torch says this once, when autograd's thread is the first to use cuBLAS.
    config.addinivalue_line("filterwarnings", "ignore:Attempting to run cuBLAS, but there was no")


SMALL = Problem(batch=2, heads_q=4, heads_kv=2, seqlen_q=5, seqlen_k=7, head_dim=3, dtype="fp32")

# Each feature alone, then together; rows without a visible key come with several of them.
EVERY_FEATURE = [
    SMALL,
    SMALL.replace(causal="top-left"),
    SMALL.replace(causal="bottom-right"),
    SMALL.replace(causal="bottom-right", seqlen_q=7, seqlen_k=5),  # two empty rows
    SMALL.replace(window=(1, 2)),
    SMALL.replace(window=(None, 0)),
    SMALL.replace(window=(2, None), causal="top-left"),
    SMALL.replace(window=(0, 0), seqlen_q=9),  # empty rows before the first key
    SMALL.replace(softcap=0.75),
    SMALL.replace(alibi=True),
    SMALL.replace(alibi=True, causal="top-left"),
    SMALL.replace(mask="random"),
    SMALL.replace(mask="random", mask_shape="1h1k"),
    SMALL.replace(bias="random"),
    SMALL.replace(bias="random", bias_shape="b1qk"),
    SMALL.replace(bias="hiding", bias_shape="1hq1"),
    SMALL.replace(sinks=True),
    SMALL.replace(sinks=True, causal="bottom-right", seqlen_q=7, seqlen_k=5),
    SMALL.replace(scale=1.7),
    SMALL.replace(scale=-0.4, head_dim_v=6),
    SMALL.replace(heads_q=3, heads_kv=1),
    SMALL.replace(heads_q=2, heads_kv=2, head_dim_v=1),
    SMALL.replace(key_lengths=(4, 0)),
    SMALL.replace(key_lengths=(7, 3), causal="bottom-right", alibi=True),
    Problem(packed=((3, 4), (1, 0), (0, 2), (4, 4)), heads_q=2, heads_kv=1, head_dim=3),
    Problem(packed=((3, 4), (4, 3)), heads_q=2, head_dim=3, causal="bottom-right", bias="random"),
    Problem(packed=((2, 3), (3, 2)), heads_q=2, head_dim=2, mask="random", dropout=0.25),
    SMALL.replace(page_size=3),
    SMALL.replace(page_size=2, key_lengths=(5, 0), causal="bottom-right"),
    SMALL.replace(dropout=0.4),
    SMALL.replace(
        scale=0.9,
        causal="bottom-right",
        window=(3, 1),
        softcap=1.5,
        alibi=True,
        mask="random",
        mask_shape="1hqk",
        bias="random",
        bias_shape="bh1k",
        sinks=True,
        key_lengths=(7, 4),
        dropout=0.2,
        head_dim_v=2,
    ),
    SMALL.replace(dtype="bf16"),
    SMALL.replace(dtype="fp16", softcap=2.0, sinks=True),
    SMALL.replace(dtype="fp64", causal="top-left"),
]


@pytest.fixture(scope="session")
def every_feature() -> list[Problem]:
    """The list itself."""
    return EVERY_FEATURE


@pytest.fixture(params=EVERY_FEATURE, ids=lambda p: p.id)
def problem(request: pytest.FixtureRequest) -> Problem:
    """Each of EVERY_FEATURE."""
    return request.param


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """cpu, and cuda where there is one."""
    return request.param


@pytest.fixture(scope="session")
def random_inputs() -> Callable[..., Inputs]:
    """random_inputs(problem, device="cpu") -> Inputs, the gradients that come in included."""
    return make_random_inputs


def make_random_inputs(problem: Problem, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(1234 + problem.seed)
    out_shape = output_shape(problem)
    batch, heads_q, rows, _ = out_shape
    block = (batch, heads_q, rows, key_count(problem))
    logits = torch.float64 if problem.dtype == "fp64" else torch.float32

    def normal(*shape: int, dtype: torch.dtype = problem.torch_dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def bernoulli(shape: tuple[int, ...], p: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < p

    def broadcast(kept: str) -> tuple[int, ...]:
        return tuple(n if letter in kept else 1 for n, letter in zip(block, "bhqk", strict=True))

    keys = (batch, problem.kv_heads, block[3])
    made = Inputs(
        q=normal(*out_shape[:3], problem.head_dim),
        k=normal(*keys, problem.head_dim),
        v=normal(*keys, problem.value_dim),
        grad_out=normal(*out_shape),
        grad_lse=normal(*out_shape[:3], dtype=logits) if problem.lse_gradient else None,
    )
    if problem.mask:
        made.mask = bernoulli(broadcast(problem.mask_shape), 0.6)
        if "q" in problem.mask_shape:
            made.mask[..., 0, :] = False  # an empty row
    if problem.bias:
        made.bias = normal(*broadcast(problem.bias_shape))
        if problem.bias == "hiding":
            made.bias[..., 1, :] = -torch.inf
    if problem.alibi:
        made.alibi_slopes = standard_alibi_slopes(heads_q)
    if problem.sinks:
        made.sinks = normal(heads_q, dtype=logits)
    if problem.dropout:
        made.keep_mask = bernoulli(block, 1 - problem.dropout)
    if problem.key_lengths is not None:
        made.key_lengths = torch.tensor(problem.key_lengths, dtype=torch.int32)
        for b, length in enumerate(problem.key_lengths):
            made.k[b, :, length:] = torch.nan
            made.v[b, :, length:] = torch.nan
    if problem.packed is not None:
        for side, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
            lengths = torch.tensor([0] + [pair[side] for pair in problem.packed])
            setattr(made, name, lengths.cumsum(0).int())
    if problem.page_size is not None:
        to_pages(made, problem)
    for name, tensor in made.tensors().items():
        setattr(made, name, tensor.to(device))
    return made


def to_pages(made: Inputs, problem: Problem) -> None:
    """Move k and v into pages in reverse order; page 0 and the ends of pages are NaN."""
    size, per_entry = problem.page_size, -(-problem.keys // problem.page_size)
    count = problem.batch * per_entry + 1
    made.page_table = torch.arange(count - 1, 0, -1).reshape(problem.batch, per_entry).int()
    for name in ("k", "v"):
        dense = getattr(made, name)
        pages = dense.new_full((count, problem.kv_heads, size, dense.shape[-1]), torch.nan)
        for b in range(problem.batch):
            for j in range(problem.keys):
                page = made.page_table[b, j // size]
                pages[page, :, j % size] = dense[b, :, j]
        setattr(made, name, pages)
