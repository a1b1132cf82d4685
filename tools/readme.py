"""Print the outputs that Markdown files show once more: python tools/readme.py README.md …

A comment ``<!-- output of: COMMAND -->`` is followed by what the command printed, and ends at
``<!-- end of output -->``. What starts with ``|``, a table, or with ``**`` is Markdown; all else
goes into a fence. Commands run with a shell in the root of the repository. Where one cannot be
run, the file stays as it was.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- output of: (.+?) -->\n).*?(<!-- end of output -->)", re.DOTALL)
NOT_FOUND = 127  # the shell's exit status for a command that does not exist


def printed(command: str) -> str:
    """What a command prints, as Markdown; its exit status is its own affair."""
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    run = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,  # standard error is progress, which depends on the machine
        text=True,
    )
    text = "\n".join(line.rstrip() for line in run.stdout.strip("\n").splitlines())
    if run.returncode == NOT_FOUND or "Traceback (most recent call last)" in text + run.stderr:
        sys.exit(f"{command}\n{text}\n{run.stderr}")
    return text if text.startswith(("|", "**")) else f"```text\n{text}\n```"


def main(path: Path) -> None:
    """Replace every output in the file."""
    old = path.read_text("utf-8")
    new = BLOCK.sub(lambda block: f"{block[1]}\n{printed(block[2])}\n\n{block[3]}", old)
    path.write_text(new, "utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(Path(name))
