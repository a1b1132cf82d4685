import hashlib
import math

import numpy as np
import pytest
import torch

from attn_reference.problem import Problem
from attn_reference.sequences import sequences, visibility
from attnproof.inputs.make import (
    BIAS_PATTERNS,
    DISTRIBUTIONS,
    MASK_PATTERNS,
    is_iid,
    make_inputs,
    make_keep_mask,
)
from attnproof.inputs.streams import Stream


def fingerprint(problem: Problem) -> str:
    digest = hashlib.sha256()
    for name, tensor in make_inputs(problem).tensors().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# Everything that is stored or reported names its inputs by problem: these may never change.
PINNED = {
    "b1_h2x1_q9_k33_d8_fp32": "2c365dcda5aa143e",
    "b2_h4x4_q7_k40_d16_bf16_alibi_mask=random@bhqk_sinks_grad=q_dlse": "e141b9677c4662e8",
    "b2_h4x4_q7_k40_d16_fp16_bias=neginf-random@1h1k_dist=outliers_seed=-1": "cb43ca391b8c4602",
    "b2_h2x2_q3_k40_d16_fp16_lens=0,37_page=16_dist=needles": "acef2f3e5ff9f382",
    "packed=5x9,0x3,17x17_h1x1_d16_fp32_causal=bottom-right_dist=integers": "f87ecafaff6fe355",
    "b1_h1x1_q5_k20_d8_fp16_dist=duplicated": "d4de8f497a3e6999",
    "b1_h1x1_q5_k20_d8_fp16_dist=equal": "6f29c8f5fa41f441",
    "b1_h1x1_q5_k20_d8_fp16_dist=falling": "3f1e0a9e45f80f36",
    "b1_h1x1_q5_k20_d8_fp16_dist=large": "ae48db30b67665d9",
    "b1_h1x1_q5_k20_d8_fp16_dist=normal:0.3": "f1cc65514e0ff1e3",
    "b1_h1x1_q5_k20_d8_fp16_dist=one-hot": "476240276956e681",
    "b1_h1x1_q5_k20_d8_fp16_dist=rising": "aba9374df7453f0a",
    "b1_h1x1_q5_k20_d8_fp16_dist=tiny": "113452413505cbbe",
}


@pytest.mark.parametrize("problem_id", PINNED)
def test_inputs_are_the_same_bits_everywhere(problem_id):
    assert fingerprint(Problem.from_id(problem_id)) == PINNED[problem_id]


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp64"])
def test_every_distribution_has_the_canonical_form(name, dtype):
    problem = Problem(
        batch=2,
        heads_q=6,
        heads_kv=2,
        seqlen_q=5,
        seqlen_k=9,
        head_dim=16,
        head_dim_v=24,
        dtype=dtype,
        distribution=name,
    )
    inputs = make_inputs(problem)
    assert inputs.q.shape == (2, 6, 5, 16)
    assert inputs.k.shape == (2, 2, 9, 16)
    assert inputs.v.shape == (2, 2, 9, 24)
    for tensor in (inputs.q, inputs.k, inputs.v):
        assert tensor.dtype == problem.torch_dtype
        assert tensor.is_contiguous()
        assert tensor.isfinite().all()
    assert inputs.v.count_nonzero() > 0


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize(
    "sizes",
    [
        {"seqlen_q": 0, "seqlen_k": 5},
        {"seqlen_q": 5, "seqlen_k": 0},
        {"seqlen_q": 1, "seqlen_k": 1},
        {"batch": 0},
        {"packed": ()},
        {"packed": ((0, 0), (3, 0), (0, 3))},
        {"seqlen_q": 3, "seqlen_k": 7, "scale": -0.5},
    ],
)
def test_every_distribution_takes_the_smallest_problems(name, sizes):
    inputs = make_inputs(Problem(head_dim=8, distribution=name, **sizes))
    assert inputs.q.isfinite().all()
    assert inputs.k.isfinite().all()


