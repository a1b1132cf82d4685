"""Does a case prove anything? Without its feature, the answer must change beyond the noise.

A problem is vacuous in a feature when the judge could not tell the right answer from that of
attention without the feature. The answer without it must be far over the bound somewhere
(``FAR`` times), or far over the limit of a row's statistic, in any tensor that is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attn_reference.backward import gradients
from attn_reference.forward import attention
from attn_reference.inputs import Inputs, key_count
from attn_reference.precision import Precision
from attn_reference.problem import Problem

from ..budget.expectation import Expected, expectation
from ..budget.expected import compare
from .statistics import statistics

# How many times over its limit the answer without the feature must be.
FAR = 4.0

Case = tuple[Problem, Inputs]


def vacuous_features(
    problem: Problem, inputs: Inputs, shows: Iterable[str], precision: Precision
) -> list[str]:
    """Those of the features ``shows`` (names of ``Problem.features``) that change nothing here.

    A feature that the problem does not have is vacuous. 'gradients' asks that each gradient
    differs from zero. Features that leave no other reading of the same inputs (head_dim_v, and
    gqa with one key/value head) count as shown.
    """
    shows = list(shows)
    if not shows:
        return []
    problem, inputs = _with_some_dropout(problem, inputs)
    expected = expectation(problem, inputs, precision)
    return [name for name in shows if not _shown(name, problem, inputs, expected)]


def _with_some_dropout(problem: Problem, inputs: Inputs) -> Case:
    """A keep_mask where there is none: the oracle cannot do without."""
    if not problem.dropout or inputs.keep_mask is not None:
        return problem, inputs
    generator = torch.Generator().manual_seed(problem.seed)
    shape = (*inputs.q.shape[:3], key_count(problem))
    kept = torch.rand(shape, generator=generator) >= problem.dropout
    return problem, replace(inputs, keep_mask=kept.to(inputs.q.device))


def _shown(
    feature: str, problem: Problem, inputs: Inputs, expected: Mapping[str, Expected]
) -> bool:
    if feature not in problem.features:
        return False
    if feature == "gradients":
        zeros = {n: torch.zeros_like(e.value) for n, e in expected.items() if n[1:] in _INPUTS}
        return bool(zeros) and all(_tells(expected[n], zero) for n, zero in zeros.items())
    if feature not in WITHOUT:
        return True
    readings = list(WITHOUT[feature](problem, inputs))
    return all(_differs(reading, expected) for reading in readings)


def _differs(reading: Case, expected: Mapping[str, Expected]) -> bool:
    """Whether another reading of the inputs gives another answer, in any tensor."""
    problem, inputs = reading
    result = attention(inputs, problem)
    answers: dict[str, Tensor | None] = {"out": result.out, "lse": result.lse}
    if problem.gradients:
        found = gradients(inputs, problem, result=result)
        answers |= {f"d{name}": tensor for name, tensor in found.tensors().items()}
    return any(
        _tells(expected[name], answer)
        for name, answer in answers.items()
        if answer is not None and name in expected and answer.shape == expected[name].value.shape
    )


def _tells(expected: Expected, answer: Tensor) -> bool:
    """Whether the judge would tell this answer from the right one, with room to spare."""
    comparison = compare(expected, answer)
    if comparison.worst >= FAR or bool(comparison.wrong_pattern.any()):
        return True
    return any(statistic.ratio >= FAR for statistic in statistics(expected, answer))


_INPUTS = ("q", "k", "v", "bias", "sinks")


def _not_causal(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    yield problem.replace(causal="none"), inputs
    other = {"top-left": "bottom-right", "bottom-right": "top-left"}[problem.causal]
    if any(len_q != len_k for len_q, len_k in _lengths(problem)):
        yield problem.replace(causal=other), inputs


def _lengths(problem: Problem) -> Iterator[tuple[int, int]]:
    if problem.packed is not None:
        yield from problem.packed
        return
    for length in problem.key_lengths or (problem.keys,) * problem.batch:
        yield problem.seqlen_q, length


def _no_window(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    yield problem.replace(window=None), inputs


def _no_softcap(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    yield problem.replace(softcap=0.0), inputs


def _no_alibi(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    yield problem.replace(alibi=False), replace(inputs, alibi_slopes=None)


def _no_mask(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    yield problem.replace(mask=None), replace(inputs, mask=None)


def _no_bias(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    names = tuple(name for name in problem.gradients if name != "bias")
    yield problem.replace(bias=None, gradients=names), replace(inputs, bias=None)


def _no_sinks(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    names = tuple(name for name in problem.gradients if name != "sinks")
    yield problem.replace(sinks=False, gradients=names), replace(inputs, sinks=None)


def _default_scale(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    yield problem.replace(scale=None), inputs


def _heads_by_modulo(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    """Query head h reads key/value head h mod heads_kv, in place of h // group."""
    if problem.kv_heads == 1:
        return
    heads = torch.arange(problem.heads_q, device=inputs.q.device) % problem.kv_heads
    names = tuple(name for name in problem.gradients if name not in ("k", "v"))
    yield (
        problem.replace(heads_kv=problem.heads_q, gradients=names),
        replace(inputs, k=inputs.k[:, heads], v=inputs.v[:, heads]),
    )


def _padding_counts(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    yield problem.replace(key_lengths=None), replace(inputs, key_lengths=None)


def _one_sequence(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    total_q = sum(length for length, _ in _lengths(problem))
    total_k = sum(length for _, length in _lengths(problem))
    yield (
        problem.replace(packed=((total_q, total_k),)),
        replace(inputs, cu_seqlens_q=None, cu_seqlens_k=None),
    )


def _pages_in_order(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    assert inputs.page_table is not None
    table = torch.arange(inputs.page_table.numel(), device=inputs.page_table.device)
    table = table.reshape(inputs.page_table.shape).clamp_max(inputs.k.shape[0] - 1)
    yield problem, replace(inputs, page_table=table.to(inputs.page_table.dtype))


def _nothing_dropped(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    yield problem.replace(dropout=0.0), replace(inputs, keep_mask=None)


def _no_lse_gradient(problem: Problem, inputs: Inputs) -> Iterator[Case]:
    yield problem.replace(lse_gradient=False), replace(inputs, grad_lse=None)


# The other readings of the same inputs, by the feature that they lack.
WITHOUT: Mapping[str, Callable[[Problem, Inputs], Iterator[Case]]] = {
    "causal top-left": _not_causal,
    "causal bottom-right": _not_causal,
    "window": _no_window,
    "softcap": _no_softcap,
    "alibi": _no_alibi,
    "boolean mask": _no_mask,
    "bias": _no_bias,
    "sinks": _no_sinks,
    "scale": _default_scale,
    "gqa": _heads_by_modulo,
    "key lengths": _padding_counts,
    "packed": _one_sequence,
    "paged": _pages_in_order,
    "dropout": _nothing_dropped,
    "lse gradient": _no_lse_gradient,
}
