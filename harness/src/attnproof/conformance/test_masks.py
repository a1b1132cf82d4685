"""Which keys a query sees, and what is added to its scores.

Inputs are chosen so that a single key too many or too few shows: windows of few keys, needles,
queries on both sides of the corner of a causal mask.
"""

from typing import Any

from attn_reference.problem import Problem

from ..cases import cases
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, each_dtype, in_each_dtype, joined, lengths, rules_hide, turning

ALIGNMENTS = ("top-left", "bottom-right")
# Positional rules, one class of capabilities each.
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"causal": "top-left"},
    {"causal": "bottom-right"},
)
WINDOWS = (
    (1, 0),
    (0, 1),
    (0, 0),
    (2, 3),
    (63, 0),
    (64, 64),
    (127, 5),
    (None, 0),
    (16, None),
    (200, 200),
)
MASKS = (
    "random",
    "sparse",
    "alternate",
    "empty-rows",
    "nothing",
    "first-tile",
    "last-tile",
    "row-prefix",
    "tiles",
)
MASK_SHAPES = ("bhqk", "b1qk", "11qk", "1h1k", "b11k")
BIASES = ("normal", "large", "neginf-prefix", "neginf-random", "neginf-rows", "lowest-rows")


def _causal(problem: Problem) -> str:
    return f"causal {problem.causal}"