def test_tensors_have_streams_of_their_own_and_seeds_change_them():
    one, other = (make_inputs(Problem(seqlen_q=16, head_dim=16, seed=seed)) for seed in (0, 1))
    assert not torch.equal(one.q, one.k)
    assert not torch.equal(one.k, one.v)
    for name in ("q", "k", "v"):
        assert not torch.equal(getattr(one, name), getattr(other, name))


def test_options_do_not_change_q_k_and_v():
    plain = make_inputs(Problem(seqlen_q=16, head_dim=16))
    rich = make_inputs(Problem(seqlen_q=16, head_dim=16, mask="random", gradients=("q",)))
    assert torch.equal(plain.q, rich.q)
    assert torch.equal(plain.v, rich.v)


def test_normal_numbers_have_the_moments_of_a_normal_distribution():
    numbers = Stream(0, "moments").normal((1 << 20,)).astype(np.float64)
    assert abs(numbers.mean()) < 0.005
    assert abs(numbers.std() - 1) < 0.005
    assert abs((numbers**3).mean()) < 0.02
    assert abs((numbers**4).mean() - 2.85) < 0.05  # 3 - 1.2/8: eight uniforms
    neighbours = (numbers[1:] * numbers[:-1]).mean()
    assert abs(neighbours) < 0.005


def test_a_stream_is_the_same_in_pieces():
    whole = Stream(1, "x").normal((300_000,))
    stream = Stream(1, "x")
    pieces = [stream.normal((100_000,)) for _ in range(3)]
    assert np.array_equal(whole, np.concatenate(pieces))


def test_integers_and_permutations_reach_both_ends():
    drawn = Stream(0, "i").integers((1000,), -2, 2)
    assert set(drawn.tolist()) == {-2, -1, 0, 1, 2}
    assert sorted(Stream(0, "p").permutation(50).tolist()) == list(range(50))


NEEDLES = [
    Problem(seqlen_q=200, head_dim=64),
    Problem(seqlen_q=200, head_dim=64, causal="top-left"),
    Problem(seqlen_q=64, seqlen_k=300, head_dim=64, causal="bottom-right"),
    Problem(seqlen_q=300, seqlen_k=64, head_dim=64, causal="bottom-right"),
    Problem(seqlen_q=100, seqlen_k=150, head_dim=64, causal="bottom-right", window=(20, None)),
    Problem(seqlen_q=90, seqlen_k=150, head_dim=64, window=(10, 5)),
    Problem(batch=2, heads_q=6, heads_kv=2, seqlen_q=33, seqlen_k=70, head_dim=32),
    Problem(heads_q=4, heads_kv=1, seqlen_q=1, seqlen_k=257, head_dim=128),
    Problem(batch=3, seqlen_q=20, seqlen_k=65, head_dim=64, key_lengths=(65, 1, 30)),
    Problem(packed=((5, 40), (33, 33), (7, 2)), head_dim=64, causal="bottom-right"),
    Problem(seqlen_q=40, seqlen_k=2000, head_dim=8),
    Problem(heads_q=5, heads_kv=1, seqlen_q=64, seqlen_k=300, head_dim=64, causal="bottom-right"),
    Problem(seqlen_q=90, seqlen_k=30, head_dim=64, causal="top-left", window=(4, None)),
    Problem(seqlen_q=40, seqlen_k=90, head_dim=24, scale=-0.3),
]


