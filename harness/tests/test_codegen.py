"""The codegen gate: what is read of a compiled kernel, what fails, what is pinned and said."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from attnproof.cli.main import app
from attnproof.codegen import cache as caching
from attnproof.codegen.cache import Cache
from attnproof.codegen.compiling import CannotCompile, compile_all
from attnproof.codegen.gate import Outcome, compare
from attnproof.codegen.measure import Measured, count, measure
from attnproof.codegen.sources import Compiled
from attnproof.codegen.text import summary, table
from attnproof.golden import codegen as golden

ROOT = Path(__file__).parents[2]

LOG = """\
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the wgmma pipeline in the function 'forward'
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function 'forward' for 'sm_90a'
ptxas info    : Function properties for forward
    176 bytes stack frame, 280 bytes spill stores, 264 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 176 bytes cumulative stack size
ptxas info    : Compile time = 695.292 ms
"""
SASS = """\
forward:
.text.forward:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/             @!UPT UIADD3 URZ, URZ, URZ, URZ ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR4][R2.64] ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0050*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0060*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12] ;
        /*0070*/                   FFMA2 R4, R4, R4, R4 ;
        /*0080*/                   FFMA R4, R4, R4, R4 ;
        /*0090*/                   MUFU.EX2 R4, R4 ;
        /*00a0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*10b0*/              @P1  SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R1 ;
