"""A suite measured from outside: the process that measures is started, watched and started anew."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .rounds import Measured
from .suites import SUITES

POLL_SECONDS = 0.2
STILL_SECONDS = 600.0  # without a line, after which the process is taken for hung
FIRST_RESULT_SECONDS = 300.0
TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(kw_only=True)
class Run:
    """What is measured, and what is known so far."""

    suite: str
    dtype: str
    device: str
    peers: Sequence[tuple[str, str | None]]  # target and signature
    rounds: int
    seed: int
    file: Path  # of lines, as they come
    measured: dict[tuple[str, str], Measured] = field(default_factory=dict)  # by cell and peer
    finished: set[str] = field(default_factory=set)
    lost: list[tuple[str | None, str]] = field(default_factory=list)
    unloadable: dict[str, str] = field(default_factory=dict)
    first_results: dict[str, float | None] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        return {
            "suite": self.suite,
            "dtype": self.dtype,
            "device": self.device,
            "peers": [list(peer) for peer in self.peers],
            "rounds": self.rounds,
            "seed": self.seed,
        }

    def go(self, told: Callable[[str], None], timeout: float = STILL_SECONDS) -> None:
        """Measure what is left; ``told`` gets a sentence now and then."""
        if not self.file.exists() or not self.file.stat().st_size:
            self.file.write_text(json.dumps({"run": self.settings}) + "\n", "utf-8")
        seen = self.read()
        everything = {cell.id for cell in SUITES[self.suite](self.dtype)}
        while everything - self.finished:
            with tempfile.TemporaryFile() as said:
                seen = self._go(self._start(said), seen, told, timeout, said)
        for name, _ in self.peers:
            if name not in self.first_results and name not in self.unloadable:
                told(f"from import to first result: {name}")
                self._append({"first_result": name, "seconds": self._first_result(name)})
        self.read()

    def _go(
        self,
        process: subprocess.Popen[str],
        seen: int,
        told: Callable[[str], None],
        timeout: float,
        said: IO[bytes],
    ) -> int:
        """Follow one process to its end: how many lines there are then."""
        began: tuple[str | None, str] | None = None
        changed = time.monotonic()
        while True:
            ended = process.poll() is not None  # before reading: nothing comes after
            lines = self._lines()[seen:]
            seen += len(lines)
            for line in lines:
                changed = time.monotonic()
                if "begins" in line:
                    began = (line["cell"], line["begins"])
                    told(" ".join(filter(None, [line["cell"], line["begins"]])))
                self._take(line)
            if ended:
                break
            if time.monotonic() - changed > timeout:
                process.kill()
            time.sleep(POLL_SECONDS)
        if process.returncode and began is not None:
            self._lose(began, process.returncode)
            seen += 1
        elif process.returncode:
            said.seek(0)
            text = said.read().decode(errors="replace").strip()
            raise RuntimeError(f"the process that measures did not start: {text[-2000:]}")
        return seen

    def read(self) -> int:
        """Take what the file has: how many lines."""
        lines = self._lines()
        for line in lines:
            self._take(line)
        return len(lines)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        text = self.file.read_text("utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _take(self, line: Mapping[str, Any]) -> None:
        if "measured" in line:
            one = Measured(**line["measured"])
            self.measured[one.cell, one.peer] = one
        elif "finished" in line:
            self.finished.add(line["finished"])
        elif "lost" in line:
            self.lost.append(tuple(line["lost"]))
        elif "unloadable" in line:
            self.unloadable[line["unloadable"]] = line["reason"]
        elif "first_result" in line:
            self.first_results[line["first_result"]] = line["seconds"]
        elif "environment" in line:
            self.environment, self.ceilings = line["environment"], line["ceilings"]

    def _lose(self, began: tuple[str | None, str], status: int) -> None:
        """Go on without the peer that the process died at, in that cell."""
        cell, name = began
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        self._append({"lost": [cell, name]})
        if cell is not None:
            failed = Measured(cell=cell, peer=name, failed=f"the process died: {how}")
            self._append({"measured": failed.as_dict()})
        else:
            self._append({"unloadable": name, "reason": f"loading it ended the process: {how}"})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._take(line)

    def _start(self, said: IO[bytes]) -> subprocess.Popen[str]:
        request = self.settings | {
            "file": str(self.file),
            "torch_dtype": TORCH_DTYPES[self.dtype],
            "finished": sorted(self.finished),
            "lost": self.lost,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.child"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        return process

    def _first_result(self, name: str) -> float | None:
        """Seconds, None where there is none."""
        command = [
            sys.executable,
            "-m",
            f"{__package__}.first_result",
            name,
            self.device,
            self.dtype,
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=FIRST_RESULT_SECONDS
            )
        except subprocess.TimeoutExpired:
            return None
        return float(done.stdout.split()[-1]) if done.returncode == 0 else None
