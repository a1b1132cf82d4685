"""How much room the budget leaves: honest kernels on random problems, none of which may deviate.

    python -m attnproof.calibration --kernel sdpa-flash --problems 2000 --json FILE --workers 2
    python -m attnproof.calibration --summary FILE... --write calibration-cpu.json
    python -m attnproof.calibration --figures calibration-cpu.json --table room

FILE holds a JSON line for every problem, written as it is measured, after one that says on what;
a second run with the same FILE goes on where the first one stopped. A process that dies or hangs
costs the problem that it was at. With --problem ID the same problem is measured under many
seeds, which gives the rate at which a planted fault is caught. docs/calibration.md has the
figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any, TextIO

import torch
from pebble import ProcessExpired, ProcessPool
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from attn_reference.precision import PROFILES, Precision
from attn_reference.problem import Problem

from ..environment import environment
from ..targets import LoadError
from .kernels import CUDA_KERNELS, Kernel, kernel
from .measure import Measurement, instructions, measure
from .problems import random_problem
from .summary import TABLES, record, summary

DTYPES = ("fp32", "bf16", "fp16")
WRONG = {"deviates", "crashed", "timed out"}
Task = tuple[str, int]  # dtype, index


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or summarise; 0, or 1 when a problem deviated or got no answer, 2 for bad usage."""
    options = _parser().parse_args(arguments)
    if options.summary is not None:
        found = [m for path in options.summary for m in _read(path)]
        print(summary(found))
        if options.write is not None:
            environments = [e for path in options.summary for e in _environments(path)]
            text = json.dumps(record(found, environments), indent=1, ensure_ascii=False)
            options.write.write_text(text + "\n", encoding="utf-8")
        return _status(found)
    if options.figures is not None:
        return _show(options.figures, options.table)
    if options.kernel is None:
        print(
            "--kernel is missing: name a kernel or a target, or --summary or --figures FILE",
            file=sys.stderr,
        )
        return 2
    try:
        chosen = kernel(options.kernel, options.device)
        if options.problem is not None:
            Problem.from_id(options.problem)
    except (LoadError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    supported = chosen.backend.capabilities.dtypes
    dtypes = [d for d in options.dtype or DTYPES if d in supported]
    if options.problem is not None:
        dtypes = [Problem.from_id(options.problem).dtype]
    done = [] if options.json is None or not options.json.exists() else list(_read(options.json))
    names = (options.kernel, options.device, instructions(options.device))
    keys = {m.key for m in done}
    tasks = [
        (dtype, index)
        for index in range(options.start, options.start + options.problems)
        for dtype in dtypes
        if (*names, dtype, index) not in keys
    ]
    measured = done + _carry_out(tasks, options)
    print(summary(measured))
    return _status(measured)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attnproof.calibration",
        description="Measure how much of the error budget honest kernels use.",
    )
    parser.add_argument(
        "--kernel",
        help=f"a registered backend or another TARGET; on cuda also {', '.join(CUDA_KERNELS)}",
    )
    parser.add_argument("--problems", type=int, default=2000, help="per dtype (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="number of the first problem")
    parser.add_argument("--problem", metavar="ID", help="this problem under many seeds")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="all that it supports")
    parser.add_argument("--precision", choices=sorted(PROFILES), help="in place of the declared")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds for a problem (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON lines; resumed if there")
    parser.add_argument(
        "--summary", type=Path, nargs="+", metavar="FILE", help="only print what FILEs hold"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="with --summary: the figures as JSON"
    )
    parser.add_argument(
        "--figures", type=Path, nargs="+", metavar="FILE", help="print what --write wrote"
    )
    parser.add_argument("--table", choices=sorted(TABLES), help="with --figures: only this one")
    return parser


def _show(paths: Sequence[Path], name: str | None) -> int:
    """Print one table, or all, of files of figures; the status is that of their measurements."""
    found: list[dict[str, Any]] = []
    for path in paths:
        try:
            found += json.loads(path.read_text(encoding="utf-8"))["results"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"--figures {path}: not readable ({error})", file=sys.stderr)
            return 2
    tables = [TABLES[one](found) for one in ([name] if name else TABLES)]
    print("\n\n".join(table or "no room by term in the figures" for table in tables))
    return int(any(one["problems"].keys() & WRONG for one in found))


def _read(path: Path) -> Iterator[Measurement]:
    """The measurements of a file."""
    return (Measurement.from_dict(line) for line in _lines(path) if "environment" not in line)


def _environments(path: Path) -> Iterator[dict[str, Any]]:
    """On what each run that wrote to the file ran."""
    return (line["environment"] for line in _lines(path) if "environment" in line)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """What a file holds; a last line that was cut off is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _status(measured: Iterable[Measurement]) -> int:
    return int(any(m.status in WRONG for m in measured))


def _carry_out(tasks: list[Task], options: argparse.Namespace) -> list[Measurement]:
    """Measure, show the progress, and write each measurement as it comes."""
    file = None if options.json is None else options.json.open("a", encoding="utf-8")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    measured: list[Measurement] = []
    try:
        if tasks:
            _write({"environment": environment()}, file)
        with Progress(*columns, TimeRemainingColumn()) as progress:
            bar = progress.add_task(options.kernel, total=len(tasks))
            for measurement in _measurements(tasks, options):
                measured.append(measurement)
                _write(measurement.as_dict(), file)
                deviating = sum(m.status == "deviates" for m in measured)
                progress.update(bar, advance=1, description=f"{options.kernel}: {deviating} wrong")
    finally:
        if file is not None:
            file.close()
    return measured


def _write(line: dict[str, Any], file: TextIO | None) -> None:
    if file is not None:
        file.write(json.dumps(line) + "\n")
        file.flush()


def _measurements(tasks: list[Task], options: argparse.Namespace) -> Iterator[Measurement]:
    """In processes of their own: a kernel that crashes or hangs costs one problem."""
    here = _Worker(options)
    context = multiprocessing.get_context("spawn")
    with ProcessPool(options.workers, 0, _start, (options,), context) as pool:
        futures: dict[Future[Measurement], Task] = {
            pool.schedule(_work, (task,), timeout=options.timeout): task for task in tasks
        }
        try:
            for future in as_completed(futures):
                try:
                    yield future.result()
                except ProcessExpired as died:
                    reason = f"the process ended with exit code {died.exitcode}"
                    yield here.lost(futures[future], "crashed", reason)
                except TimeoutError:
                    reason = f"no answer in {options.timeout:g} s"
                    yield here.lost(futures[future], "timed out", reason)
        finally:
            pool.stop()  # type: ignore[no-untyped-call]


class _Worker:
    """Measures tasks in one process."""

    def __init__(self, options: argparse.Namespace) -> None:
        if options.device == "cpu":
            torch.set_num_threads(1)
        self.options = options
        self.kernel: Kernel = kernel(options.kernel, options.device)
        self.precision: Precision = (
            self.kernel.backend.precision(options.device)
            if options.precision is None
            else PROFILES[options.precision]
        )

    def __call__(self, task: Task) -> Measurement:
        return measure(
            self.options.kernel,
            self.kernel,
            self._problem(task),
            task[1],
            self.options.device,
            self.precision,
        )

    def lost(self, task: Task, status: str, reason: str) -> Measurement:
        """What is left of a problem whose process gave no answer."""
        dtype, index = task
        return Measurement(
            kernel=self.options.kernel,
            device=self.options.device,
            instructions=instructions(self.options.device),
            dtype=dtype,
            index=index,
            problem=self._problem(task).id,
            status=status,
            reason=reason,
        )

    def _problem(self, task: Task) -> Problem:
        dtype, index = task
        if self.options.problem is not None:
            return Problem.from_id(self.options.problem).replace(seed=index)
        capabilities = self.kernel.backend.capabilities
        return random_problem(index, dtype, capabilities, self.kernel.space)


_worker: _Worker | None = None


def _start(options: argparse.Namespace) -> None:
    global _worker
    _worker = _Worker(options)


def _work(task: Task) -> Measurement:
    assert _worker is not None
    return _worker(task)
