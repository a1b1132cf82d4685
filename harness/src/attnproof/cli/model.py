"""``attnproof check TARGET --model NAME``: judge a target inside a model."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from ..options import Options
from ..record import CaseRecord
from ..report.results import write_results
from .common import stop
from .progress import loading
from .session import Session


def require_known(model: str, others: Mapping[str, object]) -> None:
    """End with one line for an unknown model, or an option (by name) that models have no use for
    and that was given."""
    from ..models.llama import MODELS

    if model not in MODELS:
        stop(f"--model {model}: unknown; accepted are {', '.join(MODELS)}")
    for name, value in others.items():
        if value:
            stop(f"--{name}: is for the chapters, and has no meaning with --model")


def run_model(options: Options, progress: Console) -> Session:
    """Judge; the records and why there are none, as of a run of the chapters."""
    from ..models.session import ModelSession, scenarios, unavailable
    from ..targets import LoadError

    if reason := unavailable():
        return _without_records(options, reason)
    try:
        with loading(progress, options):
            session = ModelSession(options)
    except LoadError as error:
        return Session(
            records=(),
            taken_over=0,
            complaints=(),
            problems=(),
            interrupted=False,
            refused=str(error),
        )
    records: list[CaseRecord] = []
    interrupted = False
    try:
        if session.description.unavailable is not None:
            return _without_records(options, session.description.unavailable)
        todo = scenarios(options)
        for number, scenario in enumerate(todo, start=1):
            with progress.status(f"{scenario.id} ({number} of {len(todo)})"):
                records += session.records(scenario)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        session.close()
    problems = () if options.json is None else tuple(write_results(options, records, ()))
    return Session(
        records=tuple(records),
        taken_over=0,
        complaints=(),
        problems=problems,
        interrupted=interrupted,
    )


def _without_records(options: Options, reason: str) -> Session:
    """A run that ended before anything was judged; the JSON says why."""
    problems = () if options.json is None else tuple(write_results(options, (), (), reason))
    return Session(
        records=(),
        taken_over=0,
        complaints=(),
        problems=problems,
        interrupted=False,
        unavailable=reason,
    )
