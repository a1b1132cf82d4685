"""What is true of attention whatever the numbers: no oracle is compared with.

Each check draws problems around that of its case with hypothesis, calls the target for the
two sides of an equation, and asks that they agree within the error budgets of both. The
examples that each names are sizes at which kernels have gone wrong.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem

from ..cases import cases
from ..inputs.streams import Stream
from ..subject import Subject
from .exploring import allowed, answers, explore, require_equal, tensor
from .recipe import GRADIENTS, in_each_dtype, turning
from .requirements import require_lse

BASE: dict[str, Any] = {"seqlen_q": 33, "seqlen_k": 65, "heads_q": 2}
PLAIN = turning(({}, {"head_dim": 128}, {"heads_q": 6, "heads_kv": 2}), **BASE)
POSITIONLESS = turning(
    (
        {},
        {"mask": "random"},
        {"bias": "normal"},
        {"softcap": 5.0, "distribution": "normal:4"},
        {"heads_q": 6, "heads_kv": 2},
        {"scale": 0.3},
        {"sinks": True},
    ),
    **BASE,
)
CAUSAL = turning(
    (
        {"causal": "top-left"},
        {"causal": "bottom-right"},
        {"causal": "top-left", "heads_q": 6, "heads_kv": 2},
        {"causal": "bottom-right", "alibi": True},
        {"causal": "bottom-right", "window": (30, None)},
    ),
    **BASE,
)


def _order(problem: Problem, count: int) -> Tensor:
    return torch.from_numpy(Stream(problem.seed, "order").permutation(count))


def _reordered(given: Tensor | None, dim: int, order: Tensor) -> Tensor | None:
    """A dimension in another order; None and a dimension that broadcasts stay as they are."""
    if given is None or given.shape[dim] == 1:
        return given
    return given.index_select(dim, order)


def _small_integers(like: Tensor, seed: int, name: str, most: int, unit: float) -> Tensor:
    """Multiples of ``unit`` up to ``most`` of them, of which few sums need rounding."""
    numbers = Stream(seed, name).integers(tuple(like.shape), -most, most)
    return (torch.from_numpy(numbers) * unit).to(like.dtype)


@cases(
    quick=in_each_dtype(POSITIONLESS[:3], fewest=True), full=POSITIONLESS[3:], feature="properties"
)
def test_key_permutation(problem: Problem, subject: Subject) -> None:
    """The order of the keys, with their values, does not matter."""
    subject.prepare(problem)

    def holds(variation: Problem) -> None:
        asked, inputs = subject.prepare(variation)
        order = _order(asked, asked.keys)
        moved = replace(
            inputs,
            k=inputs.k[:, :, order],
            v=inputs.v[:, :, order],
            mask=_reordered(inputs.mask, 3, order),
            bias=_reordered(inputs.bias, 3, order),
        )
        one, other = answers(subject, (asked, inputs), (asked, moved))
        budget = 2 * allowed(subject, asked, inputs)["out"].bound
        left, right = (tensor(result, "out", subject) for result in (one, other))
        require_equal(subject, left, right, budget, "keys in another order")

    explore(
        test_key_permutation,
        problem,
        holds,
        (1, 129),
        (64, 100),
    )


@cases(
    quick=in_each_dtype(POSITIONLESS[:2], fewest=True), full=POSITIONLESS[2:], feature="properties"
)
def test_query_permutation(problem: Problem, subject: Subject) -> None:
    """Queries in another order give the rows of out in that order."""
    subject.prepare(problem)

    def holds(variation: Problem) -> None:
        asked, inputs = subject.prepare(variation)
        order = _order(asked, asked.seqlen_q)
        moved = replace(
            inputs,
            q=inputs.q[:, :, order],
            mask=_reordered(inputs.mask, 2, order),
            bias=_reordered(inputs.bias, 2, order),
        )
        one, other = answers(subject, (asked, inputs), (asked, moved))
        budget = 2 * allowed(subject, asked, inputs)["out"].bound[:, :, order]
        left = tensor(one, "out", subject)[:, :, order]
        require_equal(
            subject, left, tensor(other, "out", subject), budget, "queries in another order"
        )

    explore(test_query_permutation, problem, holds, (129, 33))


@cases(
    quick=in_each_dtype((PLAIN[0], PLAIN[2]), fewest=True),
    full=(PLAIN[1], *CAUSAL),
    feature="properties",
)
def test_head_permutation(problem: Problem, subject: Subject) -> None:
    """Key/value heads in another order, their query heads with them."""
    subject.prepare(problem)

    def holds(variation: Problem) -> None:
        asked, inputs = subject.prepare(variation)
        kv_order = torch.arange(asked.kv_heads).flip(0)
        within = torch.arange(asked.group)
        order = (kv_order[:, None] * asked.group + within).flatten()
        moved = replace(
            inputs,
            q=inputs.q[:, order],
            k=inputs.k[:, kv_order],
            v=inputs.v[:, kv_order],
            alibi_slopes=_reordered(inputs.alibi_slopes, 0, order),
        )
        one, other = answers(subject, (asked, inputs), (asked, moved))
        budget = 2 * allowed(subject, asked, inputs)["out"].bound[:, order]
        left = tensor(one, "out", subject)[:, order]
        require_equal(
            subject, left, tensor(other, "out", subject), budget, "heads in another order"
        )

    explore(test_head_permutation, problem, holds, (65, 64))


@cases(
    quick=in_each_dtype((*POSITIONLESS[:1], *CAUSAL[:2]), fewest=True),
    full=(*POSITIONLESS[1:], *CAUSAL[2:]),
    feature="properties",
)
def test_value_linearity(problem: Problem, subject: Subject) -> None:
    """out(2 V + W) = 2 out(V) + out(W)."""
    subject.prepare(problem)

    def holds(variation: Problem) -> None:
        asked, inputs = subject.prepare(variation)
        v = _small_integers(inputs.v, asked.seed, "v", 32, 0.125)
        w = _small_integers(inputs.v, asked.seed, "w", 32, 0.125)
        parts = [replace(inputs, v=values) for values in (v, w, 2 * v + w)]
        results = answers(subject, *((asked, part) for part in parts))
        of_v, of_w, of_sum = (tensor(result, "out", subject) for result in results)
        bounds = [allowed(subject, asked, part)["out"].bound for part in parts]
        budget = 2 * bounds[0] + bounds[1] + bounds[2]
        require_equal(subject, of_sum, 2 * of_v + of_w, budget, "out of a sum of values")

    explore(
        test_value_linearity,
        problem,
        holds,
        (129, 129),
        (1, 65),
    )


@cases(quick=in_each_dtype(PLAIN[:2], fewest=True), full=PLAIN[2:], feature="properties")
def test_score_shift(problem: Problem, subject: Subject) -> None:
    """The same vector added to every key shifts the scores of a row, and leaves out as it is."""
    subject.prepare(problem)

    def holds(variation: Problem) -> None:
        asked, inputs = subject.prepare(variation)
        k = _small_integers(inputs.k, asked.seed, "k", 16, 0.125)
        shift = _small_integers(k[:, :, :1], asked.seed, "shift", 16, 0.125)
        both = [replace(inputs, k=k), replace(inputs, k=k + shift)]
        one, other = answers(subject, *((asked, part) for part in both))
        first, second = (allowed(subject, asked, part) for part in both)
        left, right = (tensor(result, "out", subject) for result in (one, other))
        budget = first["out"].bound + second["out"].bound
        require_equal(subject, left, right, budget, "scores shifted by a constant in each row")

    explore(test_score_shift, problem, holds, (17, 127))


@cases(
    quick=in_each_dtype(PLAIN[:2], fewest=True),
    full=(*PLAIN[2:], *POSITIONLESS[3:4]),
    feature="properties",
)
def test_duplicated_keys(problem: Problem, subject: Subject) -> None:
    """Every key twice, with its value: out stays, and the LSE grows by ln 2."""
    subject.prepare(problem)

    def holds(variation: Problem) -> None:
        asked, inputs = subject.prepare(variation)
        twice = replace(
            inputs, k=torch.cat([inputs.k, inputs.k], 2), v=torch.cat([inputs.v, inputs.v], 2)
        )
        longer = replace(asked, seqlen_k=2 * asked.keys)
        one, other = answers(subject, (asked, inputs), (longer, twice))
        first, second = allowed(subject, asked, inputs), allowed(subject, longer, twice)
        left, right = (tensor(result, "out", subject) for result in (one, other))
        budget = first["out"].bound + second["out"].bound
        require_equal(subject, left, right, budget, "every key twice")
        if subject.description.capabilities.returns_lse:
            left, right = (tensor(result, "lse", subject) for result in (one, other))
            budget = first["lse"].bound + second["lse"].bound
            require_equal(subject, left + math.log(2), right, budget, "every key twice", "lse")

    explore(test_duplicated_keys, problem, holds, (16, 65))


def _part(inputs: Inputs, keys: slice) -> Inputs:
    """Some of the keys alone."""
    return replace(inputs, k=inputs.k[:, :, keys].contiguous(), v=inputs.v[:, :, keys].contiguous())


@cases(
    quick=in_each_dtype(PLAIN[:2], fewest=True),
    full=(*PLAIN[2:], *POSITIONLESS[3:4]),
    feature="properties",
)
def test_split_and_merge(problem: Problem, subject: Subject) -> None:
    """Two runs of keys, merged with the weights that their LSEs say, give all of them."""
    require_lse(subject)
    subject.prepare(problem)

    def holds(variation: Problem) -> None:
        asked, inputs = subject.prepare(replace(variation, seqlen_k=variation.keys + 1))
        cut = asked.keys // 2
        whole = (asked, inputs)
        parts = [
            (replace(asked, seqlen_k=cut), _part(inputs, slice(0, cut))),
            (replace(asked, seqlen_k=asked.keys - cut), _part(inputs, slice(cut, asked.keys))),
        ]
        results = answers(subject, whole, *parts)
        out, lse = tensor(results[0], "out", subject), tensor(results[0], "lse", subject)
        truth = allowed(subject, *whole)
        merged, budget = torch.zeros_like(out), truth["out"].bound.clone()
        for part, result in zip(parts, results[1:], strict=True):
            expected = allowed(subject, *part)
            weight = (tensor(result, "lse", subject) - lse).exp()[..., None]
            off = torch.expm1(expected["lse"].bound + truth["lse"].bound)[..., None]
            piece = tensor(result, "out", subject)
            merged += weight * piece
            budget += weight * (expected["out"].bound + off * piece.abs())
        require_equal(subject, merged, out, budget, "two runs of keys merged by their LSE")

    explore(
        test_split_and_merge,
        problem,
        holds,
        (1, 257),
        (33, 128),
    )


@cases(quick=in_each_dtype(CAUSAL[:2], fewest=True), full=CAUSAL[2:], feature="properties")
def test_hidden_keys(problem: Problem, subject: Subject) -> None:
    """The last key is hidden from all but the last query that can see it: others do not change
    with it."""
    subject.prepare(problem)

    def holds(variation: Problem) -> None:
        length = max(variation.seqlen_q, 2)
        asked, inputs = subject.prepare(replace(variation, seqlen_q=length, seqlen_k=length))
        other = replace(inputs, k=inputs.k.clone(), v=inputs.v.clone())
        other.k[:, :, -1] *= 3
        other.v[:, :, -1] = 100
        before, after = answers(subject, (asked, inputs), (asked, other))
        rows = slice(0, length - 1)
        budget = 2 * allowed(subject, asked, inputs)["out"].bound[:, :, rows]
        left, right = (tensor(result, "out", subject)[:, :, rows] for result in (before, after))
        require_equal(subject, left, right, budget, "a key that these queries do not see changed")

    explore(test_hidden_keys, problem, holds, (65, 65))


@cases(
    quick=in_each_dtype((PLAIN[0], CAUSAL[1]), fewest=True),
    full=(*PLAIN[1:], *CAUSAL),
    feature="properties",
)
def test_concatenated_batches(problem: Problem, subject: Subject) -> None:
    """Two batches in one call give what they give in two."""
    subject.prepare(problem)

    def holds(variation: Problem) -> None:
        first, inputs = subject.prepare(variation)
        second, others = subject.prepare(replace(variation, seed=variation.seed + 1))
        joined = replace(
            inputs, **{n: torch.cat([getattr(inputs, n), getattr(others, n)]) for n in "qkv"}
        )
        both = replace(first, batch=2 * first.batch)
        *parts, whole = answers(subject, (first, inputs), (second, others), (both, joined))
        apart = torch.cat([tensor(result, "out", subject) for result in parts])
        budget = 2 * allowed(subject, both, joined)["out"].bound
        require_equal(
            subject, apart, tensor(whole, "out", subject), budget, "two batches in one call"
        )

    explore(test_concatenated_batches, problem, holds, (17, 33))


GRADIENT_PROBLEMS = turning(
    (
        {},
        {"causal": "top-left"},
        {"causal": "bottom-right"},
        {"heads_q": 6, "heads_kv": 2},
        {"softcap": 5.0, "distribution": "normal:4"},
    ),
    **BASE,
    gradients=GRADIENTS,
)


@cases(
    quick=in_each_dtype(GRADIENT_PROBLEMS[:2], fewest=True),
    full=GRADIENT_PROBLEMS[2:],
    feature="properties",
)
def test_sum_of_value_gradients(problem: Problem, subject: Subject) -> None:
    """Weights of a row sum to one: dV summed over the keys is dO summed over the queries."""
    subject.prepare(problem)

    def holds(variation: Problem) -> None:
        # At least as many keys as queries: no row is without one.
        keys = max(variation.keys, variation.seqlen_q)
        asked, inputs = subject.prepare(replace(variation, seqlen_k=keys))
        assert inputs.grad_out is not None
        (result,) = answers(subject, (asked, inputs))
        incoming = inputs.grad_out.double().sum(2)
        incoming = incoming.reshape(asked.batch, asked.kv_heads, asked.group, -1).sum(2)
        summed = tensor(result, "dv", subject).sum(2)
        budget = allowed(subject, asked, inputs)["dv"].bound.sum(2)
        require_equal(subject, summed, incoming, budget, "dV summed over the keys", "dv")

    explore(test_sum_of_value_gradients, problem, holds, (129, 129))
