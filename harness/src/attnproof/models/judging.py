"""The verdicts on what a model answered: its error beside that of eager attention.

The error of a model in low precision is its own rounding in the first place, whatever computes
the attention, and no bound on it can be derived that is worth having. Eager attention in the same
dtype is a sample of it: transformers' own, with the same weights, on the same device. Both errors
are taken against fp64. In 16 bits a fused kernel rounds less than eager attention, which stores
its scores; so honest ratios are about 1 at most, and as narrow as so many rounding errors make
them. In fp32 neither stores anything in less, and products of three in TF32 err by more than those
of eager attention. The limits are six standard deviations and more above what honest kernels were
measured to give: docs/huggingface.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..verdict import Finding, Status, Verdict
from . import llama
from .scenario import STEPS, Scenario

# How many times eager's error a target's may be.
# The rms over all logits; over all gradients, each weight's relative to its size.
RMS = {"fp32": 1.5, "fp16": 1.25, "bf16": 1.25}
ROW = 2.75  # the rms over one row of logits, beside the mean square of eager's there and overall
WEIGHT = 1.5  # the rms over the gradient of one weight
LARGEST = 2.5  # a single logit, beside the largest error of eager
FEW_DECIDED = 10  # steps with a token that the error leaves no choice but one
CHECKS = ("forward", "decoding", "greedy tokens", "gradients")


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The fp64 answer: logits by check, rows of (…, V), and gradients by weight."""

    logits: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


def truth(scenario: Scenario) -> Truth:
    """What the model of a scenario answers, in fp64, sequence by sequence."""
    weights = {n: w.double().requires_grad_() for n, w in scenario.weights().items()}
    sequences = scenario.sequences()
    found = [llama.logits(scenario.llama, weights, tokens) for tokens in sequences]
    losses = [
        torch.nn.functional.cross_entropy(rows[:-1], tokens[1:], reduction="sum")
        for rows, tokens in zip(found, sequences, strict=True)
    ]
    taken = torch.autograd.grad(torch.stack(losses).sum(), list(weights.values()))
    rows = [one.detach() for one in found]
    steps = [
        one[prompt - 1 : prompt - 1 + STEPS]
        for one, prompt in zip(rows, scenario.prompts, strict=True)
    ]
    return Truth(
        logits={"forward": torch.cat(rows), "decoding": torch.cat(steps)},
        gradients=dict(zip(weights, taken, strict=True)),
    )


def judge(
    scenario: Scenario, answer: Mapping[str, Tensor], eager: Mapping[str, Tensor]
) -> dict[str, Verdict]:
    """A verdict for each of CHECKS; ``answer`` and ``eager`` are what ``running.run`` gives."""
    true = truth(scenario)
    verdicts = {}
    for check in ("forward", "decoding"):
        rows, beside = (_rows(scenario, check, one[check]).double() for one in (answer, eager))
        right = true.logits[check]
        names = _row_names(scenario, check)
        verdicts[check] = _logits(rows - right, beside - right, names, RMS[scenario.dtype])
    verdicts["greedy tokens"] = _greedy(true.logits["decoding"], rows, beside, names)
    error, beside_error = (
        {name: one[name].double() - gradient for name, gradient in true.gradients.items()}
        for one in (answer, eager)
    )
    limit = RMS[scenario.dtype]
    verdicts["gradients"] = _gradients(true.gradients, error, beside_error, limit)
    return verdicts


def _rows(scenario: Scenario, check: str, logits: Tensor) -> Tensor:
    """The rows of a batch (B, S, V) that are answers to a token: (rows, V)."""
    if check == "decoding":
        return logits.flatten(0, 1)
    _, real = scenario.padded(scenario.sequences())
    return logits[real]


def _row_names(scenario: Scenario, check: str) -> list[str]:
    """What each row of ``_rows`` is called, in the order of the sequences."""
    if check == "decoding":
        counts, what = [STEPS] * len(scenario.prompts), "step"
    else:
        counts, what = [prompt + STEPS for prompt in scenario.prompts], "token"
    return [f"sequence {n}, {what} {i}" for n, count in enumerate(counts) for i in range(count)]