.L_x_0:
        /*10c0*/                   BRA `(.L_x_0);
        /*10d0*/                   NOP;
"""
TTGIR = """\
#blocked = #ttg.blocked<{sizePerThread = [1, 8], warpsPerCTA = [4, 1], order = [1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = []}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = []}>
    ttg.warp_specialize(%a, %b) attributes {requestedRegisters = array<i32: 24>}
"""


def test_everything_is_read() -> None:
    found = measure(Compiled(sass=SASS, log=LOG, ttgir=TTGIR, shared=1024, tensor_memory=128))
    assert found == Measured(
        registers=255,
        stack=176,
        spill_stores=280,
        spill_loads=264,
        shared=1024,
        tensor_memory=128,
        advisories={"C7511": 1},
        warp_specialized=1,
        warps=("4x2", "8x1"),
        instructions={
            "HGMMA": 1, "UTCMMA": 1, "LDGSTS": 1, "UTMALDG": 1, "LDG": 1, "BAR": 1, "SYNCS": 1,
            "FFMA": 2, "MUFU": 1, "all": 13,
        },
    )  # fmt: skip
    assert Measured.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_several_functions_are_added_up() -> None:
    log = LOG.replace("Used 255", "Used 40") + LOG
    found = measure(Compiled(sass=SASS, log=log))
    assert (found.registers, found.stack, found.advisories) == (255, 352, {"C7511": 2})


def test_a_log_or_listing_that_is_none() -> None:
    with pytest.raises(ValueError, match="gave no log of ptxas -v"):
        measure(Compiled(sass=SASS, log=""))
    with pytest.raises(ValueError, match="gave no SASS"):
        measure(Compiled(sass="nvdisasm fatal", log=LOG))
    assert count("") == {}


@pytest.mark.parametrize(
    "values",
    [
        *([], {}, {"registers": "1"}, {"registers": -1}, {"registers": 1, "other": 1}),
        *({"registers": 1, "warps": 3}, {"registers": 1, "instructions": {"all": 1.5}}),
    ],
)
def test_bad_pins_are_none(values: Any) -> None:
    with pytest.raises(ValueError, match="not what is measured of a kernel"):
        Measured.from_dict(values)


GOOD: dict[str, Any] = {
    "registers": 200,
    "shared": 1000,
    "warp_specialized": 1,
    "warps": ("8x1",),
    "instructions": {"HGMMA": 24, "UTMALDG": 6, "UTMASTG": 2, "LDG": 4, "FMUL": 100, "all": 900},
}


def changed(limit: int = 2000, **different: Any) -> list[tuple[str, bool]]:
    """What differs from GOOD, and whether it fails; ``counts`` are of instructions."""
    counts = GOOD["instructions"] | different.pop("counts", {})
    measured = Measured(**GOOD | {"instructions": counts} | different)
    outcome = Outcome(measured=measured, limits={"shared": limit})
    found = compare({"kernel": Measured(**GOOD)}, {"kernel": outcome})
    return [(str(change), change.fails) for change in found]


@pytest.mark.parametrize(
    ("different", "sentence"),
    [
        ({"spill_stores": 8}, "bytes of spill stores 0 → 8"),
        ({"spill_loads": 8}, "bytes of spill loads 0 → 8"),
        ({"advisories": {"C7511": 1}}, "advisory C7511 of ptxas 0 → 1"),
        ({"shared": 2001}, "bytes of shared memory 1,000 → 2,001, the limit is 2,000"),
        ({"counts": {"HGMMA": 0}}, "HGMMA 24 → 0"),
        ({"counts": {"HGMMA": 12, "HMMA": 12}}, "HGMMA 24 → 12"),
        ({"counts": {"UTMALDG": 0}}, "UTMALDG 6 → 0"),
        ({"counts": {"UTMALDG": 3, "LDGSTS": 8}}, "UTMALDG 6 → 3"),
        ({"counts": {"UTMASTG": 1, "STG": 8}}, "UTMASTG 2 → 1"),
        ({"warp_specialized": 0}, "warp-specialised loops 1 → 0"),
    ],
)
def test_what_fails(different: dict[str, Any], sentence: str) -> None:
    assert (sentence, True) in changed(**different)
    assert changed(**different)[0][1], "what fails comes first"
    assert sum(fails for _, fails in changed(**different)) == 1


@pytest.mark.parametrize(
    ("different", "sentence"),
    [
        ({"registers": 210}, "registers 200 → 210"),
        ({"stack": 8}, "bytes of stack 0 → 8"),
        ({"shared": 1500}, "bytes of shared memory 1,000 → 1,500"),
        ({"advisories": {"C7600": 1}}, "advisory C7600 of ptxas 0 → 1"),
        ({"counts": {"FMUL": 461}}, "FMUL 100 → 461"),
        ({"counts": {"all": 901}}, "instructions 900 → 901"),
        ({"counts": {"HGMMA": 16}}, "HGMMA 24 → 16"),
        ({"counts": {"UTMALDG": 3}}, "UTMALDG 6 → 3"),
        ({"warps": ("4x2",)}, "warps of products 8x1 → 4x2"),
        ({"warps": ()}, "warps of products 8x1 → none"),
    ],
)
def test_what_only_warns(different: dict[str, Any], sentence: str) -> None:
    assert changed(**different) == [(sentence, False)]


def test_better_instructions_are_no_loss() -> None:
    better = changed(counts={"HGMMA": 0, "UTCMMA": 24})
    assert better == [("HGMMA 24 → 0", False), ("UTCMMA 0 → 24", False)]


def test_fewer_spills_only_warn() -> None:
    before, after = (Measured(registers=255, spill_stores=n, spill_loads=n) for n in (16, 8))
    outcome = Outcome(measured=after, limits={})
    assert [c.fails for c in compare({"k": before}, {"k": outcome})] == [False, False]


def test_kernels_that_are_new_gone_or_do_not_compile() -> None:
    good = Measured(**GOOD)
    outcomes = {
        "broken": Outcome(error="RuntimeError … no", limits={}),
        "new": Outcome(measured=good, limits={"shared": 999}),
    }
    found = compare({"gone": good, "broken": good}, outcomes)
    assert [(c.kernel, str(c), c.fails) for c in found] == [
        ("broken", "does not compile: RuntimeError … no", True),
        ("gone", "gone: pinned, and compiled no more", True),
        ("new", "bytes of shared memory 1,000, the limit is 999", True),
        ("new", "new: not pinned", True),
    ]
    text = printed(table(found))
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["broken", "gone", "new"]
    assert summary(found) == "3 kernels fail"
    assert summary([]) == ""


def printed(what: Any) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(what)
    return captured.get()


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, good = Cache(tmp_path / "new"), Measured(**GOOD)
    assert cache.get("key") is None
    cache.put("key", good)
    assert cache.get("key") == good
    assert cache.get("other") is None
    (file,) = (tmp_path / "new").iterdir()
    file.write_text("{")
    assert cache.get("key") is None
    cache.put("key", good)
    reader = tmp_path / "reader.py"
    reader.write_text("what reads kernels has changed")
    monkeypatch.setattr(caching.measuring, "__file__", str(reader))
    assert Cache(tmp_path / "new").get("key") is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    Cache(blocked).put("key", good)
    assert Cache(blocked).get("key") is None


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The one source that is registered; its kernels are those of ``kernels``."""
    monkeypatch.syspath_prepend(Path(__file__).parent)  # where other processes look as well
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    from compiled_kernels import Fake

    source = Fake(tmp_path)
    kernels(source, {"sm_90 a": 2, "sm_90 b": 4})
    monkeypatch.setattr(golden, "sources", lambda: {source.name: source})
    return source


def kernels(source: Any, values: dict[str, int | str]) -> None:
    (source.folder / "kernels").write_text(json.dumps(values))


def compiled(source: Any) -> list[str]:
    return sorted((source.folder / "compiled").read_text().split("\n")[:-1])


def run(*words: str) -> tuple[int, list[str]]:
    result = CliRunner().invoke(app, ["golden", *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, [line.rstrip() for line in result.stdout.splitlines()]


def test_kernels_are_compiled_once_in_processes_that_may_die(fake: Any) -> None:
    kernels(fake, {"a": 1, "dies": "dies", "raises": "no register", "b": 2})
    steps: list[tuple[int, int]] = []
    found = compile_all(fake, progress=lambda *step: steps.append(step))
    assert found.toolchain == {"compiler": "1.0"}
    errors = {name: outcome.error for name, outcome in found.kernels.items()}
    assert errors == {
        "a": None,
        "b": None,
        "dies": "the compiler ended its process with exit code 7",
        "raises": "RuntimeError … no register … more",
    }
    assert steps == [(n, 4) for n in (1, 2, 3, 4)]
    assert compiled(fake) == ["a", "b", "dies", "raises"]
    again = compile_all(fake).kernels
    assert again["a"] == found.kernels["a"]
    assert compiled(fake) == ["a", "b", "dies", "dies", "raises", "raises"]


def test_without_a_compiler(fake: Any) -> None:
    with pytest.raises(CannotCompile, match="fake: No module named 'compiler'"):
        compile_all(replace(fake, version="none"))


def test_pinned_compared_and_pinned_again(fake: Any) -> None:
    folder = fake.folder / "codegen"
    status, lines = run("update", str(folder))
    assert status == 0
    assert {"kernels.json: written", "manifest.json: written"} < set(lines)
    assert lines[-1] == f"2 files changed in {folder}"
    assert run("verify", str(folder)) == (0, [f"agrees: {folder}"])
    assert run("update", str(folder)) == (0, [f"0 files changed in {folder}"])
    rows = [line for line in (folder / golden.PINS).read_text().splitlines() if "sm_90" in line]
    assert len(rows) == 2, "a line for each kernel"

    kernels(fake, {"sm_90 a": 3, "sm_90 b": 4})
    status, lines = run("verify", str(folder))
    assert status == 0, "more of an instruction only warns"
    assert lines[-1] == f"agrees: {folder} (1 kernel with warnings alone)"
    assert any("HGMMA 2 → 3; instructions 3 → 4" in line for line in lines)

    kernels(fake, {"sm_90 a": 0, "sm_90 b": "no register"})
    status, lines = run("verify", str(folder))
    assert status == 1
    assert lines[-1] == f"differs: 2 kernels fail in {folder}"
    assert any("fails" in line and "HGMMA 2 → 0" in line for line in lines)
    status, lines = run("update", str(folder))
    assert (status, lines[-1]) == (0, f"2 files changed in {folder}")
    assert any("HGMMA 2 → 0" in line for line in lines), "the diff is shown"
    status, lines = run("verify", str(folder))
    assert (status, lines[-1]) == (1, f"differs: 1 kernel fails in {folder}")
    kernels(fake, {"sm_90 a": 0, "sm_90 b": 4})
    assert run("verify", str(folder))[0] == 0, "what did not compile has kept its pin"


def test_other_tools_are_not_compared_and_say_so(
    fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fake.folder / "codegen"
    run("update", str(folder))
    kernels(fake, {"sm_90 a": 0, "sm_90 b": 4})
    newer = replace(fake, version="2.0")
    monkeypatch.setattr(golden, "sources", lambda: {"fake": newer})
    reason = "pinned for compiler 1.0, here is compiler 2.0: other tools make other code"
    assert run("verify", str(folder)) == (3, [f"not compared: fake: {reason}"])
    gone = "fake: no package here registers it under attnproof.codegen"
    monkeypatch.setattr(golden, "sources", dict)
    assert run("verify", str(folder)) == (3, [f"not compared: {gone}"])
    none = replace(fake, version="none")
    monkeypatch.setattr(golden, "sources", lambda: {"fake": none})
    said = "fake: No module named 'compiler'"
    assert run("verify", str(folder)) == (3, [f"not compared: {said}"])
    assert run("update", str(folder)) == (0, [said, f"0 files changed in {folder}"])
    monkeypatch.setattr(golden, "sources", lambda: {"fake": newer})
    status, lines = run("update", str(folder))
    assert status == 0
    assert "fake: compiler 1.0, now compiler 2.0" in lines
    assert run("verify", str(folder)) == (0, [f"agrees: {folder}"])


@pytest.mark.parametrize("name", ["kernels.json", "manifest.json"])
@pytest.mark.parametrize("content", [None, "", "{}", '{"fake": {"kernels": {"a": 1}}}'])
def test_files_that_are_not_what_was_written(fake: Any, name: str, content: str | None) -> None:
    folder = fake.folder / "codegen"
    golden.update(folder)
    pins = (folder / golden.PINS).read_bytes()
    path = folder / name
    path.unlink() if content is None else path.write_text(content)
    found = golden.verify(folder)
    assert found.fails
    assert found.lines[0].startswith(str(folder))
    assert golden.update(folder).changed == [f"{name}: written"]
    assert (folder / golden.PINS).read_bytes() == pins


def test_the_pins_hold_for_the_tools_that_are_pinned() -> None:
    """Else CI would say that they are not compared, and pass."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    stored = json.loads((ROOT / golden.DIRECTORY / golden.PINS).read_text())
    assert f"triton=={stored['triton']['toolchain']['triton']}" in groups["pins"]
