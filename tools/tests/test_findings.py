"""What deviations files cite stands in docs/findings.md, and the programs there can be run."""

import importlib.util
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("findings", ROOT / "tools/findings.py")
findings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(findings)
CITED = re.compile(r"docs/findings\.md, ([^;]+)")
HEADING = re.compile(r"^#{2,4} (.+)$", re.MULTILINE)


def cited() -> dict[str, str]:
    """The headings that deviations cite, each with a file that does."""
    found = {}
    for file in ROOT.glob("*/src/attnproof/deviations/*.toml"):
        for deviation in tomllib.loads(file.read_text("utf-8"))["deviation"]:
            for heading in CITED.findall(deviation["proof"]):
                found[heading.strip()] = file.name
    return found


def test_every_cited_finding_is_written_up() -> None:
    headings = HEADING.findall((ROOT / "docs/findings.md").read_text("utf-8"))
    assert len(headings) == len(set(headings)), "two findings of one name cannot be told apart"
    assert cited()
    missing = {heading: file for heading, file in cited().items() if heading not in headings}
    assert not missing


def test_every_program_begins_with_its_chapters_imports() -> None:
    found = list(findings.programs((ROOT / "docs/findings.md").read_text("utf-8")))
    assert len(found) > 20
    for name, program in found:
        compile(program, name, "exec")
        assert program.startswith("import torch\n"), name


def test_a_program_prints_and_fails() -> None:
    printed = findings.run('print("a")\nraise ValueError("no such thing")')
    assert printed == "a\nexit status 1: ValueError: no such thing"
