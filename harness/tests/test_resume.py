"""Ctrl-C, a full disk, a killed worker, a killed target: no finished case is lost, and a second
run with --resume does the rest and nothing twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from attnproof import cases

SLOW = Path(__file__).parent / "planted" / "slow.py"
CHAPTER = "heads"
DTYPES = ("fp32", "bf16")
ENOUGH = 4  # finished cases after which a run is disturbed
DEADLINE = 120.0


def expected_ids() -> set[str]:
    every = cases.all_cases("quick")
    return {c.id for c in every if c.chapter == CHAPTER and c.problem.dtype in DTYPES}


@dataclass(kw_only=True)
class Run:
    """One ``attnproof check`` of the slow target, and the journal that it writes."""

    folder: Path
    function: str = "attention"
    workers: int = 1
    before: str = ""  # Python to run ahead of the command line
    process: subprocess.Popen[str] = field(init=False)

    @property
    def journal(self) -> Path:
        return self.folder / "result.jsonl"

    def start(self, *more: str) -> Run:
        options = [f"--chapter={CHAPTER}", *(f"--dtype={dtype}" for dtype in DTYPES)]
        options += [f"--workers={self.workers}", "--device=cpu"]
        result = f"--json={self.folder / 'result.json'}"
        main = f"{self.before}\nfrom attnproof.cli.main import main; main()"
        command = [sys.executable, "-c", main, "check", f"{SLOW}:{self.function}"]
        self.process = subprocess.Popen(
            [*command, *options, result, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SLOW_CALLS": str(self.folder / "calls"), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            # Who starts the tests in the background of a shell ignores SIGINT, and children do.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        return self

    def lines(self) -> list[dict[str, Any]]:
        """The records in the journal: all complete lines but the first."""
        if not self.journal.exists():
            return []
        complete = [line for line in self.journal.read_text().splitlines(True) if line[-1] == "\n"]
        return [json.loads(line) for line in complete[1:]]

    def wait_for(self, count: int) -> None:
        end = time.monotonic() + DEADLINE
        while len(self.lines()) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end, "no progress"
            time.sleep(0.02)

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out, err

    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Makes runs in one folder; whatever still lives at the end is killed, its group too."""
    started: list[Run] = []

    def make(**fields: Any) -> Run:
        started.append(Run(folder=tmp_path, **fields))
        return started[-1]

    yield make
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.communicate()


def assert_goes_on(run: Callable[..., Run], **fields: Any) -> None:
    """Resume: what is in the journal stays as it is, the rest is done, the verdict counts all."""
    again = run(**fields)
    before = again.lines()
    status, out, err = again.start("--resume").finish()
    assert status == 0, out + err
    assert f"{len(before)} cases taken over" in out
    after = again.lines()
    assert after[: len(before)] == before
    ids = [record["id"] for record in after]
    assert len(ids) == len(set(ids))
    assert set(ids) == expected_ids()
    assert {row["id"] for row in again.result()["cases"]} == expected_ids()


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c(run: Callable[..., Run], workers: int) -> None:
    """The terminal sends SIGINT to the whole group: the workers and the target get it too."""
    first = run(workers=workers).start()
    first.wait_for(ENOUGH)
    seen = first.lines()
    os.killpg(first.process.pid, signal.SIGINT)
    status, out, err = first.finish()
    assert status == 130
    assert "Traceback" not in err + out
    assert "--resume" in out
    assert first.lines()[: len(seen)] == seen
    # A case that the interrupt broke off is not finished: it has no record.
    assert {record["verdict"]["status"] for record in first.lines()} <= {
        "conforms",
        "unsupported",
    }
    assert len(first.lines()) < len(expected_ids())
    assert_goes_on(run, workers=workers)


def test_killed_run(run: Callable[..., Run]) -> None:
    """SIGKILL leaves no time to write anything: what was finished is on the disk by then. A line
    that was written in part, as a crash of the whole machine leaves it, is dropped."""
    first = run().start()
    first.wait_for(ENOUGH)
    os.killpg(first.process.pid, signal.SIGKILL)
    first.finish()
    assert len(first.lines()) >= ENOUGH
    assert not (first.folder / "result.json").exists()
    with first.journal.open("a") as file:
        file.write('{"id": "heads/groups/b1_h6')
    assert_goes_on(run)


# The kernel refuses to let the journal grow beyond this: a disk that is full in the middle of a
# line. Nothing else that the run writes is limited.
FULL_DISK = """
import resource
from attnproof.record import Journal
write = Journal._write
def write_to_a_full_disk(*arguments):
    free, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        write(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
Journal._write = write_to_a_full_disk
"""


def test_full_disk(run: Callable[..., Run]) -> None:
    first = run(workers=2, before=FULL_DISK).start()
    status, out, err = first.finish()
    assert status == 1  # not all that was found out could be kept
    assert f"{first.journal}: cannot be written: File too large" in out, out + err
    assert {row["id"] for row in first.result()["cases"]} == expected_ids()
    assert ENOUGH <= len(first.lines()) < len(expected_ids())
    assert_goes_on(run, workers=2)


def test_killed_worker(run: Callable[..., Run]) -> None:
    """One of the processes that share the cases dies: another takes its place."""
    first = run(workers=2).start()
    first.wait_for(ENOUGH)
    seen = first.lines()
    os.kill(children(first.process.pid)[0], signal.SIGKILL)
    status, out, err = first.finish()
    after = first.lines()
    assert after[: len(seen)] == seen
    assert sorted(record["id"] for record in after) == sorted(expected_ids())
    # It costs the case in flight, and none when it was still starting or between two cases.
    crashed = [r["verdict"]["status"] for r in after].count("crashed")
    assert crashed <= 1, out + err
    assert status == crashed, out + err


def test_killed_target(run: Callable[..., Run]) -> None:
    """The process of the target dies: its case crashed, and the next one has a new process."""
    first = run(function="killed_once").start()
    status, out, err = first.finish()
    assert status == 1, out + err
    after = first.lines()
    assert sorted(record["id"] for record in after) == sorted(expected_ids())
    lost = [record for record in after if record["verdict"]["status"] == "crashed"]
    assert len(lost) == 1
    assert "SIGKILL" in lost[0]["verdict"]["reason"]


def children(pid: int) -> list[int]:
    """The processes that a process has started, the eldest first (Linux)."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
