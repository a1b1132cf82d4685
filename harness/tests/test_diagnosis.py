"""The diagnosis names the mistake behind a result, and names none where there is none."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from attn_reference.backward import gradients
from attn_reference.forward import attention
from attn_reference.inputs import Attention, Gradients, Inputs
from attn_reference.precision import FLASH
from attn_reference.problem import Problem
from attnproof.backend import Capabilities
from attnproof.diagnosis import explainer
from attnproof.diagnosis.case import MISTAKES
from attnproof.diagnosis.examine import diagnose
from attnproof.inputs.make import make_inputs
from attnproof.plan import CallResult
from attnproof.verdict import Status, Verdict

PLANTED = Path(__file__).parent / "planted"
DOCS = Path(__file__).parents[2] / "docs"


def answered(problem: Problem, inputs: Inputs) -> CallResult:
    """What a kernel that is right in its own way gives: the reference, rounded."""
    result = attention(inputs, problem, FLASH)
    given = gradients(inputs, problem, FLASH) if problem.gradients else None
    return CallResult(attention=result, gradients=given)


def diagnosed(problem: Problem, result: CallResult, inputs: Inputs | None = None) -> list[str]:
    return diagnose(problem, make_inputs(problem) if inputs is None else inputs, result, FLASH)


PLAIN = Problem(heads_q=2, seqlen_q=40, seqlen_k=70, head_dim=16, dtype="bf16")
SQUARE = PLAIN.replace(seqlen_q=70)
BACKWARD = PLAIN.replace(gradients=("q", "k", "v"), dtype="fp32")


def test_a_right_result_looks_like_nothing() -> None:
    problem = BACKWARD.replace(causal="bottom-right", softcap=5.0, alibi=True)
    assert diagnosed(problem, answered(problem, make_inputs(problem))) == []


@dataclass(frozen=True)
class Other:
    """A problem, and the problem that was computed in its place."""

    asked: Problem
    computed: Problem
    words: str

    def __str__(self) -> str:
        return self.words


OTHERS = [
    Other(PLAIN.replace(causal="top-left"), PLAIN.replace(causal="bottom-right"), "bottom-right"),
    Other(PLAIN.replace(causal="bottom-right"), PLAIN, "the causal mask ignored"),
    Other(
        PLAIN.replace(window=(9, 4)),
        PLAIN.replace(window=(8, 4)),
        "short on the left (8, 4, not 9, 4)",
    ),
    Other(
        PLAIN.replace(window=(9, 4)),
        PLAIN.replace(window=(8, 3)),
        "exclusive at both ends",
    ),
    Other(PLAIN.replace(window=(9, 4)), PLAIN, "the window ignored"),
    Other(PLAIN.replace(window=(9, 4)), PLAIN.replace(window=(4, 9)), "the window swapped"),
    Other(PLAIN.replace(softcap=2.0), PLAIN, "the softcap ignored"),
    Other(PLAIN, PLAIN.replace(scale=1.0), "the scale missing (1)"),
    Other(PLAIN, PLAIN.replace(scale=1 / 16), "the scale applied twice"),
    Other(PLAIN, PLAIN.replace(scale=0.255), "scale 1.02 times what was asked for"),
    Other(PLAIN, PLAIN.replace(scale=0.25 * math.log(2)), "2 in the exponent"),
    Other(PLAIN, PLAIN.replace(scale=0.25 / math.log(2)), "log2(e) in the exponent once too"),
    Other(PLAIN.replace(sinks=True), PLAIN, "the sinks ignored"),
    Other(PLAIN.replace(alibi=True), PLAIN, "ALiBi ignored"),
    Other(PLAIN.replace(bias="normal"), PLAIN, "the bias ignored"),
    Other(PLAIN.replace(mask="random"), PLAIN, "the boolean mask ignored"),
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_another_problem_is_named(other: Other) -> None:
    inputs = make_inputs(other.asked)
    given = replace(
        inputs,
        mask=inputs.mask if other.computed.mask else None,
        bias=inputs.bias if other.computed.bias else None,
        sinks=inputs.sinks if other.computed.sinks else None,
        alibi_slopes=inputs.alibi_slopes if other.computed.alibi else None,
    )
    said = diagnosed(other.asked, answered(other.computed, given))
    assert other.words in said[0]
    assert said[0].startswith("out and lse equal attention with ")


# More queries than keys: most rows see no key, and have no budget of their own to be compared in.
TALL = PLAIN.replace(seqlen_q=129, seqlen_k=33, causal="bottom-right")
NO_KEYS_SEEN = [
    Other(TALL, TALL.replace(causal="top-left"), "top-left causal alignment"),
    Other(TALL, TALL.replace(causal="none"), "the causal mask ignored"),
    Other(
        TALL.replace(causal="top-left", window=(2, 0)),
        TALL.replace(causal="top-left", window=(3, 0)),
        "the window one key long on the left (3, 0, not 2, 0)",
    ),
    # As good a name as the mask ignored.
    Other(PLAIN.replace(mask="nothing"), PLAIN, "the boolean mask inverted"),
]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("other", NO_KEYS_SEEN, ids=str)
def test_a_mistake_is_named_where_the_right_answer_sees_no_key(other: Other, dtype: str) -> None:
    asked, computed = (p.replace(dtype=dtype) for p in (other.asked, other.computed))
    inputs = make_inputs(asked)
    given = replace(inputs, mask=inputs.mask if computed.mask else None)
    said = diagnosed(asked, answered(computed, given), inputs)
    assert said[0].startswith("out and lse equal attention with ")
    assert other.words in said[0]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_its_gradients_are_named_too(dtype: str) -> None:
    """dq of the first query, of a single key, is zero but for its rounding."""
    problem = TALL.replace(dtype=dtype, gradients=("q", "k", "v"))
    inputs = make_inputs(problem)
    said = diagnosed(problem, answered(problem.replace(causal="top-left"), inputs), inputs)
    assert said == [
        "out, lse, dq, dk and dv equal attention with top-left causal alignment "
        "(bottom-right was asked for)"
    ]


def test_a_little_noise_where_no_key_is_seen_looks_like_nothing() -> None:
    problem = TALL.replace(dtype="fp32")
    result = answered(problem, make_inputs(problem))
    assert result.attention is not None
    result.attention.out[:, :, :96] += 1e-8
    assert diagnosed(problem, result) == []


@dataclass(frozen=True)
class Misread:
    """A problem, and the inputs that were computed with in place of its own."""

    problem: Problem
    edit: Callable[[Inputs], Inputs]
    words: str

    def __str__(self) -> str:
        return self.words


def on(name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: replace(inputs, **{name: edit(getattr(inputs, name))})


MISREADS = [
    Misread(SQUARE.replace(mask="random"), on("mask", lambda x: ~x), "the boolean mask inverted"),
    Misread(
        SQUARE.replace(mask="random"), on("mask", lambda x: x.mT), "the boolean mask transposed"
    ),
    Misread(SQUARE.replace(bias="normal"), on("bias", lambda x: -x), "the sign of the bias turned"),
    Misread(SQUARE.replace(alibi=True), on("alibi_slopes", lambda x: -x), "sign of ALiBi turned"),
    Misread(
        SQUARE.replace(sinks=True), on("sinks", lambda x: x + math.log(2)), "sinks counted twice"
    ),
    Misread(SQUARE, lambda i: replace(i, k=i.v, v=i.k), "k and v swapped"),
    Misread(SQUARE, on("v", lambda x: x.roll(1, 2)), "the row of v before the key's own"),
    Misread(
        SQUARE.replace(batch=2),
        lambda i: replace(i, k=i.k[:1].expand_as(i.k), v=i.v[:1].expand_as(i.v)),
        "the keys and values of the first batch entry used for all",
    ),
]


@pytest.mark.parametrize("misread", MISREADS, ids=str)
def test_misread_inputs_are_named(misread: Misread) -> None:
    inputs = make_inputs(misread.problem)
    said = diagnosed(misread.problem, answered(misread.problem, misread.edit(inputs)), inputs)
    assert misread.words in said[0]


def test_heads_mapped_by_modulo_are_named_with_their_gradients() -> None:
    problem = BACKWARD.replace(heads_q=6, heads_kv=3)
    inputs = make_inputs(problem)
    wrong = torch.tensor([h % 3 for h in range(6)])
    spread = problem.replace(heads_kv=6)
    result = answered(spread, replace(inputs, k=inputs.k[:, wrong], v=inputs.v[:, wrong]))
    assert result.gradients is not None
    for name in ("k", "v"):
        per_head = getattr(result.gradients, name)
        folded = torch.zeros_like(per_head[:, :3]).index_add_(1, wrong, per_head)
        setattr(result.gradients, name, folded)
    said = diagnosed(problem, result, inputs)
    assert said[0] == (
        "out, lse, dq, dk and dv equal attention with query head h reading kv head h % heads_kv "
        "(not h // group)"
    )


def edited(problem: Problem, **edits: Callable[[torch.Tensor], torch.Tensor]) -> CallResult:
    """The right result with some tensors changed afterwards."""
    right = answered(problem, make_inputs(problem))
    assert right.attention is not None
    named = {"out": right.attention.out, "lse": right.attention.lse}
    if right.gradients is not None:
        named |= {f"d{name}": tensor for name, tensor in right.gradients.tensors().items()}
    changed = {n: edits[n](t) if n in edits else t for n, t in named.items() if t is not None}
    return CallResult(
        attention=Attention(out=changed.pop("out"), lse=changed.pop("lse")),
        gradients=Gradients(**{n[1:]: t for n, t in changed.items()}) if changed else None,
    )


AFTERWARDS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = [
    ("lse", lambda x: x / math.log(2), "lse equals the LSE in base 2"),
    ("lse", lambda x: x * 4, "lse equals the LSE divided by the scale"),
    ("out", torch.zeros_like, "out equals zeros"),
    ("out", lambda x: torch.full_like(x, math.nan), "out equals NaN, as memory that was never"),
    ("out", lambda x: torch.full_like(x, 0.25), "out equals 0.25 in every element"),
    ("out", lambda x: x.roll(1, 2), "out equals the right values of the row before"),
    ("out", lambda x: 1.5 * x, "out equals 1.5 times what it should be"),
    ("dq", lambda x: 4 * x, "dq equals the gradient not multiplied by the scale"),
    ("dq", lambda x: -x, "dq equals the gradient with its sign turned"),
]


@pytest.mark.parametrize(("tensor", "edit", "sentence"), AFTERWARDS, ids=[a[2] for a in AFTERWARDS])
def test_results_changed_afterwards_are_named(
    tensor: str, edit: Callable[[torch.Tensor], torch.Tensor], sentence: str
) -> None:
    assert diagnosed(BACKWARD, edited(BACKWARD, **{tensor: edit}))[0].startswith(sentence)


@pytest.mark.parametrize("wrong", ["out", "dv"])
def test_dropout_that_is_not_made_up_for_is_named(wrong: str) -> None:
    """Whatever else is right: the LSE knows nothing of dropout."""
    problem = BACKWARD.replace(dropout=0.5)
    inputs = make_inputs(problem)
    generator = torch.Generator().manual_seed(0)
    inputs.keep_mask = torch.rand(1, 2, 40, 70, generator=generator) >= 0.5
    told = attention(inputs, problem)
    found = gradients(inputs, problem)
    (found.v if wrong == "dv" else told.out).mul_(0.5)
    told.out, told.lse = told.out.float(), told.lse.float()
    for name in ("q", "k", "v"):
        setattr(found, name, getattr(found, name).float())
    said = diagnosed(problem, CallResult(attention=told, gradients=found), inputs)
    assert any("whose dropout does not divide by 1 - p" in one for one in said)


def test_a_diagnosis_that_fails_leaves_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("lse")

    monkeypatch.setattr(explainer, "examine", broken)
    subject = SimpleNamespace(
        precision=FLASH, description=SimpleNamespace(capabilities=Capabilities()), last_plan=None
    )
    verdict = Verdict(status=Status.DEVIATES, reason="out is wrong")
    inputs = make_inputs(PLAIN)
    explainer.Explainer(subject)(PLAIN, inputs, answered(PLAIN, inputs), verdict)
    assert verdict.status is Status.DEVIATES
    assert verdict.reason == "out is wrong; the diagnosis failed: KeyError: 'lse'"


def test_swapped_gradients_are_named() -> None:
    right = answered(BACKWARD, make_inputs(BACKWARD))
    assert right.gradients is not None
    right.gradients.k, right.gradients.v = right.gradients.v, right.gradients.k
    assert diagnosed(BACKWARD, right) == ["dk and dv equal each what the other should be"]


def test_a_mistake_in_some_rows_says_in_which_share() -> None:
    def tail_forgotten(out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, :, 32:] = 0
        return out

    said = diagnosed(PLAIN, edited(PLAIN, out=tail_forgotten))
    assert said == ["out equals zeros, in the rows that deviate (16 of 80)"]


def test_noise_looks_like_nothing() -> None:
    def noisy(out: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return out + 0.1 * torch.randn(out.shape, generator=generator).to(out.dtype)

    assert diagnosed(PLAIN, edited(PLAIN, out=noisy)) == []


def test_an_earlier_call_is_recognised() -> None:
    first, second = PLAIN.replace(scale=0.5), PLAIN.replace(scale=0.1, seed=1)
    inputs = make_inputs(second)
    kept = answered(second.replace(scale=0.5), inputs)
    earlier = [(first, make_inputs(first))]
    said = diagnose(second, inputs, kept, FLASH, earlier=earlier)
    assert said[0] == "out and lse equal attention with the scale of an earlier call"
    stale = answered(*earlier[0])
    assert diagnose(second, inputs, stale, FLASH, earlier=earlier)[0] == (
        "out and lse equal the answer of an earlier call"
    )


def test_packed_sequences_read_as_one_are_named() -> None:
    problem = PLAIN.replace(packed=((3, 5), (20, 30), (9, 2)))
    inputs = make_inputs(problem)
    unsplit = replace(inputs, cu_seqlens_q=None, cu_seqlens_k=None)
    together = answered(problem.replace(packed=((32, 37),)), unsplit)
    assert diagnosed(problem, together, inputs) == [
        "out and lse equal attention over all packed sequences as if they were one"
    ]


def test_an_earlier_call_may_have_been_larger() -> None:
    first = PLAIN.replace(batch=3, seqlen_q=90, window=(2, 2))
    second = PLAIN.replace(window=(9, 9))
    inputs = make_inputs(second)
    kept = answered(second.replace(window=(2, 2)), inputs)
    said = diagnose(second, inputs, kept, FLASH, earlier=[(first, make_inputs(first))])
    assert said[0] == "out and lse equal attention with the window of an earlier call"


def test_long_problems_are_looked_at_around_the_worst_row() -> None:
    problem = Problem(seqlen_q=1500, seqlen_k=1500, head_dim=8, dtype="fp32", causal="top-left")
    inputs = make_inputs(problem)
    said = diagnosed(problem, answered(problem.replace(causal="none"), inputs), inputs)
    assert said[0] == "out and lse equal attention with the causal mask ignored"


def test_problems_too_large_to_try_everything_on_are_left_alone() -> None:
    problem = Problem(seqlen_q=8192, seqlen_k=8192, head_dim=8)
    nothing = CallResult(attention=Attention(out=torch.zeros(1, 1, 8192, 8)))
    assert diagnosed(problem, nothing) == []


# What the diagnosis says of the kernels with one planted fault each. Faults that are no
# computation of their own (rounding, memory, cheats) are not here.
OF_THE_PLANTED: dict[str, tuple[str, str]] = {
    "scale_two_percent_off": ("", "scale 1.02 times what was asked for"),
    "exp2_without_log2e": ("", "2 in the exponent in place of e"),
    "last_key_dropped": ("", "without the last key"),
    "last_tile_not_rescaled": ("dist=rising", "accumulator not rescaled at the last tile"),
    "padded_keys_counted": ("", "also counts zero keys (57, padding to tiles of 64)"),
    "window_left_exclusive": (
        "window=5,0",
        "one key short on the left (4, 0, not 5, 0)",
    ),
    "window_right_plus_one": (
        "window=5,0",
        "one key long on the right (5, 1, not 5, 0)",
    ),
    "bottom_right_for_top_left": ("causal=top-left", "bottom-right causal alignment"),
    "top_left_in_backward": ("causal=bottom-right_grad=q,k,v", "top-left causal alignment"),
    "causal_ignored_in_backward": ("causal=top-left_grad=q,k,v", "the causal mask ignored"),
    "mask_polarity": ("mask=random@bhqk", "the boolean mask inverted"),
    "softcap_after_mask": ("causal=top-left_softcap=5", "the softcap applied after the mask"),
    "bias_row_stride_lost_in_mqa": ("bias=normal@bhqk", "bias of the first query row"),
    "alibi_distance_off_by_one": ("alibi", "the ALiBi distance off by one (i + 1 - j)"),
    "alibi_sign": ("alibi", "the sign of ALiBi turned"),
    "sink_per_tile": ("sinks", "the sinks counted once per tile of 64 keys (3 times)"),
    "fully_masked_rows_nan": ("mask=empty-rows@bhqk", "0/0 (NaN) in rows that see no key"),
    "hidden_first_tile_nan": ("mask=first-tile@bhqk", "exp(-inf - -inf) (NaN) in rows"),
    "head_by_modulo": ("", "query head h reading kv head h % heads_kv"),
    "head_tile_crosses_group": ("", "pairs of query heads reading the kv head of the first"),
    "lse_in_base_two": ("", "the LSE in base 2"),
    "dk_of_last_query_missing": ("grad=q,k,v", "dk equals the gradient without the last query"),
    "delta_omitted": ("grad=q,k,v", "the gradient without delta"),
    "grad_out_assumed_contiguous": (
        "grad=q,k,v_layout=grad-out:bshd",
        "grad_out read as if it were contiguous",
    ),
    "out_read_with_strides_of_grad_out": (
        "grad=q,k,v_layout=grad-out:bshd",
        "the gradient with out read with the strides of grad_out",
    ),
    "zeros_always": ("", "out and lse equal zeros"),
}
HEADS = {"head_by_modulo": "h4x2", "head_tile_crosses_group": "h6x2"}
MQA = "bias_row_stride_lost_in_mqa"


@pytest.fixture(scope="module")
def faulty() -> ModuleType:
    sys.path.insert(0, str(PLANTED))
    try:
        import faulty
    finally:
        sys.path.remove(str(PLANTED))
    return faulty


@pytest.mark.parametrize("fault", OF_THE_PLANTED)
def test_planted_faults_are_named(faulty: ModuleType, fault: str) -> None:
    features, words = OF_THE_PLANTED[fault]
    heads = HEADS.get(fault, "h2x1" if fault == MQA else "h2x2")
    keys = 128 if fault == "last_tile_not_rescaled" else 135
    text = f"b1_{heads}_q70_k{keys}_d32_fp32" + (f"_{features}" if features else "")
    problem = Problem.from_id(text)
    inputs = make_inputs(problem)
    said = diagnosed(problem, called(getattr(faulty, fault), problem), inputs)
    assert said, "nothing was named"
    assert words in said[0]


def called(
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]], problem: Problem
) -> CallResult:
    """Call a planted kernel as the harness would, grad_out in the layout asked for."""
    inputs = make_inputs(problem)
    leaves = {n: getattr(inputs, n).requires_grad_() for n in problem.gradients}
    out, lse = attend(
        inputs.q,
        inputs.k,
        inputs.v,
        scale=problem.scale,
        causal=problem.causal,
        window=problem.window,
        softcap=problem.softcap,
        mask=inputs.mask,
        bias=inputs.bias,
        alibi_slopes=inputs.alibi_slopes,
        sinks=inputs.sinks,
        return_lse=True,
    )
    grads = None
    if leaves:
        assert inputs.grad_out is not None
        incoming = inputs.grad_out
        if problem.layout("grad_out") == "bshd":
            incoming = incoming.transpose(1, 2).contiguous().transpose(1, 2)
        found = torch.autograd.grad(out, list(leaves.values()), incoming)
        grads = Gradients(**dict(zip(leaves, found, strict=True)))
    return CallResult(attention=Attention(out=out.detach(), lse=lse.detach()), gradients=grads)


def test_the_documentation_has_every_mistake_of_the_table() -> None:
    text = " ".join((DOCS / "diagnosis.md").read_text(encoding="utf-8").split())
    for entry in MISTAKES:
        about = " ".join((entry.guesses.__doc__ or "").split())
        assert f"| {entry.guesses.__name__} | {about} |" in text, entry.guesses.__name__


def test_every_mistake_of_the_table_makes_sense_for_some_problem() -> None:
    problems = [
        PLAIN,
        BACKWARD.replace(heads_q=4, heads_kv=2, batch=2, causal="top-left", softcap=3.0),
        BACKWARD.replace(lse_gradient=True, bias="normal", bias_shape="11qk", alibi=True),
        PLAIN.replace(window=(3, 3), mask="random", causal="bottom-right", dropout=0.1),
        PLAIN.replace(sinks=True, key_lengths=(50,), layouts=(("q", "bshd"),)),
        PLAIN.replace(packed=((3, 5), (20, 30))),
    ]
    for entry in MISTAKES:
        assert any(entry.applies(problem) for problem in problems), entry.guesses.__name__
