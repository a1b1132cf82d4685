"""The examples of the README print what it says, and its table has every step."""

from __future__ import annotations

import doctest
from pathlib import Path

import torch

import online_softmax
from online_softmax import STEPS

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_is_true():
    # A closing fence is no output.
    text = README.read_text(encoding="utf-8").replace("\n```\n", "\n\n")
    examples = doctest.DocTestParser().get_doctest(text, {}, "README.md", str(README), 0)
    assert len(examples.examples) > 10
    state = torch.random.get_rng_state()
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    torch.random.set_rng_state(state)
    assert not said, "".join(said)


def test_the_table_has_every_step():
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"]
    expected = [
        f"| `{step.name}` | {step.title} | {'yes ' if step.backward else ''}|"
        for step in STEPS.values()
    ]
    assert [row for row in rows if row.count("|") == 4] == expected


def test_what_is_exported_is_there():
    assert sorted(online_softmax.__all__, key=str) == sorted(set(online_softmax.__all__), key=str)
    assert all(hasattr(online_softmax, name) for name in online_softmax.__all__)
