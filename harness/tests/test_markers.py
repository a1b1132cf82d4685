"""What a test says that it needs of a GPU: skipped elsewhere, and why is said."""

from __future__ import annotations

import json

import pytest

from attnproof.device import current_device

pytest_plugins = ["pytester"]

DEVICE = """
from attnproof.device import Device

def pytest_configure():
    import attnproof.markers
    device = {device}
    attnproof.markers.current_device = lambda: device
"""
T4 = 'Device(name="Tesla T4", capability=(7, 5), memory=16 * 10**9)'
H100 = 'Device(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory=85 * 10**9)'
TESTS = """
import pytest

@pytest.mark.requires_arch(min="sm_80")
def test_ampere():
    pass

@pytest.mark.requires_arch("sm_90", "sm_100")
def test_hopper():
    pass

@pytest.mark.requires_memory("20GB")
def test_large():
    pass

@pytest.mark.requires_arch(min="sm_70")
@pytest.mark.requires_memory("12 GiB")
def test_volta():
    pass

def test_anywhere():
    pass
"""


def run(pytester, device, tests=TESTS, *options):
    pytester.makeconftest(DEVICE.format(device=device))
    pytester.makepyfile(tests)
    arguments = ("-rs", "--strict-markers", "-p", "no:cacheprovider", *options)
    return pytester.runpytest_subprocess(*arguments)


def test_on_a_t4(pytester):
    result = run(pytester, T4)
    result.assert_outcomes(passed=2, skipped=3)
    result.stdout.fnmatch_lines(
        [
            "*this test needs sm_80 or newer (Ampere, Ada, Hopper, Blackwell); "
            "this is Tesla T4, sm_75",
            "*this test needs one of sm_90, sm_100 (Hopper, Blackwell); this is Tesla T4, sm_75",
            "*this test needs 20 GB of GPU memory; this is Tesla T4, sm_75, with 16 GB",
        ]
    )


def test_on_an_h100_everything_runs(pytester):
    run(pytester, H100).assert_outcomes(passed=5)


def test_without_a_gpu(pytester):
    result = run(pytester, "None")
    result.assert_outcomes(passed=1, skipped=4)
    result.stdout.fnmatch_lines(["*needs 20 GB of GPU memory; torch finds no CUDA device here"])


def test_here(pytester):
    device = current_device()
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-rs", "--strict-markers", "-p", "no:cacheprovider")
    if device is None:
        result.assert_outcomes(passed=1, skipped=4)
    else:
        ran = sum(
            (
                device.capability >= (8, 0),
                device.sm in ("sm_90", "sm_100"),
                device.memory >= 20 * 10**9,
                device.capability >= (7, 0) and device.memory >= 12 * 2**30,
                True,
            )
        )
        result.assert_outcomes(passed=ran, skipped=5 - ran)


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('requires_arch(min="Ampere")', "marker requires_arch: 'Ampere' is no architecture"),
        ("requires_arch()", "marker requires_arch: accepted are architectures, and min"),
        ('requires_arch(max="sm_90")', "marker requires_arch: accepted are architectures, and min"),
        ("requires_arch(min=None)", "marker requires_arch: min=None asks for nothing; accepted is"),
        ('requires_arch("sm_90", min=None)', "marker requires_arch: min=None asks for nothing"),
        ("requires_arch(None)", "marker requires_arch: None is no architecture"),
        ('requires_memory("0GB")', "marker requires_memory: '0GB' asks for nothing; accepted is a"),
        ('requires_memory("0.1 B")', "marker requires_memory: '0.1 B' asks for nothing"),
        ("requires_memory(20)", "marker requires_memory: 20 is no size"),
        ("requires_memory()", "marker requires_memory: accepted is one size"),
    ],
)
def test_a_marker_of_another_form_is_an_error_and_no_skip(pytester, marker, message):
    tests = f"import pytest\n@pytest.mark.{marker}\ndef test_it():\n    pass\n"
    for device in (H100, "None"):
        result = run(pytester, device, tests)
        result.assert_outcomes(errors=1)
        assert message in result.stdout.str()


CHAPTER = """
import pytest
from attn_reference.problem import Problem
from attnproof.cases import cases

@cases(quick=[Problem(seqlen_q=3, head_dim=16)], feature="mine")
@pytest.mark.requires_arch(min="sm_80")
def test_something(problem, subject):
    subject.check(problem)
"""


def test_a_judged_case_is_recorded_as_unavailable_with_the_reason(pytester, tmp_path):
    file = tmp_path / "run.json"
    options = ("--attn-target=eager", "--attn-device=cpu", f"--attn-json={file}")
    pytester.makeconftest(DEVICE.format(device=T4))
    pytester.path.joinpath("test_mine.py").write_text(CHAPTER)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)
    assert result.ret == 0
    (case,) = json.loads(file.read_text())["cases"]
    assert case["verdict"] == "unavailable"
    assert case["reason"].startswith("this test needs sm_80 or newer")
    result.stdout.fnmatch_lines(["not run: 1 of 1 case", "*1  this test needs sm_80 or newer*"])
    refused = pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", *options, "--attn-skip-budget=0"
    )
    assert refused.ret == 1
    refused.stdout.fnmatch_lines(["not run: 1 case not run, and the skip budget is 0"])
