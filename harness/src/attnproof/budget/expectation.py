"""The expectation of a problem: the fp64 answer, and how far an honest one may be from it.

The bound on each element is derived from the problem and the declared precision, with no
hand-set tolerance; docs/error-budget.md has the derivation, term by term. Oracle and bound are
computed together, a chunk of query rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from attn_reference.inputs import Inputs, output_shape
from attn_reference.precision import Precision
from attn_reference.problem import Problem
from attn_reference.rounding import Rounding
from attn_reference.scores import KeyHead
from attn_reference.sequences import Sequence, sequences

from ..inputs.make import is_iid
from .backward import backward_chunk
from .expected import Expected
from .forward import Forward, forward_chunk
from .gather import KeySums, add_dbias, add_dq, add_dsinks
from .ledger import Ledger
from .units import Units

__all__ = ["Expected", "expectation"]

Head = Callable[[Sequence, Problem, int, Rounding], KeyHead]


@torch.no_grad()
def expectation(
    problem: Problem,
    inputs: Inputs,
    precision: Precision,
    *,
    terms: bool = False,
    iid: bool | None = None,
    head: Head = KeyHead,
) -> dict[str, Expected]:
    """What out, lse and the gradients that ``problem`` names (dq, dk, dv, dbias, dsinks) should be.

    In canonical shapes, on the device of the inputs. ``terms`` keeps the bound by term;
    ``iid`` says whether the inputs are independent and identically distributed, so that out
    gets a sigma (None: as ``inputs.make.is_iid`` says). ``head`` makes the key/value heads:
    one with other scores gives what another attention than that of the problem should be. With
    dropout inputs.keep_mask must be there, and with gradients inputs.grad_out.
    """
    return _Expectation(
        problem, inputs, precision, terms, is_iid(problem) if iid is None else iid, head
    ).carry_out()


class _Expectation:
    """One walk over the sequences, key/value heads and query rows of a problem."""

    def __init__(
        self,
        problem: Problem,
        inputs: Inputs,
        precision: Precision,
        terms: bool,
        iid: bool,
        head: Head,
    ) -> None:
        self.problem, self.inputs, self.iid, self.head = problem, inputs, iid, head
        self.units = Units(problem, precision)
        self.backward = bool(problem.gradients)
        shape = torch.Size(output_shape(problem))
        shapes = {"out": shape, "lse": shape[:-1]}
        self.sources = {f"d{name}": getattr(inputs, name) for name in problem.gradients}
        shapes |= {name: tensor.shape for name, tensor in self.sources.items()}
        device = inputs.q.device
        self.ledgers = {
            name: Ledger(torch.Size(size), device, by_term=terms) for name, size in shapes.items()
        }
        self.ledgers["lse"].value.fill_(-torch.inf)
        self.sigma = torch.zeros(shape, dtype=torch.float64, device=device) if iid else None
        self.freedom = torch.zeros(shape[:-1], dtype=torch.float64, device=device)

    def carry_out(self) -> dict[str, Expected]:
        rounding = Rounding(self.problem, None)
        for sequence in sequences(self.inputs, self.problem):
            for kv_head in range(self.problem.kv_heads):
                self._one_head(self.head(sequence, self.problem, kv_head, rounding), kv_head)
        return {name: self._stored(name) for name in self.ledgers}

    def _stored(self, name: str) -> Expected:
        ledger = self.ledgers[name]
        if name == "lse":
            dtype = torch.float64 if self.problem.dtype == "fp64" else torch.float32
            ledger.touched.fill_(True)  # an LSE of 0 is not structural
        else:
            dtype = self.sources[name].dtype if name in self.sources else self.problem.torch_dtype
        expected = ledger.stored(dtype, self.units.flush)
        if name == "out" and self.sigma is not None:
            expected.sigma, expected.freedom = self.sigma, self.freedom
        return expected

    def _one_head(self, head: KeyHead, kv_head: int) -> None:
        units, sequence = self.units, head.sequence
        keys = {
            name: KeySums(self.ledgers[name], head, kv_head, name, units)
            for name in ("dk", "dv")
            if name in self.ledgers
        }
        # 16-bit accumulators add whole blocks of rows, however the rows are chunked.
        for rows in sequence.chunks(units.block if keys else 1):
            forward = forward_chunk(head, rows, units, iid=self.iid)
            self._forward(head, forward)
            if not self.backward:
                continue
            backward = backward_chunk(head, forward, units)
            for name, add in (("dq", add_dq), ("dbias", add_dbias), ("dsinks", add_dsinks)):
                if name in self.ledgers:
                    add(self.ledgers[name], head, forward, backward, units)
            for sums in keys.values():
                sums.add(forward, backward)
        for sums in keys.values():
            sums.finish()

    def _forward(self, head: KeyHead, f: Forward) -> None:
        """Enter what belongs to out and LSE."""
        rows = (f.chunk.query_heads, f.chunk.rows)
        place = head.sequence.rows
        out, lse = self.ledgers["out"], self.ledgers["lse"]
        out.value[place][rows] = f.out
        out.touched[place][rows] = ~f.silent[..., None]
        out.exact[place][rows] = f.exact[..., None]
        out.excused[place][rows] = f.excused[..., None]
        lse.value[place][rows] = f.softmax.lse
        lse.excused[place][rows] = f.errors.overflow
        for name, term in f.terms.items():
            out.term(name)[place][rows] += term
        finite = f.softmax.lse.isfinite()
        lse.term("scores and sums")[place][rows] += f.softmax.lse_error * finite
        if self.sigma is not None and f.sigma is not None and f.freedom is not None:
            self.sigma[place][rows] = f.sigma
            self.freedom[place][rows] = f.freedom
