"""Oracle and error budget of out and LSE for a chunk of query rows.

docs/error-budget.md, "Forward", has the derivation and names the same terms.
Shapes: G query heads of one key/value head, R query rows, Lk keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_reference.scores import ChunkScores, KeyHead

from .ledger import Terms
from .scores import (
    ROUNDING_VARIANCE,
    ScoreErrors,
    Softmax,
    centred,
    score_errors,
    softmax,
)
from .units import OVERFLOW, Units, block_sums

# Relative variance of the square of one rounding error (of the fourth moment).
SQUARE_VARIANCE = 1.1
# Underflow errors below this are not resolved key by key.
_TINY = 1e-30


@dataclass(kw_only=True)
class Forward:
    """out and LSE of a chunk, their bounds before the final store, and what backward reuses."""

    chunk: ChunkScores
    errors: ScoreErrors
    softmax: Softmax
    kept: Tensor | None  # (G, R, Lk): keep_mask / (1 - dropout), with dropout
    out: Tensor  # (G, R, Dv)
    terms: Terms  # of the bound on out, (G, R, Dv) each
    underflow: Tensor  # (G, R, Lk): absolute error of P (normalised) by underflow
    seen: Tensor  # bool (G, R, Lk): visible and kept
    empty: Tensor  # bool (G, R): no visible key
    silent: Tensor  # bool (G, R): nothing visible is kept
    exact: Tensor  # bool (G, R): one key has all the weight, so that out is its value
    excused: Tensor  # bool (G, R): not determined by the declared precision
    sigma: Tensor | None  # (G, R, Dv)
    freedom: Tensor | None  # (G, R)


def dropped(forward: Forward, tensor: Tensor) -> Tensor:
    """``tensor`` (G, R, Lk) times what dropout does to P."""
    return tensor if forward.kept is None else tensor * forward.kept


def forward_chunk(head: KeyHead, rows: slice, units: Units, *, iid: bool) -> Forward:
    """Oracle and budget of these query rows; sigma and freedom only for iid inputs."""
    chunk = head.scores(rows)
    errors = score_errors(head, chunk, units)
    soft = softmax(head, chunk, errors, units)
    kept = head.kept(rows)
    factor = None if kept is None else kept.double() * units.keep
    visible = chunk.visible
    seen = visible if kept is None else visible & kept
    empty, silent = ~visible.any(-1), ~seen.any(-1)
    result = Forward(
        chunk=chunk,
        errors=errors,
        softmax=soft,
        kept=factor,
        out=torch.empty(0),
        terms={},
        underflow=_underflow(soft, chunk, units),
        seen=seen,
        empty=empty,
        silent=silent,
        exact=_one_key(head, soft, chunk, units),
        excused=errors.overflow,
        sigma=None,
        freedom=None,
    )
    result.out = dropped(result, soft.p) @ head.v
    _bound(result, head, units)
    if iid:
        _spread(result, head, units)
    return result


def _bound(f: Forward, head: KeyHead, units: Units) -> None:
    """The terms of the bound on out."""
    soft, v = f.softmax, head.v
    size = v.abs()
    pull = dropped(f, soft.moving)
    moved = centred(soft, pull @ v, dropped(f, pull) @ v.square(), f.out)
    reach = units.keep * _largest(size) + f.out.abs()
    weight = torch.minimum(dropped(f, soft.upper) @ size, units.keep * _largest(size))
    keys = v.shape[0]
    f.terms = {
        # Whatever the scores, out is a mean of values: it cannot leave their range.
        "scores": torch.minimum(moved, reach).where(~moved.isnan(), reach),
        "P rounding": (units.p_roundings * units.u_p + units.u_operand_p) * weight,
        "underflow of P": _underflow_sum(f, size, units),
        "accumulation": (units.gamma(keys, 8) + units.u_operand) * weight,
    }
    if units.u_sum["out"]:
        partial, largest = _partial_sums(f, head, units)
        f.terms["16-bit accumulator"] = partial
        f.excused = f.excused | (largest >= OVERFLOW * units.largest_sum["out"]).any(-1)


def _largest(size: Tensor) -> Tensor:
    """The largest magnitude in each column of V, (Dv,)."""
    if not size.shape[0]:
        return size.new_zeros(size.shape[-1])
    return size.nan_to_num(nan=0.0).amax(0)


def _underflow(soft: Softmax, chunk: ChunkScores, units: Units) -> Tensor:
    """By how much the stored P, (G, R, Lk), may err because it is subnormal.

    A fused kernel stores exp(S - max), to be divided by the row sum; an unfused one stores P.
    """
    high, low = soft.p + soft.excess, soft.p * torch.exp(-soft.delta)
    if units.unfused:
        unit = torch.ones_like(soft.log_row_sum)[..., None]
    else:
        unit = soft.log_row_sum.exp()[..., None]
    small = chunk.visible & (low * unit < 2 * units.normal_p)
    error = (high * unit).clamp_max(units.eta_p) / unit
    return error * small


def _underflow_sum(f: Forward, size: Tensor, units: Units) -> Tensor:
    """Σ of those errors times |V|, (G, R, Dv)."""
    if units.eta_p > _TINY:
        return units.p_underflows * dropped(f, f.underflow) @ size
    total = units.p_underflows * units.keep * f.underflow.sum(-1)
    return total[..., None] * _largest(size)


def _partial_sums(f: Forward, head: KeyHead, units: Units) -> tuple[Tensor, Tensor]:
    """What a 16-bit accumulator of out loses, and the largest partial sum, (G, R, Dv) each.

    After every block of keys the sum is rounded, and once more when it is rescaled to a new
    maximum; the partial sums, in units of the final one, are those of P V.
    """
    lost, largest = block_sums(dropped(f, f.softmax.p), head.v, units.block, 2 * units.u_sum["out"])
    row_sum = f.softmax.log_row_sum.exp()[..., None]
    blocks = -(-head.v.shape[0] // units.block)
    return lost + 2 * blocks * units.eta_sum["out"] / row_sum, largest * row_sum


def _one_key(head: KeyHead, soft: Softmax, chunk: ChunkScores, units: Units) -> Tensor:
    """Rows, bool (G, R), in which every P but one is 0 in fp32 whatever the rounding, and that one
    rounds to 1: out is a row of V, exactly, where V is stored in 16 bits.

    A kernel that computes exp(x c - m c) with one multiply-add has rounded m c, by u |m c|: that is
    the same for P and for the row sum, but must not show when P is rounded to 16 bits.
    """
    problem = head.problem
    sixteen_bits = units.u_out > max(units.u, 3 * units.exp) and not units.flush
    if not sixteen_bits or problem.dropout or problem.sinks or not chunk.scores.shape[-1]:
        return torch.zeros(chunk.scores.shape[:2], dtype=torch.bool, device=chunk.scores.device)
    reachable = (soft.log_p + soft.delta).masked_fill(~chunk.visible, -torch.inf)
    largest = chunk.scores.amax(-1).abs()
    shows = units.u * largest > units.u_out / 4
    # The one key's own error counts against it; below -110 nats exp is 0 in fp32.
    top = reachable.argmax(-1, keepdim=True)
    own = soft.delta.gather(-1, top)[..., 0]
    others = reachable.scatter(-1, top, -torch.inf).amax(-1)
    return chunk.visible.any(-1) & (others + own < -110) & ~shows


def _spread(f: Forward, head: KeyHead, units: Units) -> None:
    """Sigma, the standard deviation of the error of out, and the freedom of each row.

    The error of a row is a sum over keys of independent errors of P times values, which are
    independent too: the first make it the same size all along the row, the second make it
    vary. Underflow takes P away whole, so that it counts with its bound.
    """
    soft, v = f.softmax, head.v
    square = v.square()
    p2 = dropped(f, soft.p).square()
    noise = ROUNDING_VARIANCE * units.p_roundings * units.u_p**2 * p2
    noise = noise + units.p_underflows * dropped(f, f.underflow).square()
    by_key = noise @ square
    if units.unfused:
        variance = f.errors.variance
        once = dropped(f, soft.p.square() * variance)
        centre = (soft.p.square() * variance).sum(-1, keepdim=True)
        scatter = dropped(f, once) @ square - 2 * f.out * (once @ v) + f.out.square() * centre
        by_key = by_key + scatter.clamp_min(0.0)
        noise = noise + p2 * variance
        flat = torch.zeros_like(f.out)
    else:
        flat = (f.terms["scores"] / 3).square()
    flat = flat + (4 * units.u * (dropped(f, soft.p) @ v.abs())).square()
    if "16-bit accumulator" in f.terms:
        flat = flat + (f.terms["16-bit accumulator"] / 2).square()
    half_ulp = units.u_out * torch.exp2(f.out.abs().clamp_min(1e-300).log2().floor())
    flat = flat + half_ulp.clamp_min(units.eta_out).square() / 3
    f.sigma = (by_key + flat).sqrt()
    share = by_key.mean(-1) / (by_key + flat).mean(-1).clamp_min(1e-300)
    errors = noise.sum(-1).square() / noise.square().sum(-1).clamp_min(1e-300)
    spread = 2 / v.shape[-1] + SQUARE_VARIANCE * share.square() / errors.clamp_min(1)
    f.freedom = (2 / spread).masked_fill(f.silent | f.excused, 0.0)
