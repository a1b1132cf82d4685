"""Memory layouts: whatever the strides, the answer is the same.

Each tensor gets a layout of its own: transposed, with the head dimension strided, starting one
element into its storage, with gaps between its rows, expanded through stride 0.
"""

from typing import Any

from attn_reference.problem import Problem

from ..cases import cases
from ..subject import Subject
from .cover import cover
from .recipe import DTYPES, GRADIENTS, in_each_dtype, joined

CONTIGUOUS = "bhsd"
QUICK = (CONTIGUOUS, "bshd", "bhds", "bhsd+offset")
FULL = (*QUICK, "sbhd", "hbsd", "bhsd+gap", "bshd+offset+gap", "bsdh")


def _covered(
    tensors: tuple[str, ...],
    layouts: tuple[str, ...],
    *,
    dtypes: tuple[str, ...] = DTYPES,
    **base: Any,
) -> tuple[Problem, ...]:
    """A pairwise cover of the layouts of these tensors and of dtypes, at least one tensor
    of each problem lying other than contiguous."""

    def valid(row: dict[str, str]) -> bool:
        return any(row[name] != CONTIGUOUS for name in tensors)

    rows = cover({**dict.fromkeys(tensors, layouts), "dtype": dtypes}, valid)
    return tuple(
        Problem(
            dtype=row["dtype"],
            layouts=tuple((n, row[n]) for n in tensors if row[n] != CONTIGUOUS),
            **base,
        )
        for row in rows
    )


def _pattern(**fields: Any) -> dict[str, Any]:
    return fields


@cases(
    quick=_covered(("q", "k", "v"), QUICK[:3], batch=2, heads_q=3, seqlen_q=17, seqlen_k=33)
    + _covered(("q", "k", "v"), ("bhsd+offset", "bhsd+gap"), batch=2, heads_q=3, seqlen_q=65),
    full=_covered(("q", "k", "v"), FULL, batch=2, heads_q=3, seqlen_q=65, seqlen_k=97),
    feature="layout",
)
def test_strides(problem: Problem, subject: Subject) -> None:
    """q, k and v, each laid out in another way."""
    subject.check(problem)


@cases(
    quick=_covered(("q", "v"), QUICK[:2], batch=2, heads_q=6, heads_kv=2, seqlen_q=33),
    full=_covered(("q", "k", "v"), FULL[:6], batch=2, heads_q=6, heads_kv=2, seqlen_q=65),
    feature="layout",
)
def test_strides_with_groups(problem: Problem, subject: Subject) -> None:
    """Strides of the heads where several query heads share a key/value head."""
    subject.check(problem)


@cases(
    quick=_covered(
        ("q", "grad_out"),
        (CONTIGUOUS, "bshd", "bhds"),
        batch=2,
        heads_q=3,
        seqlen_q=33,
        seqlen_k=65,
        gradients=GRADIENTS,
    ),
    full=_covered(
        ("q", "k", "v", "grad_out"),
        FULL,
        batch=2,
        heads_q=3,
        seqlen_q=65,
        gradients=GRADIENTS,
    ),
    feature="layout",
)
def test_gradients(problem: Problem, subject: Subject) -> None:
    """The incoming gradient is laid out as the loss leaves it: seldom as out is."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        joined(
            _covered(
                (kind,),
                ("expand", "bhds", "bhsd+offset", "bhsd+gap"),
                dtypes=(dtype,),
                batch=2,
                heads_q=3,
                seqlen_q=33,
                seqlen_k=65,
                **pattern,
            )
            for kind, dtype, pattern in (
                ("mask", "fp32", _pattern(mask="random", mask_shape="11qk")),
                ("bias", "bf16", _pattern(bias="normal", bias_shape="11qk")),
            )
        )
    ),
    full=joined(
        _covered(
            (kind,),
            ("expand", "bhds", "bshd", "sbhd", "bhsd+offset", "bhsd+gap", "bhds+expand"),
            batch=2,
            heads_q=3,
            seqlen_q=65,
            seqlen_k=129,
            **pattern,
        )
        for shape in ("11qk", "b11k", "1h1k", "bhqk")
        for kind, pattern in (
            ("mask", _pattern(mask="random", mask_shape=shape)),
            ("bias", _pattern(bias="normal", bias_shape=shape)),
        )
    ),
    feature="layout",
)
def test_masks(problem: Problem, subject: Subject) -> None:
    """Masks and biases: expanded through stride 0, transposed, not aligned."""
    subject.check(problem)
