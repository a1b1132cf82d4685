"""The forward and the backward pass of V2 on checked arguments, run: what the plain function and
the operators share."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from . import plans
from .arguments import Arguments
from .launch import Result, device_of
from .v2_launches import Launches

FORWARD, BACKWARD = "forward", "backward"
DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")


def forward(x: Arguments, seed: Tensor | None, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv) and lse (B, Hq, Sq); ``splits``: of the keys, None for V2's own rule."""

    def make() -> Result:
        return Launches(x, seed).forward(splits=splits)

    with device_of(x.q):
        if x.plain:
            found = plans.run((x.q, x.k, x.v), (FORWARD, splits, *_options(x)), make)
        else:
            found = make().run()
    return found["out"], found["lse"]


def backward(
    x: Arguments,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    wanted: set[str],
) -> dict[str, Tensor]:
    """The gradients that are ``wanted``, some of ``DIFFERENTIABLE``, by name."""
    refuse_gradients(x.page_table, wanted)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    incoming = grad_out

    def make() -> Result:
        return Launches(x, seed).backward(out, lse, incoming, grad_lse, wanted)

    with device_of(x.q):
        if x.plain and grad_lse is None:
            rest = (BACKWARD, *sorted(wanted), *_options(x))
            found = plans.run((x.q, x.k, x.v, out, lse, grad_out), rest, make)
        else:
            found = make().run()
    if "sinks" in wanted and x.sinks is not None:
        found["sinks"] = _sink_gradient(x.sinks, lse, found["delta"])
    return {name: found[name] for name in DIFFERENTIABLE if name in wanted}


def keep_mask(x: Arguments, seed: Tensor) -> Tensor:
    """What dropout keeps, bool (B, Hq, Sq, Sk)."""
    with device_of(x.q):
        return Launches(x, seed).keep_mask().run()["keep_mask"]


def _options(x: Arguments) -> tuple[Hashable, ...]:
    """The numbers that a plain call has beside its tensors."""
    return x.scale, x.causal, tuple(x.window or ()), x.softcap


def refuse_gradients(page_table: Tensor | None, wanted: set[str]) -> None:
    """NotImplementedError for gradients that V2 does not compute."""
    if page_table is not None and wanted & {"k", "v"}:
        raise NotImplementedError("k and v have no gradients where they are paged")


def _sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """dSinks = sum over rows of P_sink (0 - delta): a sink is a key whose value is 0."""
    share = torch.exp(sinks[:, None] - lse)  # (B, Hq, Sq)
    # Rows behind the last sequence have no sink either, whatever comes in for them.
    return -torch.where(lse == -torch.inf, 0.0, share * delta).sum((0, 2))
