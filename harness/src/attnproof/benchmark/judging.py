"""Whether what a timed call returned is attention: the judge of ``check``, on a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from attn_reference.inputs import Attention, Gradients
from attn_reference.precision import Precision

from ..backend import Capabilities
from ..judge.judging import judge
from ..plan import CallResult
from ..verdict import Status
from .draw import drawn
from .sample import Sample, part_of
from .suites import Cell


def deviation(
    cell: Cell,
    seed: int,
    sample: Sample,
    returned: Mapping[str, Tensor],
    precision: Precision,
    capabilities: Capabilities,
    device: str,
) -> str | None:
    """What is wrong with the sampled parts that came back, in a sentence; None if they conform.

    ``returned`` holds out and, with gradients, dq, dk and dv: on ``device``, where the inputs of
    that seed are drawn again, out of the target's reach. A backward pass is judged together with
    the out that went into it.
    """
    problem, inputs = part_of(cell.problem, drawn(cell.problem, seed, device), sample)
    if cell.direction == "forward":  # what autograd recorded was not asked for its gradients
        problem = problem.replace(gradients=())
    gradients = {name: returned.get(f"d{name}") for name in problem.gradients}
    out = returned.get("out")
    result = CallResult(
        attention=None if out is None else Attention(out=out), gradients=Gradients(**gradients)
    )
    # The public functions of libraries return no LSE: it is ``check`` that judges it.
    verdict = judge(problem, inputs, result, precision, replace(capabilities, returns_lse=False))
    return None if verdict.status is Status.CONFORMS else f"{verdict.status}: {verdict.reason}"
