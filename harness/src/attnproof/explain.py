"""Is the error of one saved computation honest, and by which term of the budget, why?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attn_reference.backward import gradients
from attn_reference.forward import attention
from attn_reference.precision import EAGER, Precision
from attn_reference.problem import Problem

from .backend import Capabilities
from .budget.expectation import expectation
from .budget.expected import Expected, compare
from .computation import Computation, ComputationError, load_computation, save_computation
from .judge.form import Given, given
from .judge.judging import DROPOUT_UNSEEN, compare_values, looser_profile
from .position import position
from .verdict import Status, Verdict

__all__ = [
    "Account",
    "ExplainError",
    "Explanation",
    "explain",
    "explain_computation",
    "save_computation",
]

ExplainError = ComputationError
TENSORS = ["out", "lse", "dq", "dk", "dv", "dbias", "dsinks"]
# FlashAttention's tests allow twice the error of unfused attention in the same dtype.
EAGER_FACTOR = 2.0
SMALLEST_SHARE = 0.005


@dataclass(frozen=True, kw_only=True)
class Account:
    """The error of one tensor, and what its budget is made of where it is used most."""

    name: str
    elements: int
    largest: float  # absolute error
    mean: float  # absolute error
    worst: float  # error over budget
    index: tuple[int, ...] | None  # of the worst
    actual: float
    expected: float
    bound: float
    shares: dict[str, float]  # of the bound, by term, largest first
    eager: float | None = None  # largest error over twice that of unfused attention


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What ``explain`` found. ``honest`` when rounding under the precision explains every error."""

    problem: Problem
    precision: Precision
    verdict: Verdict
    accounts: tuple[Account, ...]
    assumed: tuple[str, ...] = ()

    @property
    def honest(self) -> bool:
        """Whether the computation conforms."""
        return self.verdict.status is Status.CONFORMS

    @property
    def text(self) -> str:
        """The explanation in plain text, of several lines."""
        return "\n".join(_lines(self))


def explain(
    path: Path, problem: Problem | None = None, precision: Precision | None = None
) -> Explanation:
    """Explain the computation in a safetensors file (``attnproof.computation`` has the format).

    ``problem`` and ``precision`` are used where the file's metadata has none. ExplainError, with
    one line that says why, when the file cannot be read or its tensors do not fit the problem.
    """
    return explain_computation(load_computation(Path(path), problem, precision))


def explain_computation(computation: Computation) -> Explanation:
    """Judge a computation and take its errors apart by the terms of the budget."""
    problem, precision = computation.problem, computation.precision
    capabilities = Capabilities()
    came = given(problem, computation.inputs, computation.result, capabilities)
    wider = _take_wider(came, computation)
    expected = expectation(problem, came.inputs, precision, terms=True)
    for name in wider:
        expected[name].dtype = came.tensors[name].dtype
    verdict = compare_values(problem, came, expected, precision, capabilities)
    if came.findings:
        verdict.status = Status.DEVIATES
        verdict.findings = came.findings + verdict.findings
    elif verdict.status is Status.DEVIATES:
        verdict.conforms_under = looser_profile(problem, came, precision, capabilities)
    eager = {} if came.dropout_unseen else _eager_errors(problem, came, expected)
    names = ["lse"] if came.dropout_unseen else TENSORS
    return Explanation(
        problem=problem,
        precision=precision,
        verdict=verdict,
        accounts=tuple(
            _account(name, expected[name], came.tensors[name], eager.get(name))
            for name in names
            if name in came.tensors
        ),
        assumed=(*computation.assumed, *_remark(wider)),
    )


def _take_wider(came: Given, computation: Computation) -> dict[str, Tensor]:
    """Take tensors of another floating dtype after all: a file may hold them widened."""
    taken: dict[str, Tensor] = {}
    for finding in [f for f in came.findings if f.rule == "dtype"]:
        attention, gradients_ = computation.result.attention, computation.result.gradients
        name = finding.tensor
        if name == "out" and attention is not None:
            tensor: Tensor | None = attention.out
        else:
            tensor = None if gradients_ is None else getattr(gradients_, name[1:])
        if tensor is not None and tensor.is_floating_point():
            came.findings.remove(finding)
            taken[name] = tensor
    came.tensors |= taken
    return taken


def _remark(taken: dict[str, Tensor]) -> list[str]:
    listed = (f"{name} {str(t.dtype).removeprefix('torch.')}" for name, t in taken.items())
    return [f"compared as they are, in another dtype: {', '.join(listed)}"] if taken else []


