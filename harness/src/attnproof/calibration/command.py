"""How much room the budget leaves: honest kernels on random problems, none of which may deviate.

    python -m attnproof.calibration --kernel sdpa-flash --problems 2000 --json FILE --workers 2
    python -m attnproof.calibration --summary FILE

FILE holds a JSON line for every problem, written as it is measured; a second run with the same
FILE goes on where the first one stopped. With --problem ID the same problem is measured under
many seeds, which gives the rate at which a planted fault is caught. docs/calibration.md has
the figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from attn_reference.precision import PROFILES, Precision
from attn_reference.problem import Problem

from ..targets import LoadError
from .kernels import CUDA_KERNELS, Kernel, kernel
from .measure import Measurement, instructions, measure
from .problems import random_problem
from .summary import summary

DTYPES = ("fp32", "bf16", "fp16")
Task = tuple[str, int]  # dtype, index


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or summarise; 0 when nothing deviated, 1 when something did, 2 for bad usage."""
    options = _parser().parse_args(arguments)
    if options.summary is not None:
        found = [m for path in options.summary for m in _read(path)]
        print(summary(found))
        return _status(found)
    if options.kernel is None:
        print("--kernel is missing: name a kernel or a target, or --summary FILE", file=sys.stderr)
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON lines; resumed if there")
    parser.add_argument(
        "--summary", type=Path, nargs="+", metavar="FILE", help="only print what FILEs hold"
    )
    return parser


def _read(path: Path) -> Iterator[Measurement]:
    """The measurements of a file; a last line that was cut off is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield Measurement.from_dict(json.loads(line))
        except json.JSONDecodeError:
            continue


def _status(measured: Iterable[Measurement]) -> int:
    return int(any(m.status == "deviates" for m in measured))


def _carry_out(tasks: list[Task], options: argparse.Namespace) -> list[Measurement]:
    """Measure, show the progress, and write each measurement as it comes."""
    file = None if options.json is None else options.json.open("a", encoding="utf-8")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    measured: list[Measurement] = []
    try:
        with Progress(*columns, TimeRemainingColumn()) as progress:
            bar = progress.add_task(options.kernel, total=len(tasks))
            for measurement in _measurements(tasks, options):
                measured.append(measurement)
                _write(measurement, file)
                deviating = sum(m.status == "deviates" for m in measured)
                progress.update(bar, advance=1, description=f"{options.kernel}: {deviating} wrong")
    finally:
        if file is not None:
            file.close()
    return measured


def _write(measurement: Measurement, file: TextIO | None) -> None:
    if file is not None:
        file.write(json.dumps(measurement.as_dict()) + "\n")
        file.flush()


def _measurements(tasks: list[Task], options: argparse.Namespace) -> Iterator[Measurement]:
    if options.workers <= 1:
        worker = _Worker(options)
        yield from map(worker, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.workers, _start, (options,)) as pool:
        yield from pool.imap_unordered(_work, tasks, chunksize=4)


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
        dtype, index = task
        if self.options.problem is not None:
            problem = Problem.from_id(self.options.problem).replace(seed=index)
        else:
            capabilities = self.kernel.backend.capabilities
            problem = random_problem(index, dtype, capabilities, self.kernel.space)
        return measure(
            self.options.kernel, self.kernel, problem, index, self.options.device, self.precision
        )


_worker: _Worker | None = None


def _start(options: argparse.Namespace) -> None:
    global _worker
    _worker = _Worker(options)


def _work(task: Task) -> Measurement:
    assert _worker is not None
    return _worker(task)
