"""Deviations files: what applies, what is out of date, and what is malformed."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attnproof import deviations
from attnproof.cases import all_cases
from attnproof.deviations import (
    Deviation,
    Deviations,
    DeviationsError,
    load_deviations,
    read_deviations,
)
from attnproof.verdict import Status

HEAD = 'targets = ["mine", "package:attention"]\n'
WINDOW = """
[[deviation]]
cases = "masks/window/*fp16*"
reason = "the window is one key too wide in fp16"
proof = "https://example.org/1"
"""
CRASH = """
[[deviation]]
cases = ["big/offsets/*", "big/grid/b7?_*"]
reason = "the launch fails"
proof = "run it"
verdict = "crashed"
"""


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "known.toml"
    path.write_text(text)
    return str(path)


def load(tmp_path: Path, text: str, device: str = "cpu") -> Deviations:
    return load_deviations("mine", write(tmp_path, HEAD + text), device=device)


def test_patterns_fit_whole_ids(tmp_path: Path) -> None:
    found = load(tmp_path, WINDOW + CRASH)
    entry = found.match("masks/window/b1_h1x1_q8_k8_d8_fp16_window=2,0")
    assert entry is not None
    assert entry.reason == "the window is one key too wide in fp16"
    assert found.match("masks/window/b1_h1x1_q8_k8_d8_fp32_window=2,0") is None
    assert found.match("big/grid/b70_x") is not None
    assert found.match("more/big/grid/b70_x") is None


def test_what_is_excepted_is_not_met(tmp_path: Path) -> None:
    found = load(tmp_path, WINDOW + 'except = ["*_k1_*", "*_d8_*"]\n')
    assert found.match("masks/window/b1_h1x1_q8_k8_d16_fp16_window=2,0")
    assert found.match("masks/window/b1_h1x1_q8_k1_d16_fp16_window=2,0") is None
    assert found.match("masks/window/b1_h1x1_q8_k8_d8_fp16_window=2,0") is None


def test_entries_that_met_no_case_are_reported(tmp_path: Path) -> None:
    found = load(tmp_path, WINDOW + CRASH)
    assert [entry.proof for entry in found.unmatched()] == ["https://example.org/1", "run it"]
    found.match("masks/window/q8_fp16")
    assert [entry.proof for entry in found.unmatched()] == ["run it"]
    assert found.complaints() == [
        "known.toml, deviation 2: matches no case of this run: "
        "big/offsets/*, big/grid/b7?_*: the launch fails (run it)"
    ]


@pytest.mark.parametrize(
    ("case_id", "status", "explained"),
    [
        ("masks/window/q8_fp16", Status.DEVIATES, True),
        ("masks/window/q8_fp16", Status.CRASHED, False),
        ("masks/window/q8_fp16", Status.CONFORMS, False),
        ("masks/window/q8_fp16", Status.UNSUPPORTED, False),
        ("masks/causal/q8_fp16", Status.DEVIATES, False),
        ("big/offsets/x", Status.CRASHED, True),
        ("big/offsets/x", Status.DEVIATES, False),
    ],
)
def test_a_deviation_explains_only_the_verdict_that_it_names(
    tmp_path: Path, case_id: str, status: Status, explained: bool
) -> None:
    found = load(tmp_path, WINDOW + CRASH)
    assert (found.observe(case_id, status) is not None) == explained


def test_of_several_that_fit_the_one_that_names_the_verdict_explains(tmp_path: Path) -> None:
    crash = CRASH.replace("big/offsets/*", "masks/window/*")
    found = load(tmp_path, WINDOW + "always = false\n" + crash)
    for status, reason in (
        (Status.DEVIATES, "the window is one key too wide in fp16"),
        (Status.CRASHED, "the launch fails"),
    ):
        entry = found.observe("masks/window/a_fp16", status)
        assert entry is not None
        assert entry.reason == reason
    assert found.observe("masks/window/a_fp16", Status.TIMED_OUT) is None
    assert found.complaints() == []
    found.observe("masks/window/a_fp16", Status.CONFORMS)
    assert len(found.complaints()) == 1
    assert "no longer deviates: the launch fails" in found.complaints()[0]


def test_a_case_that_conforms_after_all_is_reported(tmp_path: Path) -> None:
    found = load(tmp_path, WINDOW)
    found.observe("masks/window/a_fp16", Status.DEVIATES)
    assert found.complaints() == []
    found.observe("masks/window/b_fp16", Status.CONFORMS)
    assert set(found.conforming()) == {"masks/window/b_fp16"}
    assert found.complaints() == [
        "known.toml, deviation 1: masks/window/b_fp16 no longer deviates: "
        "the window is one key too wide in fp16"
    ]


def test_what_chance_decides_may_conform(tmp_path: Path) -> None:
    found = load(tmp_path, WINDOW + "always = false\n")
    assert found.observe("masks/window/a_fp16", Status.CONFORMS) is None
    assert found.observe("masks/window/b_fp16", Status.DEVIATES)
    assert found.complaints() == []


@pytest.mark.parametrize(
    ("bounds", "applies"),
    [
        (">=2.5", True),
        ("<2.5", False),
        (">=2.5,<999", True),
        (">=2.5, <2.6", False),
        (f"=={torch.__version__.partition('+')[0]}", True),
        (f"!={torch.__version__.partition('+')[0]}", False),
        (f"<={torch.__version__.partition('+')[0]}", True),
        (">999", False),
    ],
)
def test_the_version_of_torch_decides(tmp_path: Path, bounds: str, applies: bool) -> None:
    entries = load(tmp_path, f'{WINDOW}torch = "{bounds}"\n').entries
    assert bool(entries) == applies


def test_the_device_decides(tmp_path: Path) -> None:
    text = f'{WINDOW}device = "cuda"\n'
    assert load(tmp_path, text, device="cuda").entries
    assert not load(tmp_path, text, device="cpu").entries


def test_a_file_about_other_targets_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + WINDOW)
    assert load_deviations("package:attention", path).entries
    with pytest.raises(DeviationsError, match="is about mine, package:attention; nothing about x"):
        load_deviations("x", path)


def test_none_is_none() -> None:
    none = load_deviations("sdpa", "none")
    assert none.match("masks/window/x") is None
    assert none.complaints() == []


def test_files_that_ship_apply_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text(HEAD + WINDOW)
    (tmp_path / "b.toml").write_text('targets = "mine"\n' + CRASH)
    (tmp_path / "c.toml").write_text('targets = "other"\n' + CRASH)
    monkeypatch.setattr(deviations.files, "__file__", str(tmp_path / "files.py"))
    assert [e.source for e in load_deviations("mine").entries] == [
        "a.toml, deviation 1",
        "b.toml, deviation 1",
    ]
    assert load_deviations("nobody").entries == ()


def test_the_files_that_ship_can_be_read() -> None:
    for path in Path(deviations.__file__).parent.glob("*.toml"):
        targets, _ = read_deviations(path)
        assert targets


def met(entry: Deviation, shipped: list[str]) -> list[str]:
    """The ids that the patterns of an entry fit, those excepted included."""
    return [i for i in shipped if any(fnmatchcase(i, pattern) for pattern in entry.cases)]


@pytest.mark.parametrize(
    "path", sorted(Path(deviations.__file__).parent.glob("*.toml")), ids=lambda path: path.stem
)
def test_every_pattern_that_ships_fits_a_case(path: Path) -> None:
    shipped = [case.id for case in all_cases("full")]
    for device in ("cpu", "cuda"):
        _, entries = read_deviations(path, device=device)
        idle = [
            pattern
            for entry in entries
            for pattern in entry.cases
            if not any(fnmatchcase(case_id, pattern) for case_id in shipped)
        ]
        assert idle == []
        needless = [
            pattern
            for entry in entries
            for pattern in entry.excepted
            if not any(fnmatchcase(case_id, pattern) for case_id in met(entry, shipped))
        ]
        assert needless == []


def test_the_proof_of_torchs_causal_nan() -> None:
    """The reproduction that torch.toml gives: where it fails, the entry is out of date."""
    x = torch.ones(1, 1, 2, 8)
    flash, math = (
        [
            sdpa_kernel(one)(scaled_dot_product_attention)(x, x, x, is_causal=True, scale=s)
            for s in (0.0, -1.0)
        ]
        for one in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    )
    for wrong, right in zip(flash, math, strict=True):
        assert torch.equal(right, x)
        assert wrong[0, 0, 0].isnan().all()
        assert torch.equal(wrong[0, 0, 1], x[0, 0, 1])


def test_torchs_causal_nan_is_known_where_it_is_met() -> None:
    shown = [
        case.id
        for case in all_cases("quick")
        if case.check == "scale_not_positive" and case.problem.causal == "top-left"
    ]
    assert len(shown) == 3  # one for each dtype
    for target in ("sdpa", "sdpa-flash", "torch.nn.functional:scaled_dot_product_attention"):
        known = load_deviations(target)
        assert all(known.observe(case_id, Status.DEVIATES) for case_id in shown)
    assert not any(load_deviations("sdpa-math").match(case_id) for case_id in shown)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("targets = [", "is not TOML: "),
        (WINDOW, "targets is missing; accepted is a text that is not empty"),
        ("targets = []", "targets is []; accepted is a text"),
        ("targets = [3]", "targets is 3; accepted is a text"),
        (HEAD + "entries = 3", "unknown key 'entries'; accepted are targets, deviation"),
        (HEAD + "deviation = 3", "deviation: accepted are tables [[deviation]]"),
        (HEAD + "deviation = [3]", "deviation: accepted are tables [[deviation]]"),
        (HEAD + WINDOW + "case = 'x'", "known.toml, deviation 1: unknown key 'case'; accepted are"),
        (HEAD + WINDOW + CRASH.replace("reason", "# "), "deviation 2: reason is missing"),
        (HEAD + WINDOW.replace("https://example.org/1", " "), "deviation 1: proof is ' '"),
        (HEAD + WINDOW + "verdict = 'conforms'", "verdict='conforms': accepted are deviates, cra"),
        (HEAD + WINDOW + "device = 'tpu'", "device='tpu': accepted are cpu, cuda"),
        (HEAD + WINDOW + "except = []", "except is []; accepted is a text"),
        (HEAD + WINDOW + "always = 1", "always=1: accepted are true, false"),
        (HEAD + WINDOW + "torch = '2.5'", "torch='2.5': accepted are bounds such as '>=2.5,<2.14'"),
        (HEAD + WINDOW + "torch = 2.5", "torch=2.5: accepted are bounds"),
    ],
)
def test_what_is_malformed_is_said_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DeviationsError) as caught:
        load_deviations("mine", path)
    assert said in str(caught.value)
    assert "known.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DeviationsError, match="no such: No such file or directory"):
        load_deviations("mine", str(tmp_path / "no such"))
    (tmp_path / "known.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(DeviationsError, match="is not UTF-8 text"):
        load_deviations("mine", str(tmp_path / "known.toml"))