@pytest.mark.parametrize("problem", NEEDLES, ids=lambda p: p.id)
def test_needles_let_every_visible_key_dominate(problem):
    """Each key that any query sees has, for some query, a share of all its weight that is close
    to the largest that can be had: one over the keys per query."""
    problem = problem.replace(distribution="needles")
    for sequence in sequences(make_inputs(problem), problem):
        rows, heads = slice(0, sequence.len_q), slice(0, problem.heads_q)
        visible = visibility(sequence, problem, heads, rows)
        keys = sequence.k.double().repeat_interleave(problem.group, 0)
        scores = problem.softmax_scale * sequence.q.double() @ keys.mT
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num()
        best = weights.reshape(problem.kv_heads, -1, sequence.len_k).amax(1)
        seen = visible.reshape(problem.kv_heads, -1, sequence.len_k).any(1)
        per_query = -(-int(seen[0].sum()) // (problem.group * sequence.len_q))
        aliases = max(1, sequence.len_k / 2**problem.head_dim)  # codes too short for all keys
        assert best[seen].min() > 0.95 / (2 * per_query) / (2 * aliases)
        if per_query == 1 and aliases == 1:
            assert best[seen].min() > 0.9


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_integers_leave_one_key_and_exact_values(dtype):
    problem = Problem(
        heads_q=4, heads_kv=2, seqlen_q=50, seqlen_k=70, dtype=dtype, distribution="integers"
    )
    inputs = make_inputs(problem)
    keys = inputs.k.double().repeat_interleave(2, 1)
    scores = problem.softmax_scale * inputs.q.double() @ keys.mT
    top = scores.topk(2).values
    assert (top[..., 0] - top[..., 1]).min() > 110
    assert torch.equal(inputs.v, inputs.v.round())
    assert inputs.v.abs().max() <= 256


def test_integers_need_a_dimension_for_each_bit():
    with pytest.raises(ValueError, match="head_dim=8: accepted is 11"):
        make_inputs(Problem(seqlen_q=2000, head_dim=8, distribution="integers"))
    with pytest.raises(ValueError, match="scale=0"):
        make_inputs(Problem(scale=0.0, distribution="needles"))


@pytest.mark.parametrize("shape", ["bhqk", "b1qk", "1h1k", "11qk", "b11k", "1111"])
@pytest.mark.parametrize("name", sorted(MASK_PATTERNS))
def test_masks_have_the_shape_asked_for(name, shape):
    problem = Problem(
        batch=2, heads_q=3, seqlen_q=5, seqlen_k=7, head_dim=8, mask=name, mask_shape=shape
    )
    mask = make_inputs(problem).mask
    assert mask.dtype == torch.bool
    sizes = dict(zip("bhqk", (2, 3, 5, 7), strict=True))
    assert tuple(mask.shape) == tuple(sizes.get(letter, 1) for letter in shape)


@pytest.mark.parametrize("name", sorted(BIAS_PATTERNS))
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_biases_have_the_dtype_of_the_problem_and_no_nan(name, dtype):
    problem = Problem(
        batch=2, seqlen_q=9, seqlen_k=300, head_dim=8, dtype=dtype, bias=name, bias_shape="b1qk"
    )
    bias = make_inputs(problem).bias
    assert bias.dtype == problem.torch_dtype
    assert tuple(bias.shape) == (2, 1, 9, 300)
    assert not bias.isnan().any()
    assert (bias < math.inf).all()
    assert name.startswith("neginf") == bool((bias == -math.inf).any())


def test_what_masks_hide():
    problem = Problem(seqlen_q=9, seqlen_k=300, head_dim=8)

    def of(name):
        return make_inputs(problem.replace(mask=name)).mask[0, 0]

    assert not of("first-tile")[:, :128].any()
    assert of("first-tile")[:, 128:].all()
    assert not of("last-tile")[:, 172:].any()
    assert of("last-tile")[:, :172].all()
    assert (of("one-key").sum(-1) == 1).all()
    assert not of("nothing").any()
    assert not of("empty-rows")[1::3].any()
    assert of("empty-rows")[0::3].any(-1).all()
    prefix = of("row-prefix").int()
    assert (prefix.diff(dim=-1) <= 0).all()


def test_lengths_packing_and_slopes():
    problem = Problem(packed=((2, 3), (0, 4)), heads_q=3, head_dim=8, alibi=True, sinks=True)
    inputs = make_inputs(problem)
    assert inputs.q.shape == (1, 3, 2, 8)
    assert inputs.k.shape == (1, 3, 7, 8)
    assert inputs.cu_seqlens_q.tolist() == [0, 2, 2]
    assert inputs.cu_seqlens_k.tolist() == [0, 3, 7]
    assert inputs.cu_seqlens_q.dtype == torch.int32
    assert inputs.alibi_slopes.shape == inputs.sinks.shape == (3,)
    assert inputs.alibi_slopes.dtype == inputs.sinks.dtype == torch.float32


def test_keys_that_must_not_be_read_are_nan_and_all_others_are_not():
    problem = Problem(batch=3, seqlen_q=2, seqlen_k=10, head_dim=8, key_lengths=(0, 7, 10))
    inputs = make_inputs(problem)
    for b, length in enumerate(problem.key_lengths):
        for tensor in (inputs.k, inputs.v):
            assert tensor[b, :, :length].isfinite().all()
            assert tensor[b, :, length:].isnan().all()
    assert inputs.key_lengths.tolist() == [0, 7, 10]
    assert inputs.key_lengths.dtype == torch.int32


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_pages_hold_the_keys_of_the_dense_problem(page_size):
    dense = Problem(batch=3, heads_q=2, seqlen_q=2, seqlen_k=10, head_dim=8, key_lengths=(0, 7, 10))
    paged = dense.replace(page_size=page_size)
    inputs = make_inputs(paged)
    table = inputs.page_table
    assert table.dtype == torch.int32
    assert table.shape == (3, -(-10 // page_size))
    assert table.flatten().tolist() != list(range(table.numel()))
    used = 0
    for one, other in zip(
        sequences(make_inputs(dense), dense), sequences(inputs, paged), strict=True
    ):
        assert torch.equal(one.k, other.k)
        assert torch.equal(one.v, other.v)
        used += one.k.numel()
    assert int(inputs.k.isfinite().sum()) == used
    unread = inputs.k[table[1, -(-7 // page_size) :].long()]
    assert unread.isnan().all()


def test_incoming_gradients_are_made_when_asked_for():
    problem = Problem(batch=2, seqlen_q=5, head_dim=8, head_dim_v=16, dtype="bf16")
    assert make_inputs(problem).grad_out is None
    inputs = make_inputs(problem.replace(gradients=("v",)))
    assert inputs.grad_out.shape == (2, 1, 5, 16)
    assert inputs.grad_out.dtype == torch.bfloat16
    assert inputs.grad_lse is None
    inputs = make_inputs(problem.replace(gradients=("v",), lse_gradient=True))
    assert inputs.grad_lse.shape == (2, 1, 5)
    assert inputs.grad_lse.dtype == torch.float32


def test_keep_mask_keeps_what_dropout_leaves():
    problem = Problem(batch=2, heads_q=3, seqlen_q=50, seqlen_k=60, head_dim=8, dropout=0.25)
    kept = make_keep_mask(problem)
    assert kept.shape == (2, 3, 50, 60)
    assert abs(kept.double().mean() - 0.75) < 0.01
    assert make_inputs(problem).keep_mask is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distribution": "gaussian"}, "distribution='gaussian': unknown; known are duplicated, "),
        ({"mask": "holes"}, "mask='holes': unknown; known are alternate, "),
        ({"bias": "holes"}, "bias='holes': unknown; known are constant, "),
        ({"distribution": "normal:big"}, "the scale of the queries"),
        ({"distribution": "needles:2"}, "distribution='needles:2': needles takes no argument"),
    ],
)
def test_unknown_names_list_the_known_ones(change, message):
    with pytest.raises(ValueError, match=message):
        make_inputs(Problem(seqlen_q=4, head_dim=8, **change))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"distribution": "normal:4"}, True),
        ({"distribution": "normal:0.01"}, False),
        ({"distribution": "normal:100"}, False),
        ({"distribution": "normal:0"}, False),
        ({"scale": 0.0}, False),
        ({"scale": 1.0, "head_dim": 16}, True),
        ({"softcap": 0.1}, False),
        ({"distribution": "needles"}, False),
        ({"distribution": "outliers"}, False),
    ],
)
def test_which_problems_are_iid(change, expected):
    assert is_iid(Problem(**change)) is expected
