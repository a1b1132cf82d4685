"""A file that the user named is written whole or not at all; what is no file is never replaced."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attn_reference.inputs import Attention, Inputs
from attn_reference.problem import Problem
from attnproof.cli.main import app
from attnproof.computation import save_computation
from attnproof.environment import environment
from attnproof.golden import traffic, vectors
from attnproof.inputs.make import make_inputs
from attnproof.options import Options
from attnproof.plan import CallResult
from attnproof.report.page import write_report
from attnproof.report.results import write_results
from attnproof.report.summary import summarise
from attnproof.writing import replace_file, unwritable

ACCEPTED = "accepted is a file, regular or new"
CASE = "heads/groups/b1_h4x2_q5_k9_d16_fp32"


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def listening(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path


def linked(path: Path, to: Path | str) -> Path:
    path.symlink_to(to)
    return path


NO_FILES: dict[str, Callable[[Path], Path]] = {
    "is a FIFO": lambda folder: fifo(folder / "x"),
    "is a socket": lambda folder: listening(folder / "x"),
    "is a folder": lambda folder: folder,
    "is a FIFO ": lambda folder: linked(folder / "x", fifo(folder / "y")),
    "is a folder ": lambda folder: linked(folder / "x", folder),
    "Too many levels of symbolic links": lambda folder: linked(folder / "x", folder / "x"),
}


@pytest.mark.parametrize("says", NO_FILES)
def test_what_is_no_file_is_refused_and_stays(tmp_path: Path, says: str) -> None:
    path = NO_FILES[says](tmp_path)
    before = path.lstat()
    why = unwritable(path)
    assert why is not None
    assert says.strip() in why
    with pytest.raises(OSError, match=says.strip()):
        replace_file(path, b"new")
    assert path.lstat() == before


def test_a_pipe_that_a_link_leads_to_through_a_descriptor_is_refused(tmp_path: Path) -> None:
    """As the standard streams are when they are redirected: no path leads to it."""
    here, there = os.pipe()
    try:
        path = linked(tmp_path / "x", f"/proc/self/fd/{there}")
        if not path.exists():
            pytest.skip("there is no /proc here")
        assert unwritable(path) == f"is a FIFO; {ACCEPTED}"
    finally:
        os.close(here)
        os.close(there)


def test_an_open_file_that_has_no_name_any_more_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "gone").open("wb") as file:
        path = linked(tmp_path / "x", f"/proc/self/fd/{file.fileno()}")
        if not path.exists():
            pytest.skip("there is no /proc here")
        assert unwritable(path) is None
        (tmp_path / "gone").unlink()
        assert unwritable(path) == f"is an open file without a name; {ACCEPTED}"


def test_a_file_is_replaced_where_links_lead(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    real = tmp_path / "a" / "real"
    real.write_bytes(b"old")
    first = linked(tmp_path / "a" / "first", "real")
    second = linked(tmp_path / "b" / "second", first)
    new = linked(tmp_path / "b" / "new", tmp_path / "a" / "made")
    for path, content in ((real, b"1"), (first, b"2"), (second, b"3")):
        replace_file(path, content)
        assert real.read_bytes() == content
    replace_file(new, b"4")
    assert (tmp_path / "a" / "made").read_bytes() == b"4"
    assert all(path.is_symlink() for path in (first, second, new))
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(
        ["a", "b", "first", "made", "new", "real", "second"]
    )


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    assert unwritable(tmp_path / "no" / "x") == f"there is no folder {tmp_path / 'no'}"
    link = linked(tmp_path / "link", tmp_path / "no" / "x")
    assert unwritable(link) == f"leads to {tmp_path / 'no' / 'x'}, where there is no folder"


def test_what_fails_halfway_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fails(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """Not even a FIFO of that name, which would let the writer wait for a reader."""
    fifo(tmp_path / f"x.{os.getpid()}.part")
    replace_file(tmp_path / "x", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def computed() -> tuple[Problem, Inputs, CallResult]:
    problem = Problem(seqlen_q=2, seqlen_k=2, head_dim=8)
    inputs = make_inputs(problem)
    return problem, inputs, CallResult(attention=Attention(out=inputs.q.clone()))


WRITERS: dict[str, Callable[[Path], object]] = {
    "run.json": lambda path: write_results(Options(target="x", json=path), [], []),
    "index.html": lambda path: write_report(
        path.parent, Options(target="x"), summarise([]), [], environment()
    ),
    "call.safetensors": lambda path: save_computation(path, *computed()),
    "one-key.safetensors": lambda path: vectors.update(path.parent),
    "counts.json": lambda path: traffic.update(path.parent),
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One golden vector, and counts of one small size."""
    monkeypatch.setattr(vectors, "VECTORS", {"one-key": vectors.VECTORS["one-key"]})
    monkeypatch.setattr(traffic, "SIZES", ((16, 8, 256),))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", WRITERS)
def test_whatever_is_written_goes_where_links_lead(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    real = tmp_path / "there" / "real"
    real.write_bytes(b"")
    link = linked(tmp_path / "here" / name, real)
    WRITERS[name](link)
    assert link.is_symlink()
    assert real.stat().st_size > 0


REFUSED: dict[str, tuple[list[str], str]] = {
    "run.json": (["check", "nosuch", "--json", "{path}"], "--json '{path}': is a FIFO; "),
    "run.jsonl": (
        ["check", "nosuch", "--json", "{folder}/run.json"],
        "--json '{folder}/run.json': its journal run.jsonl is a FIFO; ",
    ),
    "index.html": (
        ["check", "nosuch", "--report", "{folder}"],
        "--report '{folder}': its index.html is a FIFO; ",
    ),
    "call.safetensors": (
        ["replay", CASE, "--target", "nosuch", "--save", "{path}"],
        "--save '{path}': is a FIFO; ",
    ),
    "golden.json": (
        ["golden", "check", "nosuch", "--json", "{path}"],
        "--json '{path}': is a FIFO; ",
    ),
    "one-key.safetensors": (
        ["golden", "update", "{folder}"],
        "golden update '{folder}': its one-key.safetensors is a FIFO; ",
    ),
    "traffic/manifest.json": (
        ["golden", "update", "{folder}/traffic"],
        "golden update '{folder}/traffic': its manifest.json is a FIFO; ",
    ),
}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_file_is_refused_before_anything_runs(tmp_path: Path, name: str) -> None:
    """The target could not be loaded either: that is not looked at."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    before = fifo(path).lstat()
    arguments, words = REFUSED[name]
    result = CliRunner().invoke(
        app, [word.format(path=path, folder=tmp_path) for word in arguments]
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"attnproof: {words.format(path=path, folder=tmp_path)}{ACCEPTED}\n"
    assert path.lstat() == before
    assert sorted(tmp_path.rglob("*")) == sorted({path, *({path.parent} - {tmp_path})})
