"""Results that are no attention, or the right one in the wrong place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..layout import parse_layout, strides_for
from .blocks import Step
from .case import Case, Guess, Stage, mistake


def _each(case: Case, edit: object) -> dict[str, Tensor]:
    return case.edited(edit, *case.wanted)  # type: ignore[arg-type]


@mistake(stage=Stage.CONCLUSIVE)
def constant(case: Case) -> Iterator[Guess]:
    """Zeros, or another constant in every element."""
    yield "zeros", _each(case, torch.zeros_like)
    for name, actual in case.actual.items():
        if name in case.wanted and actual.numel() > 1:
            value = actual.flatten()[0]
            if bool((actual == value).all()) and value != 0:
                yield f"{value.item():g} in every element", {name: actual}


@mistake()
def never_written(case: Case) -> Iterator[Guess]:
    """NaN in every element: memory that the target got and did not write is NaN here."""
    nan = _each(case, lambda x: torch.full_like(x, torch.nan))
    yield "NaN, as memory that was never written", nan


@mistake()
def misplaced(case: Case) -> Iterator[Guess]:
    """The right numbers in another order."""

    def swapped(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape) if x.dim() >= 3 else x

    yield "the right values in (batch, seqlen, heads) order", _each(case, swapped)
    for shift, words in ((1, "before"), (-1, "after")):
        moved = _each(case, lambda x, s=shift: x.roll(s, 2) if x.dim() > 2 else x)
        yield f"the right values of the row {words}", moved
    for shift, words in ((1, "before"), (-1, "after")):
        moved = _each(case, lambda x, s=shift: x.roll(s, 1) if x.dim() > 1 else x)
        yield f"the right values of the head {words}", moved
    yield (
        "the right values of the first head in all",
        _each(case, lambda x: x[:, :1].expand_as(x) if x.dim() > 1 else x[:1].expand_as(x)),
    )


def _reread(tensor: Tensor, layout: str) -> Tensor:
    """The memory of ``tensor`` in that layout, read as if it were contiguous."""
    strides, extent, _ = strides_for(tensor.shape, layout)
    memory = tensor.new_zeros(max(extent, tensor.numel()))
    memory.as_strided(tensor.shape, strides).copy_(tensor)
    return memory[: tensor.numel()].view(tensor.shape)


@mistake(lambda p: bool(p.layouts))
def strides_ignored(case: Case) -> Iterator[Guess]:
    """A tensor read as if it were contiguous, or O read with the strides of dO."""
    for name, layout in case.problem.layouts:
        tensor = getattr(case.inputs, name, None)
        if tensor is None or tensor.dim() != 4 or parse_layout(layout).far:
            continue
        wrong = replace(case.inputs, **{name: _reread(tensor, layout)})
        words = f"attention with {name} read as if it were contiguous (its layout is {layout})"
        yield words, case.attention(inputs=wrong)
        if name == "grad_out":
            strides = strides_for(tensor.shape, layout)[0]
            out = case.truth["out"].contiguous()
            memory = torch.cat([out.flatten(), out.new_zeros(out.numel())])
            misread = memory.as_strided(out.shape, strides)

            def edit(step: Step, misread: Tensor = misread) -> Step:
                rows = step.block.chunk.rows
                given = step.block.head.sequence.grad_out
                assert given is not None
                grad_out = given[step.block.head.query_heads, rows].double()
                return replace(step, delta=(grad_out * misread[step.block.index]).sum(-1))

            words = "the gradient with out read with the strides of grad_out"
            yield words, case.backward(edit)


@mistake(stage=Stage.LAST_RESORT)
def off_by_a_factor(case: Case) -> Iterator[Guess]:
    """A constant factor, fitted by least squares."""
    for name in sorted(case.wanted):
        truth, actual = case.truth[name], case.actual[name]
        usable = truth.isfinite() & actual.isfinite()
        x, y = truth[usable], actual[usable]
        square = x.square().sum().item()
        if square:
            factor = ((x * y).sum() / square).item()
            yield f"{factor:.4g} times what it should be", {name: factor * truth}


@mistake(stage=Stage.LAST_RESORT)
def scale_off_by_a_factor(case: Case) -> Iterator[Guess]:
    """Another softmax scale, fitted by least squares: a coarse search, then Gauss-Newton."""
    scale = case.problem.softmax_scale
    if not scale:
        return
    name = next(n for n in ("out", "lse", "dv", "dq", "dk", "dbias", "dsinks") if n in case.wanted)
    actual = case.actual[name]

    def at(factor: float) -> Tensor:
        return case.changed(scale=scale * factor)[name]

    def distance(value: Tensor) -> float:
        return (value - actual).nan_to_num(posinf=0.0, neginf=0.0).square().sum().item()

    factor = min((0.25, 0.5, 0.71, 0.9, 1.0, 1.1, 1.4, 2.0, 4.0), key=lambda f: distance(at(f)))
    for _ in range(6):
        here, step = at(factor), factor * 1e-4
        slope = ((at(factor + step) - here) / step).nan_to_num(posinf=0.0, neginf=0.0)
        rest = (actual - here).nan_to_num(posinf=0.0, neginf=0.0)
        curvature = slope.square().sum().item()
        if not curvature:
            return
        factor += (slope * rest).sum().item() / curvature
        if not 0.01 < factor < 100:
            return
    words = f"attention with scale {factor:.4g} times what was asked for"
    yield words, case.changed(scale=scale * factor)
