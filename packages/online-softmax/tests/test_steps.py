"""The steps against the oracle in fp64, over every feature, block sizes of any kind, and what each
is said to do to HBM."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import Verbosity, example, given, settings
from hypothesis import strategies as st

from attn_reference import Inputs, Problem, attention, gradients
from attn_reference.masks import positional_mask
from attn_reference.problem import GRADIENT_NAMES
from attn_reference.sequences import sequences
from attnproof.conformance.exploring import FULL
from attnproof.inputs.make import make_inputs, make_keep_mask
from online_softmax import per_row, split_kv, tiled_v1, tiled_v2
from online_softmax.mask_rule import MaskRule
from online_softmax.memory import HbmTensor, Memory
from online_softmax.operands import Operands, blocks, blocks_of
from online_softmax.steps import STEPS, Step

SMALL = Problem(
    batch=2, heads_q=4, heads_kv=2, seqlen_q=5, seqlen_k=70, head_dim=3, dtype="fp64", seed=1
)
# Each feature alone, then together; rows that see no key come with several of them.
EVERY_FEATURE = [
    SMALL,
    SMALL.replace(seqlen_q=130),
    SMALL.replace(seqlen_q=0),
    SMALL.replace(seqlen_k=0),
    SMALL.replace(batch=0),
    SMALL.replace(causal="top-left"),
    SMALL.replace(causal="bottom-right", seqlen_q=70, seqlen_k=5),  # 65 empty rows
    SMALL.replace(window=(3, 2), seqlen_q=70),
    SMALL.replace(window=(2, None), causal="top-left", seqlen_q=70),
    SMALL.replace(softcap=0.75),
    SMALL.replace(alibi=True, causal="bottom-right"),
    SMALL.replace(mask="random", mask_shape="1h1k"),
    SMALL.replace(mask="random", mask_shape="b1q1"),
    SMALL.replace(bias="normal"),
    SMALL.replace(bias="normal", bias_shape="11qk"),
    SMALL.replace(bias="normal", bias_shape="bh1k", causal="top-left", seqlen_q=70),
    SMALL.replace(sinks=True),
    SMALL.replace(sinks=True, causal="bottom-right", seqlen_q=70, seqlen_k=5),
    SMALL.replace(scale=-0.4, head_dim_v=6),
    SMALL.replace(heads_q=3, heads_kv=1),
    SMALL.replace(key_lengths=(66, 0), sinks=True),
    SMALL.replace(page_size=7, key_lengths=(70, 33), causal="bottom-right"),
    SMALL.replace(dropout=0.4),
    SMALL.replace(distribution="large", seqlen_q=9),
    SMALL.replace(distribution="needles", seqlen_q=9),
    Problem(packed=((3, 0), (0, 4), (70, 66), (5, 90)), heads_q=2, head_dim=3, dtype="fp64"),
    Problem(
        packed=((2, 70), (66, 3)),
        heads_q=2,
        head_dim=3,
        dtype="fp64",
        causal="bottom-right",
        mask="random",
        bias="normal",
        dropout=0.25,
    ),
    SMALL.replace(
        seqlen_q=67,
        scale=0.9,
        causal="bottom-right",
        window=(40, 1),
        softcap=1.5,
        alibi=True,
        mask="random",
        mask_shape="1hqk",
        bias="normal",
        bias_shape="bh1k",
        sinks=True,
        key_lengths=(70, 40),
        dropout=0.2,
        head_dim_v=2,
    ),
]
BACKWARD = [step for step in STEPS.values() if step.backward is not None]
every_feature = pytest.mark.parametrize("problem", EVERY_FEATURE, ids=lambda p: p.id)
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=lambda step: step.name)
with_backward = pytest.mark.parametrize("step", BACKWARD, ids=lambda step: step.name)


def inputs_of(problem: Problem) -> Inputs:
    """With a keep mask and sinks in fp64, and the gradients that come in."""
    wanted = replace(problem, gradients=("q",), lse_gradient=True)
    inputs = make_inputs(wanted)
    if problem.dropout:
        inputs.keep_mask = make_keep_mask(problem)
    if problem.sinks:
        inputs.sinks = inputs.sinks.double()
    inputs.grad_lse = inputs.grad_lse.double()
    return inputs


def with_gradients(problem: Problem) -> Problem:
    """The problem with every gradient that it can have."""
    names = ["q"] if problem.page_size else ["q", "k", "v"]
    names += [name for name in ("bias", "sinks") if getattr(problem, name)]
    return problem.replace(gradients=tuple(names), lse_gradient=True)


def require_the_answer(step: Step, problem: Problem, inputs: Inputs) -> None:
    exact, found = attention(inputs, problem), step.attention(inputs, problem)
    assert found.out.shape == exact.out.shape
    torch.testing.assert_close(found.out, exact.out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.lse, exact.lse, rtol=1e-13, atol=1e-13)


def require_the_gradients(step: Step, problem: Problem, inputs: Inputs) -> None:
    problem = with_gradients(problem)
    exact = gradients(inputs, problem).tensors()
    leaves = {n: getattr(inputs, n).clone().requires_grad_() for n in problem.gradients}
    found = step.attention(replace(inputs, **leaves), problem)
    given_back = torch.autograd.grad(
        (found.out, found.lse), list(leaves.values()), (inputs.grad_out, inputs.grad_lse)
    )
    for name, gradient in zip(leaves, given_back, strict=True):
        size = 1 + exact[name].abs().max().item() if exact[name].numel() else 1
        torch.testing.assert_close(gradient, exact[name], rtol=0, atol=1e-13 * size)


@every_step
@every_feature
def test_forward(problem, step):
    require_the_answer(step, problem, inputs_of(problem))


@with_backward
@every_feature
def test_backward(problem, step):
    require_the_gradients(step, problem, inputs_of(problem))


# Rows that see nothing, several blocks of either kind, everything that a tile must cut rightly.
TILED = SMALL.replace(
    batch=1,
    seqlen_q=11,
    seqlen_k=9,
    causal="bottom-right",
    window=(6, None),
    softcap=2.0,
    alibi=True,
    mask="random",
    bias="normal",
    sinks=True,
    dropout=0.2,
)


def tiled(block_q: int, block_k: int) -> list[Step]:
    """The steps that have block sizes, with these."""
    sizes = {"block_q": block_q, "block_k": block_k}
    steps = [
        replace(
            STEPS[name],
            forward=partial(module.forward, **sizes),
            backward=partial(module.backward, **sizes),
        )
        for name, module in (("tiled-v1", tiled_v1), ("tiled-v2", tiled_v2))
    ]
    return steps + [
        replace(STEPS["split-kv"], forward=partial(split_kv.forward, splits=n, **sizes))
        for n in (1, 2, 5, 100)
    ]


@pytest.mark.parametrize("block_k", [1, 3, 64])
@pytest.mark.parametrize("block_q", [1, 4, 64])
@pytest.mark.parametrize("problem", [SMALL.replace(seqlen_k=9), TILED], ids=["plain", "tiled"])
def test_block_sizes_do_not_matter(problem, block_q, block_k):
    inputs = inputs_of(problem)
    for step in tiled(block_q, block_k):
        require_the_answer(step, problem, inputs)
        if step.backward is not None:
            require_the_gradients(step, problem, inputs)


@pytest.mark.parametrize("block_q", [1, 4, 64])
@pytest.mark.parametrize("algorithm", [per_row.two_pass, per_row.one_pass])
def test_rows_that_go_together_do_not_matter(algorithm, block_q):
    step = replace(STEPS["one-pass"], forward=partial(algorithm, block_q=block_q))
    require_the_answer(step, TILED, inputs_of(TILED))


def test_blocks_cover_a_range_once():
    for size in (None, 1, 3, 7, 8):
        covered = [n for part in blocks(7, size) for n in range(part.start, part.stop)]
        assert covered == list(range(7))
        assert list(blocks(0, size)) == []
    assert list(blocks_of(slice(4, 9), 3)) == [slice(4, 7), slice(7, 9)]


@with_backward
@pytest.mark.parametrize(
    "problem",
    [
        SMALL.replace(batch=1, seqlen_q=3, seqlen_k=4, causal="top-left", sinks=True),
        SMALL.replace(batch=1, seqlen_q=2, seqlen_k=3, softcap=1.5, bias="normal", alibi=True),
        SMALL.replace(batch=1, seqlen_q=3, seqlen_k=2, causal="bottom-right", dropout=0.3),
    ],
    ids=lambda p: p.id,
)
def test_gradcheck(step, problem):
    problem = with_gradients(problem)
    inputs = inputs_of(problem)
    leaves = [getattr(inputs, name).clone().requires_grad_() for name in problem.gradients]

    def both(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = dict(zip(problem.gradients, tensors, strict=True))
        found = step.attention(replace(inputs, **named), problem)
        # An LSE of -inf has no differences.
        return found.out, found.lse.masked_fill(found.lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(both, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


@with_backward
def test_a_gradient_of_one_input_alone(step):
    """What is not asked for is not computed, and what is does not depend on the rest."""
    problem = SMALL.replace(causal="top-left", bias="normal", sinks=True)
    inputs = inputs_of(problem)
    exact = gradients(inputs, with_gradients(problem)).tensors()
    for name in GRADIENT_NAMES:
        leaf = getattr(inputs, name).clone().requires_grad_()
        found = step.attention(replace(inputs, **{name: leaf}), problem)
        (gradient,) = torch.autograd.grad(
            (found.out, found.lse), leaf, (inputs.grad_out, inputs.grad_lse)
        )
        torch.testing.assert_close(gradient, exact[name], rtol=1e-12, atol=1e-12)


@with_backward
def test_out_or_lse_alone(step):
    inputs = inputs_of(SMALL)
    for name, grad in (("out", inputs.grad_out), ("lse", inputs.grad_lse)):
        leaf = inputs.q.clone().requires_grad_()
        found = step.attention(replace(inputs, q=leaf), SMALL)
        (gradient,) = torch.autograd.grad(getattr(found, name), leaf, grad)
        other = {"out": "grad_lse", "lse": "grad_out"}[name]
        only = replace(inputs, **{other: torch.zeros_like(getattr(inputs, other))})
        expected = gradients(only, with_gradients(SMALL)).q
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


def test_some_steps_have_no_backward_and_say_so():
    without = [step for step in STEPS.values() if step.backward is None]
    assert [step.name for step in without] == ["two-pass", "one-pass", "split-kv"]
    for step in without:
        inputs = inputs_of(SMALL)
        inputs.q.requires_grad_()
        out = step.attention(inputs, SMALL).out
        with pytest.raises(NotImplementedError, match=f"{step.name} has no backward pass"):
            out.sum().backward()


@every_step
def test_inputs_that_do_not_fit_are_refused(step):
    inputs = inputs_of(SMALL)
    with pytest.raises(ValueError, match=r"k has shape"):
        step.attention(replace(inputs, k=inputs.k[:, :, :3]), SMALL)
    with pytest.raises(ValueError, match="sinks is missing"):
        step.attention(inputs, SMALL.replace(sinks=True))
    with pytest.raises(ValueError, match="q has dtype"):
        step.attention(replace(inputs, q=inputs.q.float()), SMALL)


@with_backward
def test_pages_take_no_gradient(step):
    problem = SMALL.replace(page_size=7)
    inputs = inputs_of(problem)
    inputs.k.requires_grad_()
    with pytest.raises(ValueError, match="without k and v when page_size"):
        step.attention(inputs, problem)


@with_backward
@pytest.mark.parametrize(
    "changed", ["q", "k", "v", "bias", "sinks", "mask", "alibi_slopes", "keep_mask", "out", "lse"]
)
def test_changes_between_the_passes_are_noticed(step, changed):
    """The backward pass reads them all, and would give gradients of something else."""
    problem = TILED.replace(window=None)
    inputs = inputs_of(problem)
    leaf = inputs.v.clone().requires_grad_()
    found = step.attention(replace(inputs, v=leaf), problem)
    with torch.no_grad():
        tensor = {"v": leaf, "out": found.out, "lse": found.lse}.get(changed)
        tensor = getattr(inputs, changed) if tensor is None else tensor
        tensor.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad((found.out.sum(), found.lse.sum())[:1], leaf)


@with_backward
def test_no_second_derivative(step):
    inputs = inputs_of(SMALL)
    inputs.q.requires_grad_()
    out = step.attention(inputs, SMALL).out
    (first,) = torch.autograd.grad(out.square().sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@every_step
def test_inputs_stay_as_they_are(step):
    inputs = inputs_of(TILED)
    before = {name: tensor.clone() for name, tensor in inputs.tensors().items()}
    step.attention(inputs, TILED)
    for name, tensor in inputs.tensors().items():
        assert torch.equal(tensor, before[name]), name


# Tiles that are skipped.


def loads(algorithm, problem: Problem, **sizes: int) -> Counter[str]:
    """What the forward pass of an algorithm loads."""
    step, memory = Step(name="counted", title="", forward=partial(algorithm, **sizes)), Memory()
    step.attention(inputs_of(problem), problem, memory)
    return memory.loads


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 1.0),
        ({"causal": "top-left"}, (8 * 9 / 2) / 64),
        ({"causal": "top-left", "window": (7, 0)}, (8 + 7) / 64),
        ({"window": (0, 0)}, 8 / 64),
    ],
)
def test_v2_loads_visible_tiles_alone(settings, share):
    """64 x 64 in tiles of 8 x 8: half of them and the diagonal, or the diagonal and one beside."""
    problem = Problem(seqlen_q=64, seqlen_k=64, head_dim=4, dtype="fp64", **settings)
    sizes = {"block_q": 8, "block_k": 8}
    elements = 8 * 64 * 4  # eight blocks of rows, each of which could load all of K
    v2 = loads(tiled_v2.forward, problem, **sizes)
    assert v2["K"] == v2["V"] == share * elements
    assert loads(split_kv.forward, problem, splits=3, **sizes)["K"] == share * elements
    assert loads(tiled_v1.forward, problem, **sizes)["K"] == 64 * 4  # once, whatever is visible


def test_v2_skips_hidden_tiles_in_the_backward_too():
    problem = with_gradients(
        Problem(seqlen_q=64, seqlen_k=64, head_dim=4, dtype="fp64", causal="top-left")
    )
    sizes = {"block_q": 8, "block_k": 8}
    step = replace(
        STEPS["tiled-v2"],
        forward=partial(tiled_v2.forward, **sizes),
        backward=partial(tiled_v2.backward, **sizes),
    )
    inputs, memory = inputs_of(problem), Memory()
    inputs.q.requires_grad_()
    out = step.attention(inputs, problem, memory).out
    before = memory.loads["Q"]
    out.backward(inputs.grad_out)
    assert memory.loads["Q"] - before == 36 * 8 * 4


lengths = st.integers(1, 24)
side = st.none() | st.integers(0, 9)
bands = settings(settings.get_profile(FULL), max_examples=150, verbosity=Verbosity.normal)


@st.composite
def tiles(draw: st.DrawFn) -> tuple[Problem, slice, slice]:
    problem = Problem(
        seqlen_q=draw(lengths),
        seqlen_k=draw(lengths),
        head_dim=1,
        causal=draw(st.sampled_from(["none", "top-left", "bottom-right"])),
        window=draw(st.none() | st.tuples(side, side)),
    )
    parts = []
    for length in (problem.seqlen_q, problem.keys):
        start = draw(st.integers(0, length - 1))
        parts.append(slice(start, draw(st.integers(start + 1, length))))
    return problem, *parts


CORNERS = Problem(seqlen_q=9, seqlen_k=6, head_dim=1, causal="bottom-right", window=(2, 3))


@bands
@given(tiles())
@example((CORNERS, slice(0, 3), slice(0, 6)))  # rows before the first key
@example((CORNERS, slice(3, 4), slice(0, 1)))  # the corner itself
@example((CORNERS, slice(3, 4), slice(1, 2)))  # one key beyond it
@example((CORNERS, slice(6, 7), slice(0, 1)))  # one key beyond the window
@example((CORNERS.replace(window=(0, 0)), slice(3, 9), slice(0, 6)))
@example((CORNERS.replace(window=(None, 0), causal="none"), slice(8, 9), slice(0, 6)))
def test_tiles_are_judged_as_the_dense_mask_is(drawn):
    """Skipped exactly when nothing of the tile is visible, unmasked exactly when all of it is."""
    problem, rows, keys = drawn
    (sequence,) = sequences(make_inputs(problem), problem)
    rule = MaskRule(sequence, problem, Memory(), torch.float64)
    dense = positional_mask(problem, problem.seqlen_q, problem.keys).dense(
        problem.seqlen_q, problem.keys
    )[rows, keys]
    assert rule.none_visible(rows, keys) == (not dense.any())
    assert rule.all_visible(rows, keys) == bool(dense.all())
    scores = rule.tile(torch.zeros(1, 1, *dense.shape, dtype=torch.float64), rows, keys).scores
    assert torch.equal(scores[0, 0] == 0, dense)


# V1 step by step.


@dataclass(kw_only=True, eq=False)
class WatchedTensor(HbmTensor):
    """Tells after each store."""

    def store(self, tile: torch.Tensor, *slices: slice) -> None:
        super().store(tile, *slices)
        self.memory.after_store(self.name, slices)


class WatchedMemory(Memory):
    """Keeps the tensors in HBM by name, and what O was after each store of m."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, HbmTensor] = {}
        self.moments: list[tuple[slice, torch.Tensor]] = []

    def place(self, name, data, compute, vector=False):
        tensor = WatchedTensor(
            memory=self, name=name, data=data, compute=compute, whole=0 if vector else 1
        )
        self.tensors[name] = tensor
        return tensor

    def after_store(self, name: str, slices: tuple[slice, ...]) -> None:
        if name == "m":
            self.moments.append((slices[0], self.tensors["O"].data.clone()))


