"""Mistakes of the backward pass alone, and gradients that ended up in the wrong place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from attn_reference.problem import Problem

from .blocks import Step
from .case import Case, Guess, mistake
from .masks import TILES


def has_gradients(problem: Problem) -> bool:
    """Whether a backward pass was asked for."""
    return bool(problem.gradients)


@mistake(has_gradients)
def delta_wrong(case: Case) -> Iterator[Guess]:
    """delta = rowsum(dO ∘ O) left out, or read from another row."""

    def omitted(step: Step) -> Step:
        return replace(step, delta=torch.zeros_like(step.delta))

    def shifted(step: Step) -> Step:
        return replace(step, delta=step.delta.roll(1, -1))

    yield "the gradient without delta = rowsum(dO ∘ O)", case.backward(omitted)
    yield "the gradient with delta taken from the row before", case.backward(shifted)


@mistake(has_gradients)
def lse_misread(case: Case) -> Iterator[Guess]:
    """P recomputed from an LSE in another base, or of another row."""

    def factor_of(step: Step, base: float) -> torch.Tensor:
        lse = case.truth["lse"][step.block.index]
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        return torch.exp(lse * (1 - base))[..., None]

    def base_2(step: Step) -> Step:
        return replace(step, p=step.p * factor_of(step, 1 / math.log(2)))

    def base_e(step: Step) -> Step:
        return replace(step, p=step.p * factor_of(step, math.log(2)))

    yield "the gradient with P recomputed from an LSE in base 2", case.backward(base_2)
    yield "the gradient with P recomputed from an LSE multiplied by ln 2", case.backward(base_e)


@mistake(has_gradients)
def rows_missing(case: Case) -> Iterator[Guess]:
    """dK and dV that miss the last query row, the first one, or an incomplete tile of rows."""

    def without(first: int, last: int, words: str) -> Guess:
        def edit(step: Step) -> Step:
            i, rows = step.block.i[:, 0], step.block.len_q
            seen = (i >= first) & (i < (rows - last if last >= 0 else rows // -last * -last))
            return replace(step, counts=step.counts * seen)

        answer = case.backward(edit)
        return f"the gradient without {words}", {
            name: value for name, value in answer.items() if name in ("dk", "dv")
        }

    yield without(0, 1, "the last query row")
    yield without(1, 0, "the first query row")
    for tile in TILES:
        if tile < case.problem.seqlen_q and case.problem.seqlen_q % tile:
            yield without(0, -tile, f"the query rows after the last whole tile of {tile}")


@mistake(lambda p: has_gradients(p) and p.group > 1)
def group_not_summed(case: Case) -> Iterator[Guess]:
    """dK and dV of one query head of the group, where their sum is right."""
    group = case.problem.group
    for member, words in ((0, "first"), (group - 1, "last")):

        def edit(step: Step, member: int = member) -> Step:
            counts = torch.zeros_like(step.counts)
            counts[member] = 1
            return replace(step, counts=counts)

        answer = case.backward(edit)
        yield (
            f"the gradient of the {words} query head of each group, not the sum over the group",
            {name: value for name, value in answer.items() if name in ("dk", "dv")},
        )
    mean = case.edited(lambda x: x / group, "dk", "dv")
    yield "the mean of the gradient over the group, not the sum", mean


@mistake(has_gradients)
def gradient_scaled(case: Case) -> Iterator[Guess]:
    """A factor of the gradient left out or applied twice."""
    scale = case.problem.softmax_scale
    if scale not in (0.0, 1.0):
        yield (
            "the gradient not multiplied by the scale",
            case.edited(lambda x: x / scale, "dq", "dk"),
        )
        words = "the gradient multiplied by the scale twice"
        yield words, case.edited(lambda x: x * scale, "dq", "dk", "dbias")
    for words, factor in (
        ("the gradient multiplied by ln 2", math.log(2)),
        ("the gradient multiplied by log2(e)", 1 / math.log(2)),
        ("twice the gradient", 2.0),
        ("half of the gradient", 0.5),
        ("the gradient with its sign turned", -1.0),
    ):
        edited = case.edited(lambda x, f=factor: x * f, "dq", "dk", "dv", "dbias", "dsinks")  # type: ignore[misc]
        yield words, edited


@mistake(has_gradients)
def gradient_misplaced(case: Case) -> Iterator[Guess]:
    """dK where dV belongs, or the reverse."""
    if not {"dk", "dv"} <= set(case.truth) or case.truth["dk"].shape != case.truth["dv"].shape:
        return
    if {"dk", "dv"} <= case.wanted:
        swapped = {"dk": case.truth["dv"], "dv": case.truth["dk"]}
        yield "each what the other should be", swapped
    for name, other in (("dk", "dv"), ("dv", "dk")):
        if name in case.wanted:
            yield f"what {other} should be", {name: case.truth[other]}


@mistake(lambda p: has_gradients(p) and p.softcap > 0)
def softcap_slope(case: Case) -> Iterator[Guess]:
    """The derivative of the softcap, 1 - tanh², left out."""

    def edit(step: Step) -> Step:
        return replace(step, slope=torch.ones_like(step.slope))

    yield "the gradient without the derivative of the softcap", case.backward(edit)


@mistake(lambda p: has_gradients(p) and p.lse_gradient)
def lse_gradient_wrong(case: Case) -> Iterator[Guess]:
    """The gradient that comes in through the LSE dropped, or subtracted."""

    def ignored(step: Step) -> Step:
        return replace(step, grad_lse=torch.zeros_like(step.grad_lse))

    def turned(step: Step) -> Step:
        return replace(step, grad_lse=-step.grad_lse)

    words = "the gradient with what comes in through the LSE ignored"
    yield words, case.backward(ignored)
    words = "the gradient with the sign of what comes in through the LSE turned"
    yield words, case.backward(turned)


@mistake(lambda p: has_gradients(p) and p.bias is not None)
def bias_not_summed(case: Case) -> Iterator[Guess]:
    """dBias of one batch entry, head or row where the bias broadcasts over them."""
    if "dbias" not in case.wanted or case.problem.packed is not None:
        return
    assert case.inputs.bias is not None
    shape = case.inputs.bias.shape
    full = (case.problem.batch, case.problem.heads_q, case.problem.seqlen_q)
    for dim, (size, name) in enumerate(
        zip(full, ("batch entry", "head", "query row"), strict=True)
    ):
        if shape[dim] > 1 or size < 2:
            continue

        def first_only(step: Step, dim: int = dim) -> Step:
            heads = torch.arange(
                step.block.head.query_heads.start, step.block.head.query_heads.stop
            )
            position = (
                torch.tensor(step.block.entry),
                heads[:, None, None],
                step.block.i[None],
            )[dim]
            return replace(step, p=step.p * (position == 0))

        answer = case.backward(first_only)
        words = f"the gradient of the first {name} alone, not summed over the broadcast bias"
        yield words, {"dbias": answer["dbias"]}