def _account(name: str, expected: Expected, actual: Tensor, eager: float | None) -> Account:
    comparison = compare(expected, actual)
    error = comparison.error.nan_to_num(nan=math.inf, posinf=math.inf)
    if not error.numel():
        return Account(
            name=name, elements=0, largest=0.0, mean=0.0, worst=0.0, index=None, actual=0.0,
            expected=0.0, bound=0.0, shares={},
        )  # fmt: skip
    flat = comparison.ratio.flatten().argmax()
    index = position(flat, comparison.ratio.shape)
    bound = expected.bound[index].item()
    found = {term: tensor[index].item() for term, tensor in expected.terms.items()}
    shares = {
        term: value / bound
        for term, value in sorted(found.items(), key=lambda item: -item[1])
        if 0 < bound < math.inf and value >= SMALLEST_SHARE * bound
    }
    largest = error.max().item()
    return Account(
        name=name,
        elements=error.numel(),
        largest=largest,
        mean=error.mean().item(),
        worst=comparison.worst,
        index=index,
        actual=actual[index].item(),
        expected=expected.value[index].item(),
        bound=bound,
        shares=shares,
        eager=None if eager is None else largest / eager,
    )


def _eager_errors(problem: Problem, came: Given, expected: dict[str, Expected]) -> dict[str, float]:
    """Twice the largest error of unfused attention in the dtype of the inputs, plus a rounding."""
    result = attention(came.inputs, problem, EAGER)
    answers: dict[str, Tensor | None] = {"out": result.out}
    if problem.gradients:
        found = gradients(came.inputs, problem, EAGER, result)
        answers |= {f"d{name}": tensor for name, tensor in found.tensors().items()}
    allowed = {}
    for name, answer in answers.items():
        if answer is None or not answer.numel():
            continue
        value = expected[name].value
        error = (
            (answer.double() - value).abs().nan_to_num(nan=math.inf, posinf=math.inf).max().item()
        )
        rounding = torch.finfo(expected[name].dtype).eps * value.abs().nan_to_num().max().item()
        allowed[name] = max(EAGER_FACTOR * (error + rounding), 1e-300)
    return allowed


def _lines(explanation: Explanation) -> list[str]:
    problem, verdict = explanation.problem, explanation.verdict
    lines = [f"problem    {problem.id}", f"precision  {explanation.precision.name}"]
    lines += [f"note       {sentence}" for sentence in explanation.assumed]
    lines += ["", *_table(explanation.accounts), ""]
    for account in explanation.accounts:
        if account.shares:
            shares = ", ".join(f"{term} {share:.0%}" for term, share in account.shares.items())
            lines.append(f"{account.name:6} budget at {list(account.index or ())}: {shares}")
    for name in ("z_row", "z_max", "z_global"):
        if name in verdict.statistics:
            value, limit = verdict.statistics[name], verdict.statistics[f"{name}_limit"]
            lines.append(f"{name:8} {value:.3g} standard deviations, chance allows {limit:.3g}")
    eager = [f"{a.name} {a.eager:.2g}" for a in explanation.accounts if a.eager is not None]
    if eager:
        lines.append(
            "largest error over twice that of unfused attention in the same dtype (for "
            f"information): {', '.join(eager)}"
        )
    return [*lines, "", _answer(explanation)]


def _table(accounts: tuple[Account, ...]) -> list[str]:
    head = ("tensor", "elements", "max |error|", "mean |error|", "of budget", "there", "expected")
    rows = [head]
    for a in accounts:
        margin = f" ± {a.bound:.3g}" if math.isfinite(a.bound) else " (not determined)"
        rows.append(
            (
                a.name,
                str(a.elements),
                f"{a.largest:.3g}",
                f"{a.mean:.3g}",
                f"{a.worst:.3g}",
                f"{a.actual:.6g}",
                f"{a.expected:.6g}{margin}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _answer(explanation: Explanation) -> str:
    verdict, name = explanation.verdict, explanation.precision.name
    if explanation.honest:
        unseen = f" ({DROPOUT_UNSEEN})" if DROPOUT_UNSEEN in verdict.reason else ""
        return f"Honest: rounding under the precision {name!r} explains every error{unseen}."
    if verdict.status is Status.VACUOUS:
        return f"Undecided: {verdict.reason}."
    said = "; ".join(finding.message for finding in verdict.findings)
    text = f"Not honest under the precision {name!r}: {said}."
    if verdict.conforms_under is not None:
        text += f" The precision {verdict.conforms_under!r} would explain it."
    return text
