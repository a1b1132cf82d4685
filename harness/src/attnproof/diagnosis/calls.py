"""Mistakes between calls: what an earlier call in the same process asked for, kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .blocks import Answer
from .case import Case, Guess, mistake

# Values that a kernel may keep from one call to the next.
KEPT_FIELDS = ("causal", "window", "softcap", "key_lengths", "dropout")
KEPT_TENSORS = ("q", "k", "v", "mask", "bias", "alibi_slopes", "sinks", "key_lengths")


@mistake()
def of_an_earlier_call(case: Case) -> Iterator[Guess]:
    """The scale, the mask, another value or the whole answer of an earlier call."""
    for problem, inputs in reversed(case.earlier):
        if problem.softmax_scale != case.problem.softmax_scale:
            kept = case.changed(scale=problem.softmax_scale)
            yield "attention with the scale of an earlier call", kept
        for name in KEPT_FIELDS:
            if getattr(problem, name) != getattr(case.problem, name):
                try:
                    kept = case.changed(**{name: getattr(problem, name)})
                except ValueError:  # it does not fit this problem
                    continue
                yield f"attention with the {name} of an earlier call", kept
        for name in KEPT_TENSORS:
            old, new = getattr(inputs, name), getattr(case.inputs, name)
            if old is not None and new is not None and old.shape == new.shape:
                kept = case.attention(inputs=replace(case.inputs, **{name: old}))
                yield f"attention with the {name} of an earlier call", kept
        if problem.gradients == case.problem.gradients:
            answer = _of_these_shapes(case.attention(problem, inputs), case)
            yield "the answer of an earlier call", answer


def _of_these_shapes(answer: Answer, case: Case) -> Answer:
    return {n: v for n, v in answer.items() if v.shape == case.truth[n].shape}
