"""What does not fit is refused: the argument is named, with its value and what is accepted."""

import ast
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from triton_attention import arguments, attention, attention_v1
from triton_attention.arguments import Arguments

SOURCE = Path(arguments.__file__).read_text("utf-8")

B, HQ, HKV, SQ, SK, D, DV = 2, 4, 2, 5, 7, 8, 6
INT, BOOL, HALF = torch.int32, torch.bool, torch.float16


def fitting(**changes):
    """Arguments that fit, but for the changes."""
    q, k, v = torch.zeros(B, HQ, SQ, D), torch.zeros(B, HKV, SK, D), torch.zeros(B, HKV, SK, DV)
    return {"q": q, "k": k, "v": v} | changes


def packed(**changes):
    bounds = torch.tensor([0, 2, 4], dtype=INT)
    q, k, v = torch.zeros(1, HQ, SQ, D), torch.zeros(1, HKV, SK, D), torch.zeros(1, HKV, SK, DV)
    given = {"q": q, "k": k, "v": v, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    return given | {"max_seqlen_q": 2, "max_seqlen_k": 2} | changes


def paged(**changes):
    """Three pages of 4 keys for each of two sequences: room for 12."""
    table, lengths = torch.zeros(B, 3, dtype=INT), torch.zeros(B, dtype=INT)
    k, v = torch.zeros(9, HKV, 4, D), torch.zeros(9, HKV, 4, DV)
    return fitting(k=k, v=v, page_table=table, key_lengths=lengths) | changes


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def later(i, j, head, batch):
    """A mask rule without @triton.jit."""
    return j > i


ALL_OR_NONE = "go together: accepted is all of them or none"
COMPLAINTS = [
    (fitting(q="text"), "q is 'text': accepted is a tensor of four dimensions"),
    (
        fitting(q=empty(2, 3)),
        "q is torch.float32 (2, 3) on cpu: accepted is a tensor of four dimensions",
    ),
    (fitting(k=None), "k is None: accepted is a tensor of four dimensions"),
    (fitting(v=[1]), "v is [1]: accepted is a tensor of four dimensions"),
    (
        {n: t.double() for n, t in fitting().items()},
        "q has dtype torch.float64: accepted are torch.float32, torch.float16, torch.bfloat16",
    ),
    (
        fitting(k=empty(B, HKV, SK, D, dtype=HALF)),
        "k is torch.float16 on cpu: accepted is torch.float32 on cpu, as q",
    ),
    (
        fitting(v=torch.zeros(B, HKV, SK, DV, device="meta")),
        "v is torch.float32 on meta: accepted is torch.float32 on cpu, as q",
    ),
    (
        fitting(q=empty(B, HQ, SQ, 257), k=empty(B, HKV, SK, 257)),
        "q has head_dim 257: accepted is 1 to 256",
    ),
    (fitting(v=empty(B, HKV, SK, 0)), "v has head_dim 0: accepted is 1 to 256"),
    (fitting(v=empty(B, HKV, SK, 300)), "v has head_dim 300: accepted is 1 to 256"),
    (fitting(k=empty(B, HKV, SK, 9)), "k has head_dim 9: accepted is 8, as q"),
    (
        fitting(v=empty(B, HKV, 8, DV)),
        "v has shape (2, 2, 8, 6): accepted is (2, 2, 7) and any head_dim",
    ),
    (fitting(q=empty(B, 3, SQ, D)), "q has 3 heads: accepted is a multiple of 2, as k has"),
    (fitting(q=empty(B, 0, SQ, D)), "q has 0 heads: accepted is a multiple of 2, as k has"),
    (fitting(q=empty(3, HQ, SQ, D)), "k has batch 2: accepted is 3, as q"),
    (fitting(causal="left"), "causal='left': accepted are none, top-left, bottom-right"),
    (fitting(causal=True), "causal=True: accepted are none, top-left, bottom-right"),
    (fitting(scale=math.nan), "scale=nan: accepted is a finite number, or None"),
    (fitting(scale=math.inf), "scale=inf: accepted is a finite number, or None"),
    (fitting(softcap=-1.0), "softcap=-1.0: accepted is 0 (off) or more"),
    (fitting(scale="1"), "scale='1': accepted is a finite number, or None"),
    (fitting(softcap=None), "softcap=None: accepted is 0 (off) or more"),
    (fitting(window=3), "window=3: accepted is None or (left, right), each None or 0 or more"),
    (fitting(softcap=math.nan), "softcap=nan: accepted is 0 (off) or more"),
    (fitting(dropout_p=1.0), "dropout_p=1.0: accepted is a number in [0, 1)"),
    (fitting(dropout_p=-0.1), "dropout_p=-0.1: accepted is a number in [0, 1)"),
    (fitting(dropout_p=math.nan), "dropout_p=nan: accepted is a number in [0, 1)"),
    (
        fitting(window=(-1, 0)),
        "window=(-1, 0): accepted is None or (left, right), each None or 0 or more",
    ),
    (
        fitting(window=(1,)),
        "window=(1,): accepted is None or (left, right), each None or 0 or more",
    ),
    (fitting(mask_rule=3), "mask_rule=3: accepted is a function with @triton.jit, or None"),
    (fitting(mask_rule=later), "mask_rule=<function later at 0x"),
    (
        fitting(mask_rule=torch.nn.Identity()),
        "mask_rule=Identity(): accepted is a function with @triton.jit, or None",
    ),
    (
        fitting(alibi_slopes=torch.zeros(HQ, requires_grad=True)),
        "alibi_slopes requires a gradient, and has none: accepted is one that is detached",
    ),
    (
        fitting(key_lengths=empty(3, dtype=INT)),
        "key_lengths is torch.int32 (3,) on cpu: accepted is torch.int32 (2) on cpu",
    ),
    (
        fitting(key_lengths=empty(B, dtype=torch.int64)),
        "key_lengths is torch.int64 (2,) on cpu: accepted is torch.int32 (2) on cpu",
    ),
    (fitting(key_lengths=[1, 2]), "key_lengths is [1, 2]: accepted is torch.int32 (2) on cpu"),
    (
        paged(page_table=empty(3, 3, dtype=INT)),
        "page_table is torch.int32 (3, 3) on cpu: accepted is torch.int32 (2, any) on cpu",
    ),
    (paged(key_lengths=None), "key_lengths is missing: page_table needs it"),
    (
        packed(cu_seqlens_q=empty(3)),
        "cu_seqlens_q is torch.float32 (3,) on cpu: accepted is torch.int32 (any) on cpu",
    ),
    (
        packed(cu_seqlens_k=empty(3, 1, dtype=INT)),
        "cu_seqlens_k is torch.int32 (3, 1) on cpu: accepted is torch.int32 (any) on cpu",
    ),
    *((packed(**{name: None}), ALL_OR_NONE) for name in packed() if name not in ("q", "k", "v")),
    (fitting(max_seqlen_q=3), ALL_OR_NONE),
    (
        packed(cu_seqlens_k=empty(4, dtype=INT)),
        "cu_seqlens_k has another length than cu_seqlens_q: accepted is the same",
    ),
    (
        packed(cu_seqlens_q=empty(0, dtype=INT), cu_seqlens_k=empty(0, dtype=INT)),
        "cu_seqlens_q has no elements: accepted is one more than there are sequences",
    ),
    (packed(max_seqlen_q=-1), "max_seqlen_q is -1: accepted is an int of 0 or more"),
    (packed(max_seqlen_k=2.0), "max_seqlen_k is 2.0: accepted is an int of 0 or more"),
    (packed(max_seqlen_k="2"), "max_seqlen_k is '2': accepted is an int of 0 or more"),
    (
        packed(max_seqlen_q=torch.tensor(2)),
        "max_seqlen_q is torch.int64 () on cpu: accepted is an int of 0 or more",
    ),
    (
        packed(max_seqlen_q=np.ones(3, dtype=int)),
        "max_seqlen_q is array([1, 1, 1]): accepted is an int of 0 or more",
    ),
    (packed(max_seqlen_q=1), "max_seqlen_q=1: accepted is 2, the longest sequence, or more"),
    (packed(max_seqlen_k=0), "max_seqlen_k=0: accepted is 2, the longest sequence, or more"),
    (
        packed(**fitting()),
        "q has batch 2: accepted is 1 with cu_seqlens_q",
    ),
    (
        packed(key_lengths=empty(1, dtype=INT)),
        "key_lengths is given with cu_seqlens_q: accepted is one of them",
    ),
    (
        fitting(mask=empty(B, HQ, SQ, 6, dtype=BOOL)),
        "mask is torch.bool (2, 4, 5, 6) on cpu: accepted is torch.bool on cpu that "
        "broadcasts to "
        "(2, 4, 5, 7)",
    ),
    (
        fitting(mask=empty(SQ, SK, dtype=BOOL)),
        "mask is torch.bool (5, 7) on cpu: accepted is torch.bool on cpu that "
        "broadcasts to (2, 4, 5, 7)",
    ),
    (
        fitting(mask=empty(B, HQ, SQ, SK)),
        "mask is torch.float32 (2, 4, 5, 7) on cpu: accepted is torch.bool on cpu that "
        "broadcasts to",
    ),
    (
        fitting(bias=empty(B, HKV, SQ, SK)),
        "bias is torch.float32 (2, 2, 5, 7) on cpu: accepted is torch.float32 on cpu that "
        "broadcasts to",
    ),
    (
        fitting(bias=empty(B, HQ, SQ, SK, dtype=HALF)),
        "bias is torch.float16 (2, 4, 5, 7) on cpu: accepted is torch.float32 on cpu that "
        "broadcasts to",
    ),
    (
        fitting(mask=torch.ones(B, HQ, SQ, SK, dtype=BOOL, device="meta")),
        "mask is torch.bool (2, 4, 5, 7) on meta: accepted is torch.bool on cpu that broadcasts to",
    ),
    (
        paged(bias=empty(B, HQ, SQ, 13)),
        "bias is torch.float32 (2, 4, 5, 13) on cpu: accepted is torch.float32 on cpu that "
        "broadcasts to "
        "(2, 4, 5, 12)",
    ),
    (
        packed(mask=empty(1, 1, 2, 2, dtype=BOOL)),
        "mask is torch.bool (1, 1, 2, 2) on cpu: accepted is torch.bool on cpu that "
        "broadcasts to "
        "(1, 4, 5, 7)",
    ),
    (
        fitting(alibi_slopes=empty(HKV)),
        "alibi_slopes is torch.float32 (2,) on cpu: accepted is torch.float32 (4) on cpu",
    ),
    (
        fitting(sinks=empty(HQ, dtype=HALF)),
        "sinks is torch.float16 (4,) on cpu: accepted is torch.float32 (4) on cpu",
    ),
]


@pytest.mark.parametrize(("given", "said"), COMPLAINTS, ids=[said[:40] for _, said in COMPLAINTS])
def test_what_does_not_fit(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        attention(**given)


V1 = {"q", "k", "v", "causal", "scale"}


@pytest.mark.parametrize(
    ("given", "said"), [(given, said) for given, said in COMPLAINTS if set(given) <= V1]
)
def test_v1_complains_likewise(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        attention_v1(**given)


FITTING = [
    fitting(),
    packed(),
    packed(max_seqlen_q=np.int64(2), max_seqlen_k=900),
    packed(cu_seqlens_q=torch.zeros(1, dtype=INT), cu_seqlens_k=torch.zeros(1, dtype=INT)),
    paged(),
    fitting(causal="bottom-right", scale=-1, softcap=0, dropout_p=0, window=[None, 0]),
    fitting(mask=empty(1, HQ, 1, SK, dtype=BOOL), bias=empty(B, 1, SQ, 1), sinks=empty(HQ)),
    packed(mask=empty(1, 1, SQ, SK, dtype=BOOL)),
    paged(bias=empty(B, 1, SQ, 12), mask=empty(B, 1, SQ, 9, dtype=BOOL)),
    fitting(q=empty(0, HQ, SQ, D), k=empty(0, HKV, SK, D), v=empty(0, HKV, SK, DV)),
]


@pytest.mark.parametrize("given", FITTING)
def test_what_fits(given):
    Arguments(**given)


def test_rules_that_fit():
    """Device functions, interpreted where kernels are."""
    Arguments(**fitting(mask_rule=triton.jit(later)))
    Arguments(**fitting(mask_rule=JITFunction(later)))


def test_alibi_slopes_that_require_a_gradient_where_none_is_wanted(device):
    given = {name: tensor.to(device) for name, tensor in fitting().items()}
    slopes = torch.ones(HQ, device=device, requires_grad=True)
    with torch.no_grad():
        out = attention(**given, alibi_slopes=slopes)
    assert torch.equal(out, attention(**given, alibi_slopes=slopes.detach()))


def test_every_complaint_is_in_the_table():
    """Whatever the code yields as a sentence is what some row above is told."""
    told = []
    for given, _ in COMPLAINTS:
        with pytest.raises(ValueError, match=r"accepted (is|are)|needs it") as error:
            Arguments(**given)
        told.append(str(error.value))
    sentences = [node.value for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Yield)]
    assert len(sentences) > 20
    for sentence in sentences:
        parts = sentence.values if isinstance(sentence, ast.JoinedStr) else [sentence]
        constant = [re.escape(p.value) if isinstance(p, ast.Constant) else ".*" for p in parts]
        assert any(re.fullmatch("".join(constant), text) for text in told), ast.unparse(sentence)


@pytest.mark.parametrize("function", [attention, attention_v1])
def test_a_device_that_triton_cannot_run_on(function, device):
    given = {name: tensor.to("meta") for name, tensor in fitting().items()}
    with pytest.raises(RuntimeError, match=f"q is on meta: accepted is {device}"):
        function(**given)
