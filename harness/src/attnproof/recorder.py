"""What a pytest run makes of the judged cases: outcomes, texts, records, the journal.

Under pytest-xdist the workers judge and the controller writes: a record travels as a property
of its test report, and is in the journal before the next one is, whatever becomes of the worker.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest._code.code import ReprEntryNative, ReprExceptionInfo, ReprFileLocation, ReprTraceback
from rich.console import Console
from rich.table import Table

from attn_reference.problem import Problem

from . import cases
from .cases import Case
from .deviations import DeviationsError, load_deviations
from .options import Options, loading_text, make_subject, resolved_device
from .order import kernel_key
from .record import CaseRecord, Journal, JournalError
from .report.results import write_results
from .report.summary import Summary, summarise
from .report.table import feature_table
from .report.verdict_text import verdict_text
from .subject import Subject
from .targets import LoadError
from .verdict import NOT_JUDGED, NotConforming, Status, Verdict

PROPERTY = "attnproof"  # the name of the property of a report that carries the record


def chosen_cases(options: Options, function: Callable[..., Any], module: Path) -> list[Case] | None:
    """The cases of a check that the options choose; None when the function is no check."""
    declared = cases.declaration(function)
    if declared is None:
        return None
    chapter, check = _named(module, function.__name__)
    if options.case is None:
        found = cases.cases_of(chapter, check, declared, options.level)
        return [case for case in found if options.wants(case)]
    case = cases.find_case(options.case)
    return [case] if (case.chapter, case.check) == (chapter, check) else []


class Recorder:
    """One run, in one process: the whole of it, the controller of xdist, or one worker."""

    def __init__(self, options: Options, worker: dict[str, Any] | None) -> None:
        self.options = options
        self.is_worker = worker is not None
        self.finished: dict[str, CaseRecord] = {}  # by an earlier run, taken over
        self.records: list[CaseRecord] = []  # of this run, as they came
        self.unavailable: str | None = None  # why the target cannot run here
        self.problems: list[str] = []  # what went wrong beside the verdicts
        self._skip = frozenset((worker or {}).get("attnproof_finished", ()))
        self._subject: Subject | None = None
        self._header: list[str] = []
        self._journal: Journal | None = None
        try:
            self.deviations = load_deviations(
                options.target, options.deviations, device=resolved_device(options.device)
            )
        except DeviationsError as error:
            raise pytest.UsageError(str(error)) from None

    def subject(self) -> Subject:
        """The target, loaded when it is first asked for."""
        if self._subject is None:
            try:
                self._subject = make_subject(self.options)
            except LoadError as error:
                raise pytest.UsageError(f"--attn-target: {error}") from None
        return self._subject

    def header(self) -> list[str]:
        """What is known of the target when the run starts."""
        return self._header

    def complaints(self) -> list[str]:
        """What is out of date in the deviations file."""
        return self.deviations.complaints(lambda: (case.id for case in cases.all_cases()))

    # Hooks, in the order in which pytest calls them.

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Load the target before anything is collected: a wrong one is a usage error."""
        if self.is_worker or session.config.option.collectonly:
            return
        reporter = session.config.pluginmanager.getplugin("terminalreporter")
        if reporter is not None and session.config.option.verbose >= 0:
            reporter.write_line(loading_text(self.options))
            reporter.flush()
        subject = self.subject()
        self._header = _describe(subject)
        self.unavailable = subject.description.unavailable
        self._open_journal()  # last: whatever is wrong with a command must not empty a journal
        if session.config.getoption("dist", "no") != "no":
            subject.runner.close()  # the workers load their own
            self._subject = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell an xdist worker what is finished: all must collect the same cases."""
        node.workerinput["attnproof_finished"] = sorted(self._skip)

    def wants(self, item: pytest.Item) -> bool:
        """False for a check of which no case was chosen, and for a finished case."""
        if cases.declaration(getattr(item, "function", None)) is None:
            return True
        case = _case_of(item)
        return case is not None and case.id not in self._skip

    def order(self, item: pytest.Item) -> tuple[object, ...]:
        """What a worker sorts its checks by; others than cases come first."""
        case = _case_of(item)
        return () if case is None else kernel_key(case.problem)

    def pytest_runtest_setup(self) -> None:
        """Forget the verdict of the case before."""
        if self._subject is not None:
            self._subject.last_verdict = None

    def refuse(self, item: pytest.Item, reason: str) -> None:
        """End a case that this machine cannot run, as unavailable; other tests are let pass."""
        if _case_of(item) is not None:
            raise NotConforming(Verdict(status=Status.UNAVAILABLE, reason=reason))

    def judged(self, item: pytest.Item, call: pytest.CallInfo[Any], report: Any) -> None:
        """Turn the end of a case into an outcome, a text and a record."""
        case = _case_of(item)
        if case is None or call.when == "teardown":
            return
        if call.when == "setup" and call.excinfo is None:
            return
        verdict = self._verdict(call)
        if verdict is None:
            return
        explained = self.deviations.observe(case.id, verdict.status)
        record = CaseRecord(
            id=case.id,
            chapter=case.chapter,
            feature=case.feature,
            problem=case.problem.id,
            verdict=verdict.as_dict(),
            seconds=round(call.duration, 4),
            known=None if explained is None else explained.reason,
        )
        report.user_properties.append((PROPERTY, json.dumps(record.as_dict())))
        if verdict.status is Status.CONFORMS:
            return
        path, line, _ = item.location
        if verdict.status in NOT_JUDGED:
            report.outcome = "skipped"
            report.longrepr = (path, line, f"Skipped: {verdict.status}: {verdict.reason}")
        elif explained is not None:
            report.outcome = "skipped"
            report.wasxfail = f"{explained.reason} ({explained.proof})"
        else:
            report.longrepr = _failure(case, verdict, self.options, path, line or 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep and write a record as it arrives."""
        if self.is_worker:
            return
        found = [str(text) for name, text in report.user_properties if name == PROPERTY]
        if found:
            record = CaseRecord.from_dict(json.loads(found[-1]))
            self.deviations.observe(record.id, Status(record.status))
        elif str(report.when) == "???":  # xdist: the worker died on it
            lost = _lost(report)
            if lost is None:
                return
            record = lost
        else:
            return
        self.records.append(record)
        if self._journal is not None:
            self._journal.append(record)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """The exit status counts what was taken over from an earlier run, and lost results."""
        if self.is_worker:
            return
        if self._journal is not None and self._journal.problem is not None:
            self.problems.append(self._journal.problem)
        everything = [*self.finished.values(), *self.records]
        if self.options.json is not None:
            self.problems += write_results(self.options, everything, self.complaints())
        if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and everything:
            session.exitstatus = pytest.ExitCode.OK
        if session.exitstatus == pytest.ExitCode.OK and (
            self.problems
            or any(_fails(record) for record in everything)
            or self._summary().over_budget
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The table by feature and the verdict; what was taken over, not written, out of date."""
        everything = [*self.finished.values(), *self.records]
        if self.is_worker or not everything:
            return
        summary = self._summary()
        terminalreporter.section(f"attnproof: {self.options.target}")
        terminalreporter.write(_as_text(feature_table(summary)))
        lines = [*summary.not_run_lines, summary.line, *self.problems, *summary.complaints]
        if self.finished:
            lines.append(f"{len(self.finished)} cases taken over from {self.options.journal}")
        for line in lines:
            terminalreporter.write_line(line)

    def _summary(self) -> Summary:
        everything = [*self.finished.values(), *self.records]
        return summarise(everything, self.complaints(), skip_budget=self.options.skip_budget)

    def _open_journal(self) -> None:
        path = self.options.journal
        if path is None:
            return
        self._journal = Journal(path, self.options.run())
        if not self.options.resume:
            self._journal.start()
            return
        try:
            taken = self._journal.resume()
        except JournalError as error:
            raise pytest.UsageError(f"--attn-resume: {error}") from None
        self.finished = {record.id: record for record in taken}
        self._skip = frozenset(self.finished)
        for record in taken:
            self.deviations.observe(record.id, Status(record.status))

    def _verdict(self, call: pytest.CallInfo[Any]) -> Verdict | None:
        """The verdict in which a case ended; None when it was skipped by other means."""
        if call.excinfo is None:
            assert self._subject is not None
            return self._subject.last_verdict or Verdict(status=Status.CONFORMS)
        error = call.excinfo.value
        for one in _flat(error):
            if isinstance(one, NotConforming):
                return one.verdict
        if isinstance(error, pytest.skip.Exception):
            return None
        return Verdict(
            status=Status.CRASHED,
            reason=f"the check itself failed: {type(error).__name__}: {error}",
        )


def _named(module: Path, function: str) -> tuple[str, str]:
    """Chapter and check, from the names of the module and the function."""
    return module.stem.removeprefix("test_"), function.removeprefix("test_")


def _case_of(item: pytest.Item) -> Case | None:
    """The case that a test item is; None when it is no case."""
    function = getattr(item, "function", None)
    declared = cases.declaration(function)
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    problem = parameters.get("problem")
    if declared is None or not isinstance(problem, Problem):
        return None
    chapter, check = _named(item.path, function.__name__)  # type: ignore[union-attr]
    return cases.case_of(chapter, check, declared, problem)


def _lost(report: pytest.TestReport) -> CaseRecord | None:
    """The record of a case whose worker died, from the id of its test."""
    path, _, rest = report.nodeid.partition("::")
    function, _, problem = rest.rstrip("]").partition("[")
    chapter, check = _named(Path(path), function)
    try:
        case = cases.find_case(f"{chapter}/{check}/{problem}")
    except ValueError:
        return None
    reason = "the pytest-xdist worker that judged it died"
    return CaseRecord(
        id=case.id,
        chapter=chapter,
        feature=case.feature,
        problem=problem,
        verdict=Verdict(status=Status.CRASHED, reason=reason).as_dict(),
        seconds=0.0,
    )


def _fails(record: CaseRecord) -> bool:
    """Whether a record is a reason to fail the run."""
    return record.known is None and record.status not in {Status.CONFORMS, *NOT_JUDGED}


def _flat(error: BaseException) -> Iterator[BaseException]:
    """An exception, or those that a group holds (hypothesis raises groups)."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _flat(one)
    else:
        yield error


def _failure(
    case: Case, verdict: Verdict, options: Options, path: str, line: int
) -> ReprExceptionInfo:
    """The text of a failure, in a form that crosses from worker to controller."""
    text = verdict_text(case.id, verdict, options) + "\n"
    first = (verdict.reason.splitlines() or [""])[0]
    return ReprExceptionInfo(
        reprtraceback=ReprTraceback([ReprEntryNative([text])], None, style="native"),
        reprcrash=ReprFileLocation(path, line + 1, f"{verdict.status}: {first}"),
    )


def _as_text(table: Table) -> str:
    """The table without colours, as wide as it needs."""
    console = Console(file=io.StringIO(), width=120, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def _describe(subject: Subject) -> list[str]:
    """The target as it describes itself, for the header."""
    told = subject.description
    lines = [
        f"attnproof target: {told.name} on {subject.device}, precision {subject.precision.name}, "
        f"features: {', '.join(sorted(told.capabilities.features)) or 'none'}"
    ]
    if told.unavailable:
        lines.append(f"attnproof target is unavailable: {told.unavailable}")
    return lines