def _logits(error: Tensor, eager: Tensor, names: Sequence[str], limit: float) -> Verdict:
    if (lost := _not_finite("logits", error)) is not None:
        return _verdict([lost], {"logits": torch.inf}, {})
    overall = _rms(error) / _rms(eager)
    beside = ((eager.square().mean(1) + eager.square().mean()) / 2).sqrt()
    rows = error.square().mean(1).sqrt() / beside
    row = int(rows.argmax())
    worst = float(rows[row])
    findings = []
    if overall > limit:
        findings.append(_finding("logits", "rms statistic", overall, limit, "all logits"))
    if worst > ROW:
        findings.append(_finding("logits", "row statistic", worst, ROW, names[row]))
    statistics = {"rms": overall, "rms_limit": limit, "row": worst, "row_limit": ROW}
    return _verdict(findings, {"logits": max(overall / limit, worst / ROW)}, statistics)


def _greedy(true: Tensor, rows: Tensor, eager: Tensor, names: Sequence[str]) -> Verdict:
    """The largest logit must be the right one wherever no honest error can change it."""
    if (lost := _not_finite("tokens", rows)) is not None:
        return _verdict([lost], {}, {})
    allowed = LARGEST * float((eager - true).abs().max())
    best, second = true.topk(2, 1).values.unbind(1)
    decided = best - second > 2 * allowed  # each of the two may err by that much
    wrong = decided & (rows.argmax(1) != true.argmax(1))
    counts = f"of {int(decided.sum())} decided by more than the error, of {len(true)}"
    statistics = {"decided": float(decided.sum()), "wrong": float(wrong.sum())}
    if int(decided.sum()) < FEW_DECIDED:
        return Verdict(status=Status.VACUOUS, reason=f"too few tokens {counts}")
    if not wrong.any():
        return _verdict([], {}, statistics)
    first = int(wrong.nonzero()[0])
    message = f"{int(wrong.sum())} wrong, the first in {names[first]}, {counts}"
    count, elements = int(wrong.sum()), len(true)
    found = Finding(tensor="tokens", rule="exact", message=message, count=count, elements=elements)
    return _verdict([found], {}, statistics)


def _gradients(
    true: Mapping[str, Tensor],
    error: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    limit: float,
) -> Verdict:
    findings = [f for name, one in error.items() if (f := _not_finite(name, one)) is not None]
    if findings:
        return _verdict(findings, {f.tensor: torch.inf for f in findings}, {})
    sizes = {name: _rms(gradient) for name, gradient in true.items()}

    def relative(errors: Mapping[str, Tensor]) -> float:
        return math.hypot(*(_rms(e) / sizes[name] for name, e in errors.items()))

    overall = relative(error) / relative(eager)
    ratios = {name: _rms(one) / _rms(eager[name]) for name, one in error.items()}
    worst = max(ratios, key=ratios.__getitem__)
    if overall > limit:
        findings.append(_finding("gradients", "rms statistic", overall, limit, "all gradients"))
    findings += [
        _finding(name, "rms statistic", ratio, WEIGHT, f"the gradient of {name}")
        for name, ratio in sorted(ratios.items(), key=lambda item: -item[1])
        if ratio > WEIGHT
    ]
    statistics = {
        "rms": overall,
        "rms_limit": limit,
        "worst weight": ratios[worst],
        "worst weight_limit": WEIGHT,
    }
    budgets = {"gradients": overall / limit, worst: ratios[worst] / WEIGHT}
    return _verdict(findings, budgets, statistics)


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _not_finite(name: str, tensor: Tensor) -> Finding | None:
    count = int((~tensor.isfinite()).sum())
    if not count:
        return None
    message = f"{count} of {tensor.numel()} elements are not finite, and should be"
    return Finding(
        tensor=name,
        rule="non-finite pattern",
        message=message,
        count=count,
        elements=tensor.numel(),
    )


def _finding(tensor: str, rule: str, ratio: float, limit: float, of: str) -> Finding:
    message = (
        f"the rms error of {of} is {ratio:.3g} times that of eager attention; "
        f"accepted is {limit:g} times"
    )
    return Finding(tensor=tensor, rule=rule, message=message, worst=ratio / limit)


def _verdict(
    findings: list[Finding], worst: dict[str, float], statistics: dict[str, float]
) -> Verdict:
    status = Status.DEVIATES if findings else Status.CONFORMS
    reason = "; ".join(f"{f.tensor}: {f.message}" for f in findings[:3])
    return Verdict(
        status=status, reason=reason, findings=findings, worst=worst, statistics=statistics
    )
