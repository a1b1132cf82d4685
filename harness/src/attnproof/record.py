"""What is kept of each case that has been judged, and the journal that loses none of it."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class CaseRecord:
    """One judged case. ``verdict`` is ``Verdict.as_dict()``; ``known`` the reason of the entry of
    the deviations file that it matches, if it does."""

    id: str
    chapter: str
    feature: str
    problem: str  # the id of the problem
    verdict: Mapping[str, Any]
    seconds: float
    known: str | None = None

    @property
    def status(self) -> str:
        """The status of the verdict, such as 'conforms'."""
        return str(self.verdict["status"])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values: dict[str, Any] = json_values(asdict(self))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``as_dict``; TypeError naming a field that is missing or unknown."""
        record = cls(**values)
        return replace(record, verdict=_with_numbers(record.verdict))


def json_values(value: Any) -> Any:
    """Plain values with every infinity and NaN as text: JSON has none."""
    if isinstance(value, Mapping):
        return {name: json_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _with_numbers(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """``Verdict.as_dict()`` as it was before ``json_values``."""
    values = dict(verdict)
    for name in ("worst", "statistics"):
        values[name] = {n: float(value) for n, value in values.get(name, {}).items()}
    findings = [dict(finding) for finding in values.get("findings", ())]
    for finding in findings:
        if isinstance(finding.get("worst"), str):
            finding["worst"] = float(finding["worst"])
    return values | {"findings": findings}


class JournalError(Exception):
    """A journal cannot be read, or is of another run; the message is one line."""


class Journal:
    """Records as JSON lines, each on the disk before the next case is judged.

    The first line says of which run it is: target, device, seed and the like. A file that
    cannot be written to is reported once, by ``problem``, and the run goes on.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self.run: dict[str, Any] = json_values(run)
        self.problem: str | None = None

    def start(self) -> None:
        """Begin the file anew."""
        self._write("w", {"run": self.run})

    def append(self, record: CaseRecord) -> None:
        """Write one record, through to the disk."""
        self._write("a", record.as_dict())

    def resume(self) -> list[CaseRecord]:
        """The records that the file holds, ready to be appended to; one per case, the last.

        A last line that was cut off is dropped from the file. JournalError when the file is no
        journal, or of a run with other options.
        """
        if not self.path.exists():
            self.start()
            return []
        try:
            whole = self.path.read_bytes()
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be read: {error.strerror}") from None
        complete = whole[: whole.rfind(b"\n") + 1]
        records = self._parse(complete)
        if not complete:
            self.start()
        elif len(complete) < len(whole):
            os.truncate(self.path, len(complete))
        return list({record.id: record for record in records}.values())

    def _parse(self, text: bytes) -> list[CaseRecord]:
        records = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                values = json.loads(line)
                if number > 1:
                    records.append(CaseRecord.from_dict(values))
                    continue
                run = dict(values["run"])
            except (ValueError, TypeError, KeyError):
                raise JournalError(f"{self.path}: line {number} is not of a journal") from None
            for name in sorted(run.keys() | self.run.keys()):
                if run.get(name) != self.run.get(name):
                    raise JournalError(
                        f"{self.path}: is of a run with {name} {run.get(name)}, "
                        f"not {self.run.get(name)}; it cannot be resumed with this one"
                    )
        return records

    def _write(self, mode: str, values: Mapping[str, Any]) -> None:
        line = json.dumps(json_values(values), ensure_ascii=False, allow_nan=False) + "\n"
        written = 0
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                written = file.tell()
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.problem = self.problem or f"{self.path}: cannot be written: {error.strerror}"
            # A line that was written in part would spoil those that come after it.
            with contextlib.suppress(OSError):
                os.truncate(self.path, written)
