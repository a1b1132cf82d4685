"""Run the reproductions of docs/findings.md on this machine: tools/findings.py [WORD…].

Each Python block under a ``###`` heading is a program, which begins with the block of its ``##``
chapter. It runs in a process of its own, since some lose the CUDA context. Printed is what each
printed, the error that it ended with, and how long it took; of words given, a heading must
contain one.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "findings.md"
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ERROR = re.compile(r"\w[\w.]*Error\b|\w+(\.\w+)+: ")
LIMIT = 120  # seconds a program may take, most of which is starting and compiling
LINES = 12  # of what it printed, the last


def programs(text: str) -> Iterator[tuple[str, str]]:
    """Each program, with what it is called: its chapter and heading."""
    for chapter in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        beginning, *sections = re.split(r"^### ", chapter, flags=re.MULTILINE)
        shared = CODE.findall(beginning)
        for section in sections:
            for own in CODE.findall(section):
                name = ": ".join(part.partition("\n")[0] for part in (beginning, section))
                yield name, "\n".join([*shared, own])


def run(program: str) -> str:
    """What a program printed last, and the error that it ended with."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "finding.py")  # a file, of which Triton and Dynamo read the source
        path.write_text(program, "utf-8")
        try:
            ended = subprocess.run(
                [sys.executable, str(path)], capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return f"(stopped after {LIMIT} s)"
    lines = ended.stdout.splitlines()[-LINES:]
    if ended.returncode:
        errors = [
            line for line in ended.stderr.splitlines() if re.match(r"\w[\w.]*(Error|:)", line)
        ]
        lines.append(f"exit status {ended.returncode}: {errors[-1] if errors else 'no message'}")
    return "\n".join(lines)


def main() -> None:
    """Print a heading and its output for each program that is asked for."""
    words = sys.argv[1:]
    for heading, program in programs(PAGE.read_text("utf-8")):
        if words and not any(word.lower() in heading.lower() for word in words):
            continue
        started = time.monotonic()
        output = run(program)
        print(f"# {heading}  ({time.monotonic() - started:.0f} s)\n{output}\n", flush=True)


if __name__ == "__main__":
    main()