@cases(
    quick=joined(
        turning(
            lengths((64, 64), (65, 127), (129, 33), (17, 16), (1, 65), (113, 257)),
            causal=causal,
            heads_q=2,
        )
        for causal in ALIGNMENTS
    ),
    full=joined(
        each_dtype(
            {
                "seqlen_q": (1, 16, 63, 64, 65, 127, 129, 257),
                "seqlen_k": (1, 16, 63, 64, 65, 127, 129, 257),
                "head_dim": (32, 64, 128),
            },
            accept=rules_hide,
            causal=causal,
        )
        for causal in ALIGNMENTS
    ),
    feature=_causal,
)
def test_causal(problem: Problem, subject: Subject) -> None:
    """Causality from either corner, with more queries than keys and with fewer."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        (
            Problem(seqlen_q=2000, dtype="bf16", causal="top-left", distribution="needles"),
            Problem(seqlen_q=2000, dtype="bf16", causal="bottom-right", distribution="needles"),
            Problem(seqlen_q=300, seqlen_k=257, causal="top-left", distribution="needles"),
            Problem(seqlen_q=257, seqlen_k=300, causal="bottom-right", distribution="needles"),
        )
    ),
    full=problems(
        {
            "causal": ALIGNMENTS,
            "lengths": lengths((127, 127), (128, 128), (1031, 1031), (300, 257), (65, 1000)),
            "dtype": DTYPES,
        },
        distribution="needles",
    ),
    feature=_causal,
)
def test_causal_needles(problem: Problem, subject: Subject) -> None:
    """Each key that is visible at all dominates for one of the queries that see it."""
    subject.check(problem)


@cases(
    quick=joined(
        (
            turning([{"window": window} for window in WINDOWS[:9]], seqlen_q=130, seqlen_k=150),
            turning(
                [{"window": (5, 0)}, {"window": (64, None)}, {"window": (1, 0)}],
                causal="bottom-right",
                seqlen_q=65,
                seqlen_k=150,
            ),
            turning(
                [{"window": (5, 0)}, {"window": (64, None)}, {"window": (1, 0)}],
                causal="top-left",
                seqlen_q=150,
                seqlen_k=130,
            ),
        )
    ),
    full=joined(
        problems(
            {
                "window": WINDOWS,
                "lengths": lengths((128, 128), (65, 257), (257, 65), (300, 300)),
                "dtype": DTYPES,
            },
            accept=rules_hide,
            causal=causal,
        )
        for causal in ("none", *ALIGNMENTS)
    ),
    feature="window",
)
def test_window(problem: Problem, subject: Subject) -> None:
    """Inclusive windows, so narrow that one key more or less is seen at once."""
    subject.check(problem)


@cases(
    quick=joined(
        (
            turning(
                [{"mask": mask} for mask in MASKS],
                batch=2,
                heads_q=3,
                seqlen_q=65,
                seqlen_k=300,
            ),
            turning(
                [{"mask_shape": shape} for shape in MASK_SHAPES[1:]],
                mask="random",
                batch=2,
                heads_q=3,
                seqlen_q=33,
                seqlen_k=65,
            ),
            # Scores beyond -1e4: no finite number hides a key.
            turning([{"mask": "one-key"}], distribution="large", seqlen_q=65, seqlen_k=100),
        )
    ),
    full=problems(
        {
            "mask": MASKS,
            "mask_shape": MASK_SHAPES,
            "lengths": lengths((64, 64), (65, 300), (129, 257), (1, 127)),
            "dtype": DTYPES,
        },
        accept=lambda problem: problem.mask != "tiles" or problem.keys > 64,
        batch=2,
        heads_q=3,
    ),
    feature="boolean mask",
)
def test_mask(problem: Problem, subject: Subject) -> None:
    """Boolean masks by pattern and by the dimensions that they broadcast."""
    subject.check(problem)


@cases(
    quick=joined(
        (
            turning(
                [{"bias": bias} for bias in BIASES], batch=2, heads_q=3, seqlen_q=65, seqlen_k=300
            ),
            turning(
                [{"bias_shape": shape} for shape in MASK_SHAPES[1:]],
                bias="normal",
                batch=2,
                heads_q=3,
                seqlen_q=33,
                seqlen_k=65,
            ),
        )
    ),
    full=problems(
        {
            "bias": BIASES,
            "bias_shape": MASK_SHAPES,
            "lengths": lengths((64, 64), (65, 300), (129, 257), (1, 127)),
            "dtype": DTYPES,
        },
        batch=2,
        heads_q=3,
    ),
    feature="bias",
)
def test_bias(problem: Problem, subject: Subject) -> None:
    """Additive biases: sign, scale, broadcasting, and -inf over whole tiles and rows."""
    subject.check(problem)


@cases(
    quick=joined(
        turning(
            [{"softcap": 2.0}, {"softcap": 15.0}, {"softcap": 50.0, "distribution": "normal:16"}],
            seqlen_q=65,
            seqlen_k=100,
            distribution="normal:4",
            **rule,
        )
        for rule in (*RULES, {"mask": "random"})
    ),
    full=joined(
        problems(
            {
                "softcap": (1.0, 5.0, 20.0),
                "lengths": lengths((64, 64), (65, 257), (257, 65)),
                "dtype": DTYPES,
            },
            distribution="normal:8",
            **rule,
        )
        for rule in (*RULES, {"mask": "random"}, {"bias": "normal"}, {"window": (20, 10)})
    ),
    feature="softcap",
)
def test_softcap(problem: Problem, subject: Subject) -> None:
    """Softcap, which comes before the mask: a masked score stays hidden."""
    subject.check(problem)


@cases(
    quick=joined(
        turning([{"heads_q": 4}, {"heads_q": 6}, {"heads_q": 1}], alibi=True, **sizes, **rule)
        for rule, sizes in zip(
            RULES,
            (
                {"seqlen_q": 65, "seqlen_k": 65},
                {"seqlen_q": 65, "seqlen_k": 127},
                {"seqlen_q": 33, "seqlen_k": 127},
            ),
            strict=True,
        )
    ),
    full=joined(
        problems(
            {
                "heads_q": (1, 6, 8, 12),
                "lengths": lengths((64, 64), (65, 257), (257, 65)),
                "dtype": DTYPES,
            },
            alibi=True,
            **rule,
        )
        for rule in RULES
    ),
    feature="alibi",
)
def test_alibi(problem: Problem, subject: Subject) -> None:
    """ALiBi: distance from the diagonal, its sign, and slopes of head counts that are no 2ⁿ."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        joined(
            turning(
                [{"seqlen_k": 65}, {"seqlen_k": 300}], sinks=True, heads_q=4, seqlen_q=65, **rule
            )
            for rule in (*RULES, {"window": (5, 5)})
        )
        + turning([{"dtype": "bf16"}], sinks=True, heads_q=4, seqlen_q=1, seqlen_k=2039)
    ),
    full=joined(
        problems(
            {"lengths": lengths((64, 64), (65, 257), (257, 65)), "dtype": DTYPES},
            sinks=True,
            heads_q=8,
            **rule,
        )
        for rule in (*RULES, {"window": (5, 5)}, {"mask": "empty-rows"})
    ),
    feature="sinks",
)
def test_sinks(problem: Problem, subject: Subject) -> None:
    """Sinks join the row sum once, however many tiles there are, and may outweigh every key."""
    subject.check(problem)


