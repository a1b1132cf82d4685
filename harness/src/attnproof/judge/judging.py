"""The judge: from a problem, its inputs and what a target gave to a verdict.

Per tensor: is it there, of the right shape and dtype; is it finite where it should be; exact
where the answer is exact, zero where nothing contributes; within the error budget element by
element; and, for out on iid inputs, is the error small enough on the whole.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.precision import PROFILES, Precision
from attn_reference.problem import Problem

from ..backend import Capabilities
from ..budget.expectation import Expected, expectation
from ..budget.expected import Comparison, compare
from ..plan import CallResult
from ..position import position
from ..verdict import Finding, Status, Verdict
from .form import Given, canonical_lse, complaints, given
from .statistics import Statistic, statistics

__all__ = ["canonical_lse", "compare_values", "judge", "looser_profile"]

DROPOUT_UNSEEN = "what dropout kept was not returned, so that values were not compared"
# From the strictest to the loosest: the first that explains a result says most about it.
PROFILE_ORDER = ("flash-fp32-p", "flash", "flash-tf32", "eager")


def judge(
    problem: Problem,
    inputs: Inputs,
    result: CallResult,
    precision: Precision,
    capabilities: Capabilities,
) -> Verdict:
    """The verdict on one call: CONFORMS, DEVIATES, VACUOUS (nothing could be compared), or what
    the call itself says (UNSUPPORTED, CRASHED).

    With dropout, ``result.attention.keep_mask`` says what was kept (``inputs.keep_mask`` when the
    target returned none); without either, values are not compared, except that of the LSE, and
    the reason says so. A deviation is judged again under the other profiles (conforms_under).
    """
    if result.unsupported is not None:
        return Verdict(status=Status.UNSUPPORTED, reason=result.unsupported)
    if result.raised is not None:
        return Verdict(status=Status.CRASHED, reason=f"raised {result.raised}")
    came = given(problem, inputs, result, capabilities)
    came.findings += complaints(result)
    verdict = _numbers(problem, came, precision, capabilities)
    if came.findings:
        verdict.status = Status.DEVIATES
        verdict.findings = came.findings + verdict.findings
    elif verdict.status is Status.DEVIATES:
        verdict.conforms_under = looser_profile(problem, came, precision, capabilities)
    if verdict.status is Status.DEVIATES:
        verdict.reason = _summary(verdict)
    return verdict


def looser_profile(
    problem: Problem, came: Given, precision: Precision, capabilities: Capabilities
) -> str | None:
    """The first other profile under which the numbers conform, by name."""
    for name in PROFILE_ORDER:
        other = PROFILES[name]
        if other == precision:
            continue
        if _numbers(problem, came, other, capabilities).status is Status.CONFORMS:
            return name
    return None


def _numbers(
    problem: Problem, came: Given, precision: Precision, capabilities: Capabilities
) -> Verdict:
    """The verdict on the values alone."""
    expected = expectation(problem, came.inputs, precision)
    return compare_values(problem, came, expected, precision, capabilities)


def compare_values(
    problem: Problem,
    came: Given,
    expected: dict[str, Expected],
    precision: Precision,
    capabilities: Capabilities,
) -> Verdict:
    """The verdict on the values alone, given what is expected of them under ``precision``.

    ``expected`` is changed where the target declares its own answer for empty rows.
    """
    declared_empty_rows(expected, problem, capabilities)
    verdict = Verdict(status=Status.CONFORMS)
    remarks = [DROPOUT_UNSEEN] if came.dropout_unseen else []
    comparable = 0
    for name, actual in came.tensors.items():
        wanted = expected[name]
        if came.dropout_unseen and name != "lse":
            wanted = replace(wanted, bound=torch.full_like(wanted.bound, math.inf), sigma=None)
        judged = wanted.judged | wanted.zero
        skipped = judged.numel() - int(judged.sum())
        comparable += int(judged.numel() == 0 or skipped < judged.numel())
        if skipped and not came.dropout_unseen:
            remarks.append(
                f"{skipped} of {judged.numel()} elements of {name} are not determined under the "
                f"declared precision ({precision.name}) and were not compared"
            )
        comparison = compare(wanted, actual)
        verdict.worst[name] = comparison.worst
        verdict.findings += _findings(name, wanted, actual, comparison)
        if name == "out":
            _statistics(verdict, wanted, actual)
    if verdict.findings:
        verdict.status = Status.DEVIATES
    elif came.tensors and not comparable:
        verdict.status = Status.VACUOUS
    verdict.reason = "; ".join(remarks)
    return verdict


def declared_empty_rows(
    expected: dict[str, Expected], problem: Problem, capabilities: Capabilities
) -> None:
    """Put what the target declares for rows without a visible key in place of 0 and -inf."""
    lse, out = expected["lse"], expected["out"]
    empty = lse.value == -math.inf
    if problem.sinks or not bool(empty.any()):
        return
    lse.value = lse.value.masked_fill(empty, capabilities.empty_row_lse)
    out.value = out.value.masked_fill(empty[..., None], capabilities.empty_row_out)
    out.zero = out.zero & (out.value == 0)
    if not math.isnan(capabilities.empty_row_out):
        return
    for name, wanted in expected.items():  # a NaN in P makes NaN of every gradient it reaches
        if name not in ("out", "lse"):
            wanted.bound = torch.full_like(wanted.bound, math.inf)
            wanted.zero = torch.zeros_like(wanted.zero)


def _findings(
    name: str, expected: Expected, actual: Tensor, comparison: Comparison
) -> list[Finding]:
    """A finding for each rule that some element breaks."""
    pattern = "not finite where an answer should be, or finite where none should be"
    rules = (
        ("non-finite pattern", comparison.wrong_pattern, pattern),
        ("structural zero", comparison.wrong_zero, "not zero where nothing contributes"),
        ("exact", comparison.wrong_exact, "not the exact answer"),
        ("bound", comparison.wrong, "beyond the error budget"),
    )
    return [
        _finding(name, rule, broken, words, expected, actual, comparison)
        for rule, broken, words in rules
        if bool(broken.any())
    ]


def _finding(
    name: str,
    rule: str,
    broken: Tensor,
    words: str,
    expected: Expected,
    actual: Tensor,
    comparison: Comparison,
) -> Finding:
    ratio = comparison.ratio.masked_fill(~broken, -1.0)
    size = comparison.error.nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(~broken, -1.0)
    # Where the ratio is the same (infinite), the largest error is the worst.
    largest = ratio.max()
    flat = size.masked_fill(ratio < largest, -1.0).flatten().argmax()
    index = position(flat, ratio.shape)
    count, elements = int(broken.sum()), broken.numel()
    value, bound = expected.value[index].item(), expected.bound[index].item()
    margin = f" ± {bound:.3g}" if math.isfinite(bound) and bound > 0 else ""
    worst = largest.item()
    times = f" ({worst:.3g} times the budget)" if math.isfinite(worst) else ""
    return Finding(
        tensor=name,
        rule=rule,
        message=f"{count} of {elements} elements of {name} {'is' if count == 1 else 'are'} "
        f"{words}; the worst is at "
        f"{list(index)}: {actual[index].item():.9g}, expected {value:.9g}{margin}{times}",
        worst=worst,
        index=index,
        count=count,
        elements=elements,
    )


WORDS = {
    "z_row": "a row of out has an error whose root mean square is",
    "z_max": "an element of out has an error of",
    "z_global": "the root mean square error of out is",
}


def _statistics(verdict: Verdict, expected: Expected, actual: Tensor) -> None:
    for statistic in statistics(expected, actual):
        verdict.statistics[statistic.name] = statistic.value
        verdict.statistics[f"{statistic.name}_limit"] = statistic.limit
        if statistic.ratio > 1:
            verdict.findings.append(_statistic_finding(statistic))


def _statistic_finding(statistic: Statistic) -> Finding:
    where = "" if statistic.index is None else f", at {list(statistic.index)}"
    return Finding(
        tensor="out",
        rule=statistic.rule,
        message=f"{WORDS[statistic.name]} {statistic.value:.3g} standard deviations of honest "
        f"rounding{where}; chance allows {statistic.limit:.3g}",
        worst=statistic.ratio,
        index=statistic.index,
    )


def _summary(verdict: Verdict) -> str:
    """The reason of a deviation, in one line: the first finding of each tensor."""
    first: dict[str, Finding] = {}
    for finding in verdict.findings:
        first.setdefault(finding.tensor, finding)
    parts = [finding.message for finding in first.values()]
    return "; ".join([*parts, verdict.reason] if verdict.reason else parts)
