"""The examples of the README print what it says."""

from __future__ import annotations

import doctest
from pathlib import Path

import torch

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
