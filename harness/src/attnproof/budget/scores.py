"""The error of the scores of a chunk of query rows, and of their softmax.

docs/error-budget.md, "Scores" and "Softmax", has the derivation. Shapes: G query heads of one
key/value head, R query rows, Lk keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_reference.scores import ChunkScores, KeyHead, softmax_parts
from attn_reference.sequences import alibi_term

from .units import Units

# E[relative rounding error²] / u², for significands spread evenly over their logarithms.
ROUNDING_VARIANCE = 0.18
_LARGEST_EXPONENT = 300.0
# Nats below the maximum at which a key has no weight, however wrong 16-bit scores may be.
_NO_WEIGHT = 200.0
# What the fp64 sums of a variance may lose, relative to what cancels in them.
_CANCELLATION = 2.0**-44


@dataclass(kw_only=True)
class ScoreErrors:
    """How far the scores may be off, in nats, where visible (0 elsewhere)."""

    error: Tensor  # (G, R, Lk): bound on |score error|
    variance: Tensor  # (G, R, Lk): of what 16-bit storage alone does to a score
    slope: Tensor | None  # (G, R, Lk): J = 1 - tanh², with a softcap
    slope_error: Tensor | None  # (G, R, Lk): bound on the error of J
    overflow: Tensor  # bool (G, R): a score is beyond the dtype that scores are kept in


@dataclass(kw_only=True)
class Softmax:
    """P = softmax of the scores, and by how much each of its entries may be off."""

    p: Tensor  # (G, R, Lk)
    log_p: Tensor  # (G, R, Lk), -inf where hidden
    delta: Tensor  # (G, R, Lk): bound on the score error, that of the exponential included
    lse: Tensor  # (G, R), -inf where nothing is visible
    log_row_sum: Tensor  # (G, R): log of l = Σ exp(S - max), the sink in both
    excess: Tensor  # (G, R, Lk): P (exp(delta) - 1)
    moving: Tensor  # (G, R, Lk): the weight with which V - out may move out
    sink_moving: Tensor | None  # (G, R)
    floor: Tensor  # (G, R): Σ P exp(-delta), 1 where nothing is visible
    sink_p: Tensor | None  # (G, R): the share of the sink
    lse_error: Tensor  # (G, R)

    @property
    def upper(self) -> Tensor:
        """The largest that an honest P may be, (G, R, Lk)."""
        return ((self.p + self.excess) / self.floor[..., None]).clamp_max(1.0)


def score_errors(head: KeyHead, chunk: ChunkScores, units: Units) -> ScoreErrors:
    """Bounds on the error of the scores of this chunk."""
    problem = head.problem
    magnitude = units.scale * (head.queries(chunk.rows).abs() @ head.k.abs().T)
    raw = chunk.raw.abs()
    error = magnitude * (units.gamma(problem.head_dim, 2) + 2 * units.u_operand)
    error = error + 2 * (units.u_s * raw + units.eta_s)
    variance = 2 * (units.u_s * raw).square()
    slope = slope_error = None
    if chunk.tanh is not None:
        t, cap = chunk.tanh.abs(), problem.softcap
        slope = 1 - t.square()
        argument = error / cap + (units.u + units.u_s) * raw / cap
        # tanh(x + e) - tanh(x) <= ∫ J(x) exp(2 e) de, and never more than e.
        tanh_error = torch.minimum(slope * torch.expm1(2 * argument.clamp_max(50)) / 2, argument)
        tanh_error = tanh_error + (units.tanh + 4 * units.u + units.u_s) * t
        slope_error = 2 * t * tanh_error + tanh_error.square() + 2 * units.u
        error = cap * tanh_error + (units.u + units.u_s) * cap * t
        variance = slope.square() * 1.5 * variance + 2 * (units.u_s * cap * t).square()
    if chunk.additive is not None:
        added = _magnitude_of_additive(head, chunk)
        total = chunk.scores.abs()
        error = error + (4 * units.u + 2 * units.u_s) * added + units.u_s * total
        variance = variance + (units.u_s * added).square() + (units.u_s * total).square()
    hidden = ~chunk.visible
    return ScoreErrors(
        error=error.masked_fill(hidden, 0.0),
        variance=(ROUNDING_VARIANCE * variance).masked_fill(hidden, 0.0),
        slope=slope,
        slope_error=slope_error,
        overflow=_overflow(chunk, units),
    )


def _magnitude_of_additive(head: KeyHead, chunk: ChunkScores) -> Tensor:
    """|bias| + |ALiBi|: their sum may be small where both are large."""
    assert chunk.additive is not None
    alibi = alibi_term(head.sequence, head.problem, chunk.query_heads, chunk.rows)
    if alibi is None:
        return chunk.additive.abs()
    return (chunk.additive - alibi).abs() + alibi.abs()


def _overflow(chunk: ChunkScores, units: Units) -> Tensor:
    """Rows, bool (G, R), that 16-bit scores spoil by overflowing, on the way to them too.

    Upwards the row becomes NaN; downwards a key is lost, which matters if it had any weight.
    """
    scores = chunk.scores
    if not units.unfused or not scores.shape[-1]:
        return torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device)
    largest = units.largest_score * (1 - 2 * units.u_s)
    high = low = scores
    if chunk.tanh is None:  # a softcap brings infinities back
        unscaled = chunk.raw / min(units.scale, 1.0) if units.scale else chunk.raw
        high, low = torch.maximum(scores, unscaled), torch.minimum(scores, unscaled)
    weighty = scores > scores.amax(-1, keepdim=True) - _NO_WEIGHT
    lost = (high >= largest) | (low <= -largest) & weighty
    return (chunk.visible & lost).any(-1)


def softmax(head: KeyHead, chunk: ChunkScores, errors: ScoreErrors, units: Units) -> Softmax:
    """P and LSE in fp64, with what the score errors may make of them."""
    sinks, keys = head.sinks(), chunk.scores.shape[-1]
    weights, row_sum, lse = softmax_parts(chunk.scores, sinks)
    log_row_sum = row_sum.log()
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    largest = base - log_row_sum
    # The sink is one more key, the last, whose value is 0.
    scores, p, error = chunk.scores, weights / row_sum[..., None], errors.error
    if sinks is not None:
        logit = sinks[:, None, None].expand(*scores.shape[:2], 1)
        scores = torch.cat([scores, logit], -1)
        p = torch.cat([p, torch.exp(logit - base[..., None])], -1)
        sink_error = (4 * units.u + 2 * units.u_s) * logit.abs()
        error = torch.cat([error, sink_error], -1)
    log_p = scores - base[..., None]
    below = (scores - largest[..., None]).abs()
    delta = error + units.exp + 4 * units.u + 2 * units.u * below
    delta = delta.masked_fill(scores == -torch.inf, 0.0)
    excess = growth(p, log_p, delta)
    floor = (p * torch.exp(-delta)).sum(-1)
    floor = floor.masked_fill(floor == 0, 1.0)
    lse_error = (
        torch.maximum(torch.log1p(excess.sum(-1)), -floor.log())
        + units.gamma(keys, 8)
        + 6 * units.u * (largest.abs() + log_row_sum.abs())
        + units.u_s * base.abs()
        + units.eta_s
    )
    moving = _moving_weight(p, log_p, delta, excess) if units.unfused else excess
    return Softmax(
        p=p[..., :keys],
        log_p=log_p[..., :keys],
        delta=delta[..., :keys],
        lse=lse,
        log_row_sum=log_row_sum,
        excess=excess[..., :keys],
        moving=moving[..., :keys],
        sink_moving=None if sinks is None else moving[..., keys],
        floor=floor,
        sink_p=None if sinks is None else p[..., keys],
        lse_error=lse_error,
    )


def _moving_weight(p: Tensor, log_p: Tensor, delta: Tensor, excess: Tensor) -> Tensor:
    """The weight with which each value may pull the output, where score errors may be large.

    A key with more than half of the weight has a value next to the output, so near that the
    distance cannot be computed. As P (V - out) sums to 0, its pull is at most that of all others
    together under its own error: they take it over.
    """
    if not p.shape[-1]:
        return excess
    top = p.argmax(-1, keepdim=True)
    taken_over = excess + growth(p, log_p, delta.gather(-1, top))
    return torch.where(p.gather(-1, top) > 0.5, taken_over.scatter(-1, top, 0.0), excess)


def growth(p: Tensor, log_p: Tensor, delta: Tensor) -> Tensor:
    """p (exp(delta) - 1), also where exp(delta) overflows and p underflows."""
    near = p * torch.expm1(delta.clamp_max(1.0))
    far = torch.exp((log_p + delta).clamp_max(_LARGEST_EXPONENT)) - p
    return torch.where(delta < 1, near, far)


def centred(softmax: Softmax, weighted: Tensor, square: Tensor, centre: Tensor) -> Tensor:
    """Bound on |Σ (P' - P) Y| for any P' that the score errors allow, (G, R, N).

    ``weighted`` is Σ moving Y and ``square`` Σ moving Y² over the keys, ``centre`` is Σ P Y; the
    sink has Y = 0. By Cauchy and Schwarz on Σ moving |Y - centre| / floor, which holds for
    score errors of any size.
    """
    total = softmax.moving.sum(-1, keepdim=True)
    if softmax.sink_moving is not None:
        total = total + softmax.sink_moving[..., None]
    own = centre.square() * total
    scatter = square - 2 * centre * weighted + own
    scatter = scatter.clamp_min(0.0) + _CANCELLATION * (square + own)
    return (total * scatter).sqrt() / softmax.floor[..., None]
