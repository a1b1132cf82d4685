"""Judge several backends beside each other, one on each core.

Usage: python tools/check_all.py FOLDER NAME=PROGRAM... [-- OPTION...]

PROGRAM is the ``attnproof`` of the environment that NAME is installed in. Results go to
FOLDER/NAME.json, what a run prints is printed when it ends, and OPTIONs go to every run. One run
after the other would start, and wait for its slowest case, as often with every core but one idle.
The exit status is 1 when a run ended otherwise than with a verdict.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

VERDICTS = (0, 1, 3)  # conforms, does not, nothing could be judged


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check(folder: Path, name: str, program: str, options: Sequence[str]) -> tuple[int, str, float]:
    """Exit status, what was printed, and seconds of one run."""
    start = time.monotonic()
    words = [program, "check", name, "--workers", "1", "--json", str(folder / f"{name}.json")]
    # One thread each: the runs share the cores out among themselves.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([*words, *options], capture_output=True, text=True, env=environment)
    errors = run.stderr if run.returncode not in VERDICTS else ""
    return run.returncode, run.stdout + errors, time.monotonic() - start


def main(folder: Path, programs: dict[str, str], options: Sequence[str]) -> int:
    """Judge them all."""
    broken = []
    with ThreadPoolExecutor(cores()) as pool:
        runs = {
            pool.submit(check, folder, name, program, options): name
            for name, program in programs.items()
        }
        for number, run in enumerate(as_completed(runs), 1):
            name = runs[run]
            status, text, seconds = run.result()
            print(text, end="")
            print(f"{number} of {len(runs)} backends: {name}, {seconds:.0f} s\n", flush=True)
            if status not in VERDICTS:
                broken.append(f"{name} (exit status {status})")
    if broken:
        print(f"no verdict: {', '.join(broken)}", file=sys.stderr)
    return int(bool(broken))


if __name__ == "__main__":
    words, options = sys.argv[1:], []
    if "--" in words:
        at = words.index("--")
        words, options = words[:at], words[at + 1 :]
    if len(words) < 2 or not all("=" in word for word in words[1:]):
        sys.exit(__doc__)
    sys.exit(main(Path(words[0]), dict(word.split("=", 1) for word in words[1:]), options))
