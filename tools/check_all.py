"""Judge several backends, side by side on the cores of this machine.

Usage: python tools/check_all.py FOLDER [NAME=PROGRAM...] [--together N] [--golden]
       [--must-run NAME,NAME…] [-- OPTION...]

PROGRAM is the ``attnproof`` of the environment that NAME is installed in; without any, all that are
registered in this environment are judged, by the ``attnproof`` beside its Python or on the PATH.
Results go to FOLDER/NAME.json, what a run prints is printed when it ends, and OPTIONs go to every
run. N runs go on at a time, one per core unless given, and share the cores: one run after the other
would start, and wait for its slowest case, as often with every core but one idle. With --golden,
they are judged on the golden vectors. The exit status is 1 when a run ended otherwise than with a
verdict, and when one of --must-run could not be judged here.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

NOT_JUDGED = 3
VERDICTS = (0, 1, NOT_JUDGED)  # conforms, does not, nothing could be judged
BESIDE = Path(sys.executable).parent


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check(
    folder: Path, name: str, program: str, workers: int | None, options: Sequence[str]
) -> tuple[int, str, float]:
    """Exit status, what was printed, and seconds of one run; workers None: on the golden vectors,
    which one process is enough for."""
    start = time.monotonic()
    command = ["golden", "check"] if workers is None else ["check"]
    words = [program, *command, name, "--json", str(folder / f"{name}.json")]
    words += [] if workers is None else ["--workers", str(workers)]
    # One thread each: the runs share the cores out among themselves.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([*words, *options], capture_output=True, text=True, env=environment)
    # Why nothing could be judged is said there, and so is why there is no verdict.
    errors = run.stderr if run.returncode not in VERDICTS or not run.stdout else ""
    return run.returncode, run.stdout + errors, time.monotonic() - start


def main(
    folder: Path,
    programs: dict[str, str],
    together: int,
    options: Sequence[str],
    *,
    golden: bool = False,
    must_run: Sequence[str] = (),
) -> int:
    """Judge them all."""
    broken, absent = [], []
    workers = None if golden else max(1, cores() // together)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(together) as pool:
        runs = {
            pool.submit(check, folder, name, program, workers, options): name
            for name, program in programs.items()
        }
        for number, run in enumerate(as_completed(runs), 1):
            name = runs[run]
            status, text, seconds = run.result()
            print(text, end="")
            print(f"{number} of {len(runs)} backends: {name}, {seconds:.0f} s\n", flush=True)
            if status not in VERDICTS:
                broken.append(f"{name} (exit status {status})")
            if status == NOT_JUDGED and name in must_run:
                absent.append(name)
    if broken:
        print(f"no verdict: {', '.join(broken)}", file=sys.stderr)
    if absent:
        print(f"must run, and could not be judged: {', '.join(absent)}", file=sys.stderr)
    return int(bool(broken or absent))


def parse(words: Sequence[str]) -> dict[str, Any]:
    """What is written on the command line, as ``main`` takes it."""
    options: Sequence[str] = ()
    if "--" in words:
        at = words.index("--")
        words, options = words[:at], words[at + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("programs", nargs="*", metavar="NAME=PROGRAM")
    parser.add_argument("--together", type=int, default=cores(), metavar="N")
    parser.add_argument("--golden", action="store_true")
    parser.add_argument("--must-run", default="", metavar="NAME,NAME…")
    given = parser.parse_args(words)
    if given.together < 1 or not all("=" in program for program in given.programs):
        parser.error("accepted are NAME=PROGRAM, and --together with 1 or more")
    programs = dict(program.split("=", 1) for program in given.programs)
    if not programs:
        names = sorted(point.name for point in entry_points(group="attnproof.backends"))
        attnproof = shutil.which("attnproof", path=BESIDE) or shutil.which("attnproof")
        if attnproof is None:
            parser.error(f"no program attnproof beside {sys.executable} or on the PATH")
        programs = dict.fromkeys(names, attnproof)
    must_run = [name for name in given.must_run.split(",") if name]
    if unknown := [name for name in must_run if name not in programs]:
        parser.error(f"--must-run {unknown[0]}: is not judged; judged are {', '.join(programs)}")
    return {
        "folder": given.folder,
        "programs": programs,
        "together": given.together,
        "options": options,
        "golden": given.golden,
        "must_run": must_run,
    }


if __name__ == "__main__":
    sys.exit(main(**parse(sys.argv[1:])))
