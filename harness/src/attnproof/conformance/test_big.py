"""Indices beyond 32 bits and beyond 65,535, with few elements.

Tensors of a few rows are spread over 2^31 elements by their strides; on the CPU the memory
between the rows is never touched, so that it need not exist. On a GPU it must.
"""

from attn_reference.problem import Problem

from ..cases import cases
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, GRADIENTS, in_each_dtype, joined, lengths, turning
from .requirements import require_device_memory

FAR = tuple((name, f"{order}+far") for name in "qkv" for order in ("bhsd", "sbhd", "hbsd"))
FAR_BYTES = (1 << 31) * 4 + (1 << 30)


@cases(
    quick=turning(
        (
            {"layouts": (("k", "bhsd+far"),)},
            {"layouts": (("v", "sbhd+far"),)},
            {"layouts": (("q", "hbsd+far"),)},
        ),
        batch=2,
        heads_q=3,
        seqlen_q=17,
        seqlen_k=33,
    ),
    full=joined(
        (
            problems(
                {
                    "layouts": tuple((layout,) for layout in FAR),
                    "dtype": DTYPES,
                    "gradients": ((), GRADIENTS),
                },
                batch=2,
                heads_q=3,
                seqlen_q=17,
                seqlen_k=33,
            ),
            turning(
                [{"layouts": (("grad_out", f"{order}+far"),)} for order in ("bhsd", "sbhd")],
                batch=2,
                heads_q=3,
                seqlen_q=17,
                gradients=GRADIENTS,
            ),
        )
    ),
    feature="large offsets",
)
def test_strides(problem: Problem, subject: Subject) -> None:
    """Offsets beyond 2^31 elements: batch, head or row times its stride."""
    require_device_memory(subject, FAR_BYTES)
    subject.check(problem)


@cases(
    quick=in_each_dtype(turning(lengths((3, 70000), (70000, 3)), head_dim=16)),
    full=joined(
        (
            problems({"lengths": lengths((3, 70000), (70000, 3)), "dtype": DTYPES}, head_dim=16),
            # Not the gradients that are sums over so many rows: they drown in their rounding.
            problems(
                {
                    "case": (
                        {"seqlen_q": 70000, "seqlen_k": 3, "gradients": ("q",)},
                        {"seqlen_q": 3, "seqlen_k": 70000, "gradients": ("k", "v")},
                    ),
                    "dtype": DTYPES,
                },
                head_dim=16,
            ),
        )
    ),
    feature="long sequences",
)
def test_long_sequences(problem: Problem, subject: Subject) -> None:
    """More than 65,535 queries or keys: a grid dimension of a GPU holds no more."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        turning(
            ({"mask": "random", "mask_shape": "111k"},), seqlen_q=3, seqlen_k=70000, head_dim=16
        )
    ),
    full=problems(
        {"dtype": DTYPES, "mask_shape": ("11qk", "111k")},
        mask="random",
        seqlen_q=3,
        seqlen_k=70000,
        head_dim=16,
    ),
    feature="boolean mask",
)
def test_long_mask(problem: Problem, subject: Subject) -> None:
    """A mask over more than 65,535 keys."""
    subject.check(problem)


@cases(
    full=problems(
        {"seqlen_k": (1, 5), "dtype": DTYPES},
        heads_q=70000,
        heads_kv=1,
        seqlen_q=1,
        head_dim=16,
    ),
    feature="many heads",
)
def test_many_heads(problem: Problem, subject: Subject) -> None:
    """More than 65,535 heads: a grid dimension of a GPU holds no more."""
    subject.check(problem)
