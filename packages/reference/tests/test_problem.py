"""Problem: one form for every value, an id that rebuilds it, and clear refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attn_reference import FEATURES, Problem
from attn_reference.problem import CAUSAL_ALIGNMENTS, DTYPES, GRADIENT_NAMES

sizes = st.integers(0, 300)
dims = st.integers(1, 256)
names = st.from_regex(r"[a-z0-9][a-z0-9.+:-]{0,8}", fullmatch=True)
shapes = st.from_regex(r"[b1][h1][q1][k1]", fullmatch=True)
finite = st.floats(allow_nan=False, allow_infinity=False)
side = st.none() | st.integers(0, 99)
layouts = st.dictionaries(
    st.sampled_from(["q", "k", "v", "mask", "grad_out", "page_table"]),
    st.sampled_from(["bshd", "sbhd+offset", "bhds+gap", "bhqk+expand"]),
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    kv, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    values = {
        "batch": draw(st.integers(0, 4)),
        "heads_q": kv * group,
        "heads_kv": kv,
        "seqlen_q": draw(sizes),
        "seqlen_k": draw(sizes),
        "head_dim": draw(dims),
        "head_dim_v": draw(st.none() | dims),
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "scale": draw(st.none() | finite),
        "causal": draw(st.sampled_from(CAUSAL_ALIGNMENTS)),
        "window": draw(st.none() | st.tuples(side, side)),
        "softcap": draw(st.floats(0, 1e6)),
        "alibi": draw(st.booleans()),
        "mask": draw(st.none() | names),
        "mask_shape": draw(shapes),
        "bias": draw(st.none() | names),
        "bias_shape": draw(shapes),
        "sinks": draw(st.booleans()),
        "dropout": draw(st.floats(0, 1, exclude_max=True)),
        "lse_gradient": draw(st.booleans()),
        "layouts": tuple(draw(layouts).items()),
        "distribution": draw(names),
        "seed": draw(st.integers()),
    }
    cut = draw(st.sampled_from(["", "lengths", "packed", "paged"]))
    if cut == "lengths":
        lengths = st.integers(0, values["seqlen_k"])
        values["key_lengths"] = draw(st.tuples(*[lengths] * values["batch"]))
    if cut == "packed":
        values["packed"] = tuple(draw(st.lists(st.tuples(sizes, sizes), max_size=4)))
    if cut == "paged":
        values["page_size"] = draw(st.integers(1, 256))
    allowed = [
        name
        for name in GRADIENT_NAMES
        if not (name in "kv" and cut == "paged") and values.get(name, True)
    ]
    values["gradients"] = tuple(draw(st.sets(st.sampled_from(allowed))))
    return Problem(**values)


@settings(deadline=None)
@given(problems())
@example(Problem(scale=-0.5, window=(None, 0), seed=-1))
@example(Problem(packed=()))
@example(Problem(batch=0, key_lengths=()))
@example(Problem(layouts=(("grad_out", "bshd"), ("page_table", "bhsd+offset"))))
def test_the_id_rebuilds_the_problem(problem):
    rebuilt = Problem.from_id(problem.id)
    assert rebuilt == problem
    assert rebuilt.id == problem.id
    assert hash(rebuilt) == hash(problem)


@settings(deadline=None)
@given(problems())
def test_features_come_from_the_list(problem):
    assert list(problem.features) == [name for name in FEATURES if name in problem.features]


def test_ids_stay_what_they_are():
    """Written down in reports and golden files: a change here breaks those."""
    assert Problem().id == "b1_h1x1_q64_k64_d64_fp32"
    assert (
        Problem(
            batch=2,
            heads_q=6,
            heads_kv=2,
            seqlen_q=33,
            seqlen_k=65,
            head_dim=64,
            head_dim_v=32,
            dtype="bf16",
            scale=0.125,
            causal="bottom-right",
            window=(17, None),
            softcap=30.0,
            alibi=True,
            mask="random",
            mask_shape="b1qk",
            bias="normal",
            sinks=True,
            key_lengths=(65, 3),
            dropout=0.25,
            gradients=("v", "q"),
            lse_gradient=True,
            layouts=(("v", "bshd"), ("q", "bshd+offset")),
            distribution="needles:2",
            seed=7,
        ).id
        == "b2_h6x2_q33_k65_d64_dv32_bf16_scale=0.125_causal=bottom-right_window=17,inf"
        "_softcap=30_alibi_mask=random@b1qk_bias=normal@bhqk_sinks_lens=65,3_dropout=0.25"
        "_grad=q,v_dlse_layout=q:bshd+offset,v:bshd_dist=needles:2_seed=7"
    )
    packed = Problem(packed=((3, 4), (0, 2)), heads_q=4, heads_kv=2, head_dim=8, page_size=None)
    assert packed.id == "packed=3x4,0x2_h4x2_d8_fp32"


def test_what_follows_from_other_values():
    plain = Problem(seqlen_q=5, heads_q=6, head_dim=16)
    assert (plain.keys, plain.kv_heads, plain.value_dim, plain.group) == (5, 6, 16, 1)
    assert plain.softmax_scale == 0.25
    assert Problem(scale=0.3).softmax_scale == 0.3
    packed = Problem(packed=[[3, 9], [8, 2]])
    assert (packed.batch, packed.seqlen_q, packed.seqlen_k) == (2, 8, 9)
    assert packed.replace(packed=((1, 1),)).batch == 1
    assert Problem(mask_shape="11qk") == Problem()
    assert Problem(gradients=["v", "q"]).gradients == ("q", "v")
    assert Problem(layouts=(("v", "bshd"), ("q", "sbhd"))).layout("q") == "sbhd"
    assert Problem().layout("q") == "bhsd"


def test_a_problem_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Problem().batch = 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batch": -1}, "batch=-1: accepted is 0 or more"),
        ({"seqlen_q": -1}, "seqlen_q=-1: accepted is 0 or more"),
        ({"seqlen_k": -2}, "seqlen_k=-2: accepted is 0 or more"),
        ({"heads_q": 0}, "heads_q=0: accepted is 1 or more"),
        ({"heads_kv": 0}, "heads_kv=0: accepted is 1 or more"),
        ({"head_dim": 0}, "head_dim=0: accepted is 1 or more"),
        ({"head_dim_v": 0}, "head_dim_v=0: accepted is 1 or more"),
        ({"heads_q": 3, "heads_kv": 2}, "heads_q=3: accepted is a multiple of heads_kv=2"),
        ({"batch": 2.5}, "batch=2.5: accepted is an integer"),
        ({"seqlen_q": None}, "seqlen_q=None: accepted is an integer"),
        ({"heads_q": True}, "heads_q=True: accepted is an integer"),
        ({"page_size": "2"}, "page_size='2': accepted is an integer"),
        ({"softcap": "30"}, "softcap='30': accepted is a number"),
        ({"dropout": None}, "dropout=None: accepted is a number"),
        ({"alibi": 1}, "alibi=1: accepted is True or False"),
        ({"dtype": "fp8"}, "dtype='fp8': accepted is fp64, fp32, fp16, bf16"),
        ({"scale": math.inf}, "scale=inf: accepted is a finite number, or None"),
        ({"scale": math.nan}, "scale=nan: accepted is a finite number, or None"),
        ({"causal": True}, "causal=True: accepted is none, top-left, bottom-right"),
        ({"window": (1,)}, r"window=\(1,\): accepted is None or \(left, right\)"),
        ({"window": (-1, -1)}, r"window=\(-1, -1\): accepted is None or \(left, right\)"),
        ({"window": (1.5, 0)}, r"window=\(1.5, 0\): accepted is None or \(left, right\)"),
        ({"softcap": -1.0}, r"softcap=-1.0: accepted is 0 \(off\) or more"),
        ({"softcap": math.inf}, r"softcap=inf: accepted is 0 \(off\) or more"),
        ({"dropout": 1.0}, r"dropout=1.0: accepted is a number in \[0, 1\)"),
        ({"dropout": math.nan}, r"dropout=nan: accepted is a number in \[0, 1\)"),
        ({"mask": "A b"}, "mask='A b': accepted is the name of a pattern, lower case"),
        ({"bias": ""}, "bias='': accepted is the name of a pattern, lower case"),
        ({"distribution": None}, "distribution=None: accepted is the name of a pattern"),
        ({"mask": "x", "mask_shape": "qk"}, "mask_shape='qk': accepted is bhqk with a 1"),
        ({"bias": "x", "bias_shape": "bkqh"}, "bias_shape='bkqh': accepted is bhqk with a 1"),
        ({"page_size": 0}, "page_size=0: accepted is None or 1 or more"),
        ({"batch": 2, "key_lengths": (3,)}, r"key_lengths=\(3,\): accepted is 2 lengths"),
        ({"key_lengths": (65,)}, r"key_lengths=\(65,\): .*each 0 to 64 \(seqlen_k\)"),
        ({"key_lengths": (-1,)}, r"key_lengths=\(-1,\): .*each 0 to 64"),
        ({"key_lengths": (1.0,)}, r"key_lengths=\(1.0,\): .*each 0 to 64"),
        (
            {"packed": ((1, 1),), "key_lengths": (1,)},
            r"key_lengths=\(1,\): accepted is None when packed is given",
        ),
        (
            {"packed": ((1, 1),), "page_size": 4},
            "page_size=4: accepted is None when packed is given",
        ),
        ({"packed": ((1, 2, 3),)}, r"packed=\(\(1, 2, 3\),\): accepted is a pair \(len_q, len_k\)"),
        ({"packed": 3}, r"packed=3: accepted is a pair \(len_q, len_k\)"),
        ({"packed": ((1, 2.5),)}, r"packed=\(\(1, 2.5\),\): accepted is a pair"),
        ({"packed": ((4, 4), (-1, 3))}, r"packed=\(\(4, 4\), \(-1, 3\)\): accepted is a pair"),
        ({"gradients": ("q", "w")}, r"gradients=\('q', 'w'\): unknown \['w'\]; accepted are q, k"),
        (
            {"gradients": ("k",), "page_size": 4},
            r"gradients=\('k',\): accepted is without k and v when page_size is given",
        ),
        ({"gradients": ("bias",)}, r"gradients=\('bias',\): accepted is bias needs a bias"),
        ({"gradients": ("sinks",)}, r"gradients=\('sinks',\): accepted is sinks needs sinks=True"),
        ({"layouts": ("q", "k")}, r"layouts=\('q', 'k'\): accepted is pairs of a tensor's name"),
        ({"layouts": (("q", "b_s"),)}, r"layouts=\(\('q', 'b_s'\),\): accepted is a pair of name"),
        ({"layouts": (("q", "bshd"), ("q", "bhsd"))}, "for each tensor at most"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        Problem(**values)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "''"),
        ("b1_h1x1_q4_k4_d8_fp32_wrong", "'wrong'"),
        ("b1_h1_q4_k4_d8_fp32", "'h1'"),
        ("b1_h1x1_q4_k4_d8_fp32_window=3", "'window=3'"),
        ("b1_h1x1_q4_k4_d8_fp32_scale=x", "'scale=x'"),
        ("b1_h1x1_q4_k4_d8_fp32_softcap", "'softcap'"),
        ("packed=3_h1x1_d8_fp32", "'packed=3'"),
    ],
)
def test_an_id_that_is_not_understood(text, part):
    with pytest.raises(ValueError, match=f"part {part} is not understood"):
        Problem.from_id(text)


def test_an_id_of_an_impossible_problem():
    with pytest.raises(ValueError, match="dtype='fp8'"):
        Problem.from_id("b1_h1x1_q4_k4_d8_fp8")