def test_v1_keeps_o_normalised_at_every_moment():
    """After the rows of a block met a block of keys, O is the attention to the keys so far."""
    problem = Problem(
        seqlen_q=10, seqlen_k=11, head_dim=4, dtype="fp64", causal="top-left", distribution="rising"
    )
    inputs, memory, block_q, block_k = inputs_of(problem), WatchedMemory(), 4, 3
    (sequence,) = sequences(inputs, problem)
    tiled_v1.forward(Operands(sequence, problem, memory), block_q, block_k)
    row_blocks = list(blocks(10, block_q))
    start, after = memory.moments[: len(row_blocks)], memory.moments[len(row_blocks) :]
    assert (start[-1][1] == 0).all()
    order = [(keys, rows) for keys in blocks(11, block_k) for rows in row_blocks]
    assert len(after) == len(order)
    scores = inputs.q[0, 0] @ inputs.k[0, 0].T * problem.softmax_scale
    scores = scores.masked_fill(~torch.ones(10, 11, dtype=torch.bool).tril(), -math.inf)
    for (keys, rows), (stored, o) in zip(order, after, strict=True):
        assert stored == rows
        expected = torch.softmax(scores[rows, : keys.stop], -1) @ inputs.v[0, 0, : keys.stop]
        torch.testing.assert_close(o[0, 0, rows], expected, rtol=1e-12, atol=1e-13)


def test_v1_rewrites_o_for_every_block_of_keys_and_v2_once():
    problem = Problem(seqlen_q=32, seqlen_k=64, head_dim=4, dtype="fp64")
    stored = {}
    for name, algorithm in (("v1", tiled_v1.forward), ("v2", tiled_v2.forward)):
        memory = Memory()
        step = Step(name=name, title="", forward=partial(algorithm, block_q=8, block_k=16))
        step.attention(inputs_of(problem), problem, memory)
        stored[name] = memory.stores["O"], memory.loads["O"]
    assert stored == {"v1": ((1 + 4) * 32 * 4, 4 * 32 * 4), "v2": (32 * 4, 0)}


@every_step
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_dtypes_of_the_answer(step, dtype):
    problem = SMALL.replace(dtype=dtype)
    found = step.attention(make_inputs(problem), problem)
    assert found.out.dtype == problem.torch_dtype
    assert found.lse.dtype == torch.float32
