"""Oracle and error budget of the gradients, a chunk of query rows at a time.

docs/error-budget.md, "Backward", has the derivation and names the same terms. Written over
the score-shaped quantities, with M what dropout does to P, J the slope of the softcap:

    X = M∘dP - Δ + dLSE        G = P∘X (the gradient of bias)        dS = J∘G

Shapes: G query heads of one key/value head, R query rows, Lk keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attn_reference.scores import KeyHead

from .forward import Forward, dropped
from .ledger import Terms, sum_of
from .scores import growth
from .units import OVERFLOW, Units


@dataclass(kw_only=True)
class Backward:
    """Score-shaped gradients of a chunk and the bounds on their error by term, (G, R, Lk)."""

    p: Tensor  # M∘P, the operand of dV
    p_terms: Terms
    g: Tensor
    g_terms: Terms
    ds: Tensor
    ds_terms: Terms
    grad_out: Tensor  # (G, R, Dv)
    sinks: Tensor | None  # (G, R): gradient of the sinks, before the sum over rows
    sink_error: Tensor | None  # (G, R)
    excused: Tensor  # bool (G, R): not determined by the declared precision


def backward_chunk(head: KeyHead, f: Forward, units: Units) -> Backward:
    """Everything score-shaped of these query rows."""
    rows, heads, sequence = f.chunk.rows, f.chunk.query_heads, head.sequence
    soft, visible = f.softmax, f.chunk.visible
    assert sequence.grad_out is not None
    grad_out = sequence.grad_out[heads, rows].double()
    product = grad_out @ head.v.T
    product_error = (
        (units.gamma(head.v.shape[-1], 2) + 2 * units.u_operand) * (grad_out.abs() @ head.v.abs().T)
        + units.dp_roundings * units.u_s * product.abs()
        + units.eta_s
    )
    dp, dp_error = dropped(f, product), dropped(f, product_error)
    delta = (soft.p * dp).sum(-1)
    delta_error = _delta_error(head, f, units, grad_out, dp, dp_error, delta)
    incoming = torch.zeros_like(delta)
    if head.problem.lse_gradient:
        assert sequence.grad_lse is not None
        incoming = sequence.grad_lse[heads, rows].double()
    slack = incoming - delta
    slack_error = delta_error + 3 * units.u * (incoming.abs() + delta.abs())

    x = dp + slack[..., None]
    x_error = dp_error + 3 * units.u * dp.abs()
    base = soft.lse.masked_fill(soft.lse == -torch.inf, 0.0)
    rho = soft.delta + soft.lse_error[..., None]
    rho = rho + 2 * units.u * (base.abs()[..., None] + f.chunk.raw.abs())
    recomputed = growth(soft.p, soft.log_p, rho.masked_fill(~visible, 0.0))
    recomputed = recomputed + units.exp_underflow * visible.double()
    rounded = units.p_roundings * units.u_p + units.u_operand_p
    g_rounded = torch.zeros_like(soft.p)
    if units.unfused:  # dS is formed from the stored P, which is at most 1
        recomputed = recomputed.clamp_max(1.0)
        g_rounded = units.u_p * (soft.p + recomputed) + f.underflow
    elif units.u_gradient_p:
        eta, normal = units.eta_gradient_p, units.normal_gradient_p
        g_rounded = units.u_gradient_p * (soft.p + recomputed)
        g_rounded = g_rounded + _underflow(soft.p, recomputed, visible, eta, normal)
    p_upper = soft.p + recomputed + g_rounded
    g = soft.p * x
    g_terms = {
        "scores": recomputed * x.abs(),
        "P rounding": g_rounded * x.abs(),
        "dP": p_upper * x_error,
        "delta": p_upper * slack_error[..., None],
    }
    g_error = sum_of(g_terms)
    sinks, sink_error = _sink_rows(head, f, units, slack, slack_error)
    ds, ds_terms = _through_softcap(f, units, g, g_terms, g_error)
    stored = units.u_p if not units.unfused else units.u_s
    overflow = (product.abs() >= OVERFLOW * units.largest_score) & visible
    overflow = overflow | (ds.abs() * max(units.scale, 1.0) >= OVERFLOW * units.largest_p)
    return Backward(
        p=dropped(f, soft.p),
        p_terms={
            "scores": dropped(f, recomputed),
            "P rounding": dropped(f, rounded * (soft.p + recomputed)),
            "underflow of P": units.p_underflows
            * dropped(f, _underflow(soft.p, recomputed, visible, units.eta_p, units.normal_p)),
        },
        g=g,
        g_terms={
            **g_terms,
            "dS rounding": stored * (g.abs() + g_error) + units.eta_p * visible.double(),
        },
        ds=ds,
        ds_terms=ds_terms,
        grad_out=grad_out,
        sinks=sinks,
        sink_error=sink_error,
        excused=f.excused | overflow.any(-1),
    )


def _delta_error(
    head: KeyHead,
    f: Forward,
    units: Units,
    grad_out: Tensor,
    dp: Tensor,
    dp_error: Tensor,
    delta: Tensor,
) -> Tensor:
    """Bound on the error of Δ, (G, R).

    A fused kernel forms Δ = rowsum(dOut ∘ Out) from the stored out, whose error is the same
    for all keys of a row: that of P is followed through P·dP, which is tighter than |dOut| times
    the bound on out. An unfused one forms Δ = Σ P dP from the stored P and dP.
    """
    soft = f.softmax
    size = dp.abs() * f.chunk.visible
    # Whatever the scores, Δ is a mean of M∘dP.
    largest = size.amax(-1) if size.shape[-1] else delta.abs()
    moved = (soft.moving * (dp - delta[..., None]).abs()).sum(-1)
    if soft.sink_moving is not None:
        moved = moved + soft.sink_moving * delta.abs()
    upper = soft.upper
    rounded = units.p_roundings * units.u_p + units.u_operand_p
    error = (
        torch.minimum(moved / soft.floor, largest + delta.abs())
        + rounded * torch.minimum((upper * size).sum(-1), largest)
        + units.p_underflows * (f.underflow * size).sum(-1)
        + units.gamma(head.v.shape[-1], 2) * (grad_out.abs() * f.out.abs()).sum(-1)
    )
    if units.unfused:
        gathered = (units.gamma(head.v.shape[0], 8) * size + dp_error) * f.chunk.visible
        mean = (upper * gathered).sum(-1)
        if gathered.shape[-1]:
            mean = torch.minimum(mean, gathered.amax(-1))
        return error + mean
    independent = f.terms["accumulation"] + units.u_out * f.out.abs() + units.eta_out
    if "16-bit accumulator" in f.terms:
        independent = independent + f.terms["16-bit accumulator"]
    return error + (grad_out.abs() * independent).sum(-1)


def _underflow(p: Tensor, error: Tensor, visible: Tensor, eta: float, normal: float) -> Tensor:
    """Absolute error of a stored, normalised P where it may be subnormal, (G, R, Lk)."""
    small = visible & (p - error < 2 * normal)
    return (p + error).clamp_max(eta) * small


def _through_softcap(
    f: Forward, units: Units, g: Tensor, g_terms: Terms, g_error: Tensor
) -> tuple[Tensor, Terms]:
    """dS = J∘G and the bound on its error as an operand of dQ and dK."""
    visible, errors = f.chunk.visible, f.errors
    ds, terms = g, dict(g_terms)
    if errors.slope is not None and errors.slope_error is not None:
        ds = g * errors.slope
        terms = {name: term * errors.slope for name, term in g_terms.items()}
        terms["softcap slope"] = (g.abs() + g_error) * errors.slope_error
    largest = ds.abs() + sum_of(terms)
    # Some kernels scale dS before they store it: then it underflows earlier.
    scale = min(units.scale, 1.0) or 1.0
    small = visible & (2 * ds.abs() - largest < 2 * units.normal_p / scale)
    terms["dS rounding"] = units.ds_roundings * (
        (units.u_ds + units.u_operand_p) * largest + largest.clamp_max(units.eta_p / scale) * small
    )
    return ds, terms


def _sink_rows(
    head: KeyHead, f: Forward, units: Units, slack: Tensor, slack_error: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """P_sink (dLSE - Δ) of every row and the bound on its error, (G, R)."""
    soft, sinks = f.softmax, head.sinks()
    if soft.sink_p is None or sinks is None:
        return None, None
    logit = sinks[:, None]
    rho = soft.lse_error + 2 * units.u_s * logit.abs() + units.exp
    rho = rho + 4 * units.u * (1 + logit.abs() + soft.lse.abs())
    off = growth(soft.sink_p, logit - soft.lse, rho) + units.exp_underflow
    if units.unfused:
        stored = units.u_p * (soft.sink_p + off)
        off = off + stored + (soft.sink_p + off).clamp_max(units.eta_p)
    value = soft.sink_p * slack
    error = off * slack.abs() + (soft.sink_p + off) * slack_error
    return value, error + units.u_s * (value.abs() + error) + units.eta_s