# Each pair of optional features on its own, so that a target meets every pair that it has.
_SINGLE: dict[str, dict[str, Any]] = {
    "causal top-left": {"causal": "top-left"},
    "causal bottom-right": {"causal": "bottom-right"},
    "window": {"window": (40, 20)},
    "softcap": {"softcap": 4.0},
    "alibi": {"alibi": True},
    "mask": {"mask": "random"},
    "bias": {"bias": "normal", "bias_shape": "1hqk"},
    "sinks": {"sinks": True},
    "scale": {"scale": 0.3},
    "gqa": {"heads_kv": 2},
    "mqa": {"heads_kv": 1},
    "value dim": {"head_dim_v": 32},
}
_QUICK_PAIRS = (
    ("gqa", "mask"),
    ("gqa", "bias"),
    ("gqa", "alibi"),
    ("gqa", "causal top-left"),
    ("gqa", "causal bottom-right"),
    ("gqa", "sinks"),
    ("mqa", "bias"),
    ("mqa", "mask"),
    ("mask", "bias"),
    ("bias", "scale"),
    ("mask", "value dim"),
    ("window", "softcap"),
    ("softcap", "bias"),
    ("softcap", "alibi"),
    ("sinks", "scale"),
    ("alibi", "scale"),
    ("causal top-left", "scale"),
    ("causal bottom-right", "value dim"),
)


def _pairs(pairs: tuple[tuple[str, str], ...], **base: object) -> tuple[Problem, ...]:
    values = [{**_SINGLE[one], **_SINGLE[other]} for one, other in pairs]
    return turning(values, heads_q=6, seqlen_q=65, **base)


@cases(
    quick=_pairs(_QUICK_PAIRS, seqlen_k=100),
    full=joined(
        _pairs(
            tuple(
                (one, other)
                for n, one in enumerate(_SINGLE)
                for other in list(_SINGLE)[n + 1 :]
                if not _SINGLE[one].keys() & _SINGLE[other].keys()
            ),
            seqlen_k=keys,
        )
        for keys in (65, 129)
    ),
    feature="two features",
)
def test_pairs(problem: Problem, subject: Subject) -> None:
    """Two optional features at once."""
    subject.check(problem)


@cases(
    quick=in_each_dtype(
        joined(
            (
                turning(
                    [{"mask": "empty-rows"}, {"mask": "nothing"}],
                    seqlen_q=33,
                    seqlen_k=65,
                    heads_q=2,
                ),
                turning([{"bias": "neginf-rows"}], seqlen_q=33, seqlen_k=65, heads_q=2),
                turning(
                    [{"causal": "bottom-right"}, {"causal": "bottom-right", "sinks": True}],
                    seqlen_q=129,
                    seqlen_k=33,
                    heads_q=2,
                ),
                turning([{"window": (2, None)}], seqlen_q=129, seqlen_k=33, causal="top-left"),
            )
        )
    ),
    full=joined(
        problems({"lengths": lengths((65, 33), (257, 64), (300, 1)), "dtype": DTYPES}, **rule)
        for rule in (
            {"mask": "empty-rows"},
            {"bias": "neginf-rows"},
            {"causal": "bottom-right"},
            {"window": (3, 3), "causal": "top-left"},
            {"window": (3, 3)},
        )
    ),
    feature="empty rows",
)
def test_empty_rows(problem: Problem, subject: Subject) -> None:
    """Queries that see no key: out is 0 and the LSE -inf (or the sink), and nothing is NaN."""
    subject.check(problem)
