"""The results of a run as one JSON file, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from ..environment import environment
from ..options import Options
from ..record import CaseRecord, json_values
from ..writing import replace_file
from .summary import document


def write_results(
    options: Options,
    records: Sequence[CaseRecord],
    complaints: Sequence[str],
    unavailable: str | None = None,
) -> list[str]:
    """Write environment, options, summary and a row per feature and per case to ``options.json``.

    unavailable: why the target cannot run here, where that ended the run.
    Gives what went wrong, a sentence each.
    """
    assert options.json is not None
    run = asdict(options) | {"json": str(options.json)}
    found = json_values(document(records, environment(), run, complaints, unavailable))
    text = json.dumps(found, indent=1, allow_nan=False)
    try:
        replace_file(options.json, f"{text}\n".encode())
    except OSError as error:
        return [f"{options.json}: cannot be written: {error.strerror}"]
    return []
