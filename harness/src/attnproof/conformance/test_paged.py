"""A paged cache: keys and values in pages that a table names, in no order.

Unused pages, and what lies behind the last key of a page, are NaN; the table's entries
beyond a sequence's length name a page of NaN.
"""

from typing import Any

from attn_reference.problem import Problem

from ..cases import cases
from ..subject import Subject
from .cover import problems
from .recipe import DTYPES, heads, in_each_dtype, joined, turning

PAGES = (1, 16, 32, 64, 256)
FEATURES: tuple[dict[str, Any], ...] = (
    {"window": (40, 0), "causal": "bottom-right"},
    {"softcap": 2.0},
    {"heads_kv": 2},
    {"alibi": True, "causal": "bottom-right"},
    {"scale": 0.3},
    {"sinks": True},
)
RULES: tuple[dict[str, Any], ...] = ({}, {"causal": "bottom-right"}, {"causal": "top-left"})
KEY_LENGTHS = ((300, 1, 65), (256, 257, 255), (0, 300, 17))


@cases(
    quick=in_each_dtype(
        joined(
            (
                turning(
                    [{"page_size": size} for size in PAGES],
                    batch=3,
                    heads_q=2,
                    seqlen_q=5,
                    seqlen_k=300,
                    key_lengths=KEY_LENGTHS[0],
                ),
                turning(
                    [{"key_lengths": lens} for lens in KEY_LENGTHS],
                    page_size=256,
                    batch=3,
                    heads_q=2,
                    seqlen_q=1,
                    seqlen_k=300,
                    causal="bottom-right",
                ),
                turning(
                    [{"page_size": 16}, {"page_size": 256}], seqlen_q=17, seqlen_k=512, batch=2
                ),
            )
        )
    ),
    full=joined(
        problems(
            {
                "page_size": PAGES,
                "key_lengths": KEY_LENGTHS,
                "seqlen_q": (1, 5, 65),
                "dtype": DTYPES,
                "heads": heads((2, 2), (6, 2)),
                "distribution": ("normal", "needles"),
            },
            batch=3,
            seqlen_k=300,
            **rule,
        )
        for rule in RULES
    ),
    feature="paged",
)
def test_pages(problem: Problem, subject: Subject) -> None:
    """Page sizes from 1 to 256, sequences that end at, before and behind the end of a page."""
    subject.check(problem, canary_allocations=True)


@cases(
    quick=in_each_dtype(
        turning(
            FEATURES[:4],
            page_size=256,
            batch=3,
            heads_q=6,
            seqlen_q=5,
            seqlen_k=300,
            key_lengths=KEY_LENGTHS[0],
        )
    ),
    full=joined(
        problems(
            {"page_size": (16, 256), "key_lengths": KEY_LENGTHS, "dtype": DTYPES},
            batch=3,
            heads_q=6,
            seqlen_q=5,
            seqlen_k=300,
            **feature,
        )
        for feature in FEATURES
    ),
    feature="paged",
)
def test_features(problem: Problem, subject: Subject) -> None:
    """Features together with pages."""
    subject.check(problem)
