import json
import math
from pathlib import Path

import pytest

from attnproof.options import Options
from attnproof.record import CaseRecord, Journal, JournalError
from attnproof.report.results import write_results
from attnproof.verdict import Finding, Status, Verdict

RUN = {"target": "x", "device": "cpu", "seed": 0}


def record(name: str = "a", status: Status = Status.CONFORMS, **changes) -> CaseRecord:
    verdict = Verdict(status=status, worst={"out": 0.5})
    verdict.findings.append(Finding(tensor="out", rule="bound", message="é", index=(0, 1)))
    values = {
        "id": f"masks/window/{name}",
        "chapter": "masks",
        "feature": "window",
        "problem": name,
        "verdict": verdict.as_dict(),
        "seconds": 0.25,
    }
    return CaseRecord(**{**values, **changes})


def through_json(one: CaseRecord) -> CaseRecord:
    return CaseRecord.from_dict(json.loads(json.dumps(one.as_dict())))


def journal(tmp_path, run=RUN) -> Journal:
    return Journal(tmp_path / "run.jsonl", run)


def test_records_survive_json():
    one = record(known="a reason")
    assert through_json(one).as_dict() == json.loads(json.dumps(one.as_dict()))
    assert one.status == "conforms"


def strict(text: str):
    """JSON as others read it: neither Infinity nor NaN is a number there."""

    def refuse(word: str):
        raise AssertionError(f"{word} in JSON")

    return json.loads(text, parse_constant=refuse)


def test_infinite_errors_are_valid_json_and_survive_it(tmp_path):
    verdict = Verdict(status=Status.DEVIATES, worst={"out": math.inf, "dq": 0.5})
    verdict.statistics["z_row"] = math.nan
    verdict.findings.append(
        Finding(tensor="out", rule="bound", message="inf", worst=math.inf, index=(0, 1))
    )
    infinite = record(verdict=verdict.as_dict())
    written = journal(tmp_path, {**RUN, "timeout": math.inf})
    written.start()
    written.append(infinite)
    _, line = map(strict, written.path.read_text().splitlines())
    assert line["verdict"]["worst"] == {"out": "inf", "dq": 0.5}
    (read,) = journal(tmp_path, {**RUN, "timeout": math.inf}).resume()
    assert read.verdict["worst"] == {"out": math.inf, "dq": 0.5}
    assert math.isnan(read.verdict["statistics"]["z_row"])
    (finding,) = read.verdict["findings"]
    assert (finding["worst"], finding["message"]) == (math.inf, "inf")


def test_the_results_of_infinite_errors_are_valid_json(tmp_path):
    verdict = Verdict(status=Status.DEVIATES, worst={"out": math.inf})
    options = Options(target="x", json=tmp_path / "run.json", timeout=math.inf)
    assert write_results(options, [record(verdict=verdict.as_dict())], []) == []
    (case,) = strict((tmp_path / "run.json").read_text())["cases"]
    assert (case["worst"], case["worst_by_tensor"]) == ("inf", {"out": "inf"})


def test_what_is_appended_is_on_disk_and_resumed(tmp_path):
    written = journal(tmp_path)
    written.start()
    for name in "abc":
        written.append(record(name))
        assert written.path.read_text().endswith("\n")
    assert [one.problem for one in journal(tmp_path).resume()] == ["a", "b", "c"]


def test_the_last_record_of_a_case_counts(tmp_path):
    written = journal(tmp_path)
    written.start()
    for status in (Status.CRASHED, Status.CONFORMS):
        written.append(record(status=status))
    assert [one.status for one in journal(tmp_path).resume()] == ["conforms"]


def test_nothing_to_resume_begins_anew(tmp_path):
    new = journal(tmp_path)
    assert new.resume() == []
    new.append(record())
    assert len(journal(tmp_path).resume()) == 1


def test_starting_anew_forgets(tmp_path):
    first = journal(tmp_path)
    first.start()
    first.append(record())
    second = journal(tmp_path)
    second.start()
    assert journal(tmp_path).resume() == []


def test_a_torn_last_line_is_dropped_and_written_over(tmp_path):
    written = journal(tmp_path)
    written.start()
    written.append(record("a"))
    with written.path.open("a") as file:
        file.write('{"id": "masks/win')
    resumed = journal(tmp_path)
    assert [one.problem for one in resumed.resume()] == ["a"]
    resumed.append(record("b"))
    assert [one.problem for one in journal(tmp_path).resume()] == ["a", "b"]


def test_a_torn_first_line_begins_anew(tmp_path):
    path = journal(tmp_path).path
    path.write_text('{"run": {')
    resumed = journal(tmp_path)
    assert resumed.resume() == []
    resumed.append(record())
    assert len(journal(tmp_path).resume()) == 1


@pytest.mark.parametrize("text", ["hello\n", '{"run": 3}\n', '{"run": {}}\n{"id": 3}\n', "[]\n"])
def test_what_is_no_journal_is_refused(tmp_path, text):
    one = Journal(tmp_path / "run.jsonl", {})
    one.path.write_text(text)
    with pytest.raises(JournalError, match=r"run.jsonl: line \d is not of a journal"):
        one.resume()
    assert one.path.read_text() == text


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(JournalError, match="cannot be read: Is a directory"):
        Journal(tmp_path, RUN).resume()


@pytest.mark.parametrize("other", [{**RUN, "seed": 1}, {"target": "x"}, {**RUN, "more": 2}])
def test_another_run_is_not_resumed(tmp_path, other):
    journal(tmp_path).start()
    with pytest.raises(JournalError, match="is of a run with"):
        journal(tmp_path, other).resume()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_kept_in_mind_once():
    one = Journal(Path("/dev/full"), RUN)
    one.start()
    first = one.problem
    assert first == "/dev/full: cannot be written: No space left on device"
    one.append(record())
    assert one.problem == first


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path, monkeypatch):
    one = journal(tmp_path)
    one.start()
    one.append(record("a"))
    before = one.path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("attnproof.record.os.fsync", full)
        one.append(record("b"))
    assert one.problem is not None
    assert one.path.read_bytes() == before
    one.append(record("c"))
    assert [kept.problem for kept in journal(tmp_path).resume()] == ["a", "c"]
