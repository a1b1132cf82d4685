"""What one call leaves behind for the next: nothing.

Two calls are made in one process, and both are judged after the second, so that a result
whose memory is used again shows as well.
"""

from dataclasses import replace
from typing import Any

from attn_reference.problem import Problem

from ..cases import cases
from ..plan import Call, Plan
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, GRADIENTS, in_each_dtype, lengths, turning
from .requirements import require_cuda


def _both(subject: Subject, first: Problem, second: Problem, **call: Any) -> None:
    """Judge two calls, made one after the other."""
    prepared = [subject.prepare(problem) for problem in (first, second)]
    plan = Plan(calls=[Call(problem=p, inputs=i, **call) for p, i in prepared])
    results = subject.run(plan)
    for (problem, inputs), result in zip(prepared, results, strict=True):
        subject.judge(problem, inputs, result)


@cases(
    quick=in_each_dtype(
        turning(({}, {"heads_q": 2}, {"gradients": GRADIENTS}), seqlen_q=65, seqlen_k=97),
        fewest=True,
    ),
    full=problems(
        {
            "lengths": lengths((64, 64), (1, 97), (65, 33)),
            "dtype": DTYPES,
            "gradients": ((), GRADIENTS),
        },
        heads_q=2,
    ),
    feature="state",
)
def test_other_values(problem: Problem, subject: Subject) -> None:
    """The same shapes with other values: an answer that was kept is the wrong one."""
    _both(subject, replace(problem, seed=problem.seed + 1), problem)


@cases(
    quick=in_each_dtype(
        turning(({"scale": 0.3}, {"scale": 0.05, "gradients": GRADIENTS}), seqlen_q=65), fewest=True
    ),
    full=problems(
        {"scale": (0.05, 0.5), "dtype": DTYPES, "gradients": ((), GRADIENTS)}, seqlen_q=65
    ),
    feature="state",
)
def test_other_scale(problem: Problem, subject: Subject) -> None:
    """The same inputs under the default scale, then under another."""
    _both(subject, replace(problem, scale=None), problem)


@cases(
    quick=turning(lengths((65, 97), (33, 129), (17, 16)), heads_q=2),
    full=problems(
        {
            "lengths": lengths((65, 97), (33, 129), (1, 300), (128, 64)),
            "dtype": DTYPES,
            "gradients": ((), GRADIENTS),
        },
        heads_q=2,
    ),
    feature="state",
)
def test_other_shape(problem: Problem, subject: Subject) -> None:
    """A longer problem first: a launch or a buffer of its size does not fit this one."""
    longer = replace(problem, seqlen_q=problem.seqlen_q + 64, seqlen_k=problem.keys + 70, batch=2)
    _both(subject, longer, problem)


@cases(
    quick=in_each_dtype(
        turning(({"head_dim": 64}, {"head_dim": 128}), seqlen_q=33, seqlen_k=65), fewest=True
    ),
    full=problems({"head_dim": (32, 64, 128), "dtype": DTYPES}, seqlen_q=65),
    feature="state",
)
def test_other_dtype_and_dim(problem: Problem, subject: Subject) -> None:
    """Another head dimension first, under which a compiled kernel may have been kept."""
    _both(subject, replace(problem, head_dim=2 * problem.head_dim, head_dim_v=None), problem)


@cases(
    quick=in_each_dtype(
        turning(
            ({"causal": "top-left"}, {"causal": "bottom-right"}, {"causal": "none"}),
            seqlen_q=65,
            seqlen_k=97,
            heads_q=2,
        ),
        fewest=True,
    ),
    full=problems(
        {"causal": ("none", "top-left", "bottom-right"), "dtype": DTYPES},
        seqlen_q=65,
        seqlen_k=97,
        heads_q=2,
    ),
    feature="state",
)
def test_mask_before(problem: Problem, subject: Subject) -> None:
    """A boolean mask in the call before: it must be gone."""
    _both(subject, replace(problem, causal="none", mask="random"), problem)


@cases(
    quick=in_each_dtype(
        turning(
            ({"layouts": (("q", "bshd"), ("k", "bshd"), ("v", "bshd"))}, {}), batch=2, heads_q=3
        ),
        fewest=True,
    ),
    full=problems(
        {
            "layouts": (
                (),
                (("k", "bshd"),),
                (("q", "bhds"), ("v", "bhsd+gap")),
            ),
            "dtype": DTYPES,
        },
        batch=2,
        heads_q=3,
        seqlen_q=65,
    ),
    feature="state",
)
def test_other_strides(problem: Problem, subject: Subject) -> None:
    """The same shapes in another memory layout first."""
    other = () if problem.layouts else (("q", "bshd"), ("k", "bhds"), ("v", "bshd"))
    _both(subject, replace(problem, layouts=other), problem)


@cases(
    quick=in_each_dtype(
        turning(({}, {"gradients": GRADIENTS}), seqlen_q=129, heads_q=4), fewest=True
    ),
    full=problems({"dtype": DTYPES, "gradients": ((), GRADIENTS)}, seqlen_q=1024, heads_q=8),
    feature="side stream",
)
def test_side_stream(problem: Problem, subject: Subject) -> None:
    """On a CUDA stream of the caller's, whose inputs are written late."""
    require_cuda(subject, "CUDA streams")
    _both(subject, replace(problem, seed=problem.seed + 1), problem, side_stream=True)


@cases(
    quick=in_each_dtype(turning(({}, {"heads_q": 4}), seqlen_q=129), fewest=True),
    full=problems({"dtype": DTYPES, "causal": ("none", "top-left", "bottom-right")}, seqlen_q=300),
    feature="graph replay",
)
def test_graph_replay(problem: Problem, subject: Subject) -> None:
    """Captured into a CUDA graph with other values, and replayed with these."""
    require_cuda(subject, "CUDA graphs")
    _both(subject, replace(problem, seed=problem.seed + 1), problem, graph_replay=True)
