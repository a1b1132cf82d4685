"""What a device lacks of a requirement, over devices from Pascal to Blackwell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from attn_reference.inputs import Attention
from attn_reference.precision import FLASH
from attn_reference.problem import Problem
from attnproof.backend import Capabilities, Description
from attnproof.backends.library import LibraryBackend
from attnproof.device import ARCHITECTURES, Device, capability_of, driver, sm
from attnproof.requirement import Requirement, Requiring, bytes_of, requirement_of, size
from attnproof.subject import Subject
from attnproof.targets import TargetSpec, describe
from attnproof.verdict import NotConforming, Status
from attnproof.worker.runners import InProcessRunner


def gpu(name: str, capability: tuple[int, int], gib: float) -> Device:
    return Device(
        name=name,
        capability=capability,
        memory=int(gib * 2**30),
        driver="580.82.07",
        cuda="13.0",
        torch="2.11.0+cu130",
    )


P100 = gpu("Tesla P100-PCIE-16GB", (6, 0), 16)
GTX1080 = gpu("NVIDIA GeForce GTX 1080", (6, 1), 8)
V100 = gpu("Tesla V100-SXM2-32GB", (7, 0), 32)
T4 = gpu("Tesla T4", (7, 5), 15)
A100 = gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80)
RTX3090 = gpu("NVIDIA GeForce RTX 3090", (8, 6), 24)
ORIN = gpu("Orin", (8, 7), 32)
L4 = gpu("NVIDIA L4", (8, 9), 22)
H100 = gpu("NVIDIA H100 80GB HBM3", (9, 0), 79)
B200 = gpu("NVIDIA B200", (10, 0), 178)
B300 = gpu("NVIDIA B300", (10, 3), 270)
RTX5090 = gpu("NVIDIA GeForce RTX 5090", (12, 0), 32)
DEVICES = (P100, GTX1080, V100, T4, A100, RTX3090, ORIN, L4, H100, B200, B300, RTX5090)

AMPERE = Requirement(who="flash_attn", arch_min="sm_80")
HOPPER = Requirement(who="flash_attn_interface", archs=("sm_90",))
DATACENTRE = Requirement(who="flash_attn.cute", archs=("sm_90", "sm_100", "sm_103"))


def ids(device: Device) -> str:
    return device.sm


@pytest.mark.parametrize("device", DEVICES, ids=ids)
def test_each_requirement_is_met_by_the_right_devices(device: Device) -> None:
    number = device.capability[0] * 10 + device.capability[1]
    assert (AMPERE.unmet(device) == []) == (number >= 80)
    assert (HOPPER.unmet(device) == []) == (number == 90)
    assert (DATACENTRE.unmet(device) == []) == (number in (90, 100, 103))
    assert Requirement(who="anything").unmet(device) == []


@pytest.mark.parametrize("device", DEVICES, ids=ids)
def test_what_is_there_is_named_and_every_device_has_a_name(device: Device) -> None:
    for requirement in (AMPERE, HOPPER, DATACENTRE):
        for sentence in requirement.unmet(device):
            assert sentence.startswith(f"{requirement.who} needs sm_") or "needs one of" in sentence
            assert sentence.endswith(f"this is {device.name}, {device.sm}")
    assert device.architecture in ARCHITECTURES.values()


def test_the_sentences() -> None:
    assert AMPERE.unmet(T4) == [
        "flash_attn needs sm_80 or newer (Ampere, Ada, Hopper, Blackwell); this is Tesla T4, sm_75"
    ]
    assert HOPPER.unmet(A100) == [
        "flash_attn_interface needs sm_90 (Hopper); this is NVIDIA A100-SXM4-80GB, sm_80"
    ]
    assert DATACENTRE.unmet(RTX5090) == [
        "flash_attn.cute needs one of sm_90, sm_100, sm_103 (Hopper, Blackwell); "
        "this is NVIDIA GeForce RTX 5090, sm_120"
    ]


def test_capabilities_compare_as_numbers_not_as_text() -> None:
    assert Requirement(who="a", arch_min="sm_90").unmet(B200) == []
    assert Requirement(who="a", arch_min="sm_100").unmet(H100)
    assert Requirement(who="a", driver_min="99.5").unmet(H100) == []
    assert Requirement(who="a", torch_min="2.9").unmet(H100) == []


def test_memory_driver_toolkit_and_torch() -> None:
    big = Requirement(who="a", memory=bytes_of("40GB"))
    assert big.unmet(T4) == ["a needs 40 GB of GPU memory; this is Tesla T4, sm_75, with 16.1 GB"]
    assert big.unmet(H100) == []
    newer = Requirement(who="a", driver_min="590.1", cuda_min="13.1", torch_min="2.12")
    assert newer.unmet(H100) == [
        "a needs NVIDIA driver 590.1 or newer; here is 580.82.07",
        "a needs torch built with CUDA 13.1 or newer; here is 13.0",
        "a needs torch 2.12 or newer; here is 2.11.0+cu130",
    ]
    same = Requirement(who="a", driver_min="580.82.07", cuda_min="13.0.0", torch_min="2.11")
    assert same.unmet(H100) == []


def test_no_gpu_lacks_everything() -> None:
    assert Requirement(who="a", arch_min="sm_90", memory=bytes_of("40GB")).unmet(None) == [
        "a needs sm_90 or newer (Hopper, Blackwell); torch finds no CUDA device here",
        "a needs 40 GB of GPU memory; torch finds no CUDA device here",
    ]
    assert Requirement(who="a", archs=("sm_90",)).unmet(None)


def test_a_version_that_nobody_says_is_not_held_against_the_device() -> None:
    unknown = replace(H100, driver=None)
    assert Requirement(who="a", driver_min="590").unmet(unknown) == []


def test_everything_that_lacks_is_said_at_once() -> None:
    said = Requirement(who="a", arch_min="sm_80", memory=bytes_of("1000GB"))
    assert len(said.unmet(T4)) == 2


def test_dtypes_that_depend_on_the_architecture() -> None:
    requirement = Requirement(who="triton", dtypes=(("bf16", "sm_80"),))
    assert requirement.unmet(T4) == []
    assert requirement.refused_dtypes(T4) == {
        "bf16": "triton needs sm_80 or newer (Ampere, Ada, Hopper, Blackwell) for bf16; "
        "this is Tesla T4, sm_75"
    }
    assert requirement.refused_dtypes(L4) == {}


def test_an_architecture_that_is_not_in_the_table_is_still_compared_and_named() -> None:
    future = gpu("NVIDIA X", (13, 0), 100)
    assert AMPERE.unmet(future) == []
    assert HOPPER.unmet(future) == [
        "flash_attn_interface needs sm_90 (Hopper); this is NVIDIA X, sm_130"
    ]
    assert future.architecture == "compute capability sm_130"
    assert "sm_140" in Requirement(who="a", arch_min="sm_140").unmet(future)[0]


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_capabilities_and_their_text(capability: tuple[int, int]) -> None:
    assert capability_of(sm(capability)) == capability


@pytest.mark.parametrize("text", ["80", "sm_", "sm_8", "SM_80", "sm_80a", "Hopper", "", 80])
def test_another_form_of_architecture_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no architecture; accepted is the form sm_80"):
        Requirement(who="a", arch_min=text)
    with pytest.raises(ValueError, match="is no architecture"):
        Requirement(who="a", dtypes=(("bf16", text),))
    with pytest.raises(ValueError, match="is no architecture"):
        Requirement(who="a", archs=(text,))


def test_only_the_least_architecture_may_be_left_open() -> None:
    with pytest.raises(ValueError, match="None is no architecture"):
        Requirement(who="a", archs=(None,))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["driver_min", "cuda_min", "torch_min"])
def test_another_form_of_version_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}='new': accepted are numbers"):
        Requirement(who="a", **{field: "new"})


def test_sizes() -> None:
    assert bytes_of("20GB") == 20 * 10**9
    assert bytes_of("1.5 GiB") == 3 * 2**29
    assert size(20 * 10**9) == "20 GB"
    assert size(bytes_of("80GiB")) == "85.9 GB"
    for wrong in ("20", "GB", "20 G", "-1GB", "", None):
        with pytest.raises(ValueError, match="is no size; accepted is a number and one of B, KB"):
            bytes_of(wrong)
    with pytest.raises(ValueError, match="memory=-1"):
        Requirement(who="a", memory=-1)


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27 2025\nGCC",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build",
    ],
)
def test_the_version_of_the_driver(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr("attnproof.device.DRIVER_FILE", file)
    assert driver() is None
    file.write_text(text)
    assert driver() == "580.82.07"


def test_a_backend_carries_its_requirement_as_an_attribute() -> None:
    class Carrying:
        requirement = AMPERE

    assert isinstance(Carrying(), Requiring)
    assert requirement_of(Carrying()) is AMPERE
    assert requirement_of(object()) is None


def test_what_is_described_names_what_the_gpu_lacks_before_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = LibraryBackend(
        name="absent",
        module="no_such_library",
        install="pip install it",
        capabilities=Capabilities(devices=("cuda",)),
        call=lambda inputs, problem: Attention(out=inputs.q),
        requirement=replace(AMPERE, dtypes=(("bf16", "sm_90"),)),
    )
    here = {"device": T4}
    monkeypatch.setattr("attnproof.requirement.current_device", lambda: here["device"])
    assert describe(backend, "cuda").unavailable == AMPERE.unmet(T4)[0]
    here["device"] = L4
    told = describe(backend, "cuda")
    assert told.unavailable == "no_such_library is not installed: pip install it"
    assert "for bf16; this is NVIDIA L4, sm_89" in told.refused_dtypes["bf16"]
    assert Description.from_dict(told.as_dict()) == told
    assert describe(backend, "cpu").refused_dtypes == {}


def test_a_refused_dtype_is_unsupported_with_its_reason() -> None:
    subject = Subject(
        runner=InProcessRunner(TargetSpec("eager"), "cpu"),
        description=Description(
            name="a", capabilities=Capabilities(), refused_dtypes={"bf16": "a needs sm_80"}
        ),
        precision=FLASH,
    )
    with pytest.raises(NotConforming) as raised:
        subject.prepare(Problem(dtype="bf16"))
    assert raised.value.verdict.status is Status.UNSUPPORTED
    assert raised.value.verdict.reason == "a needs sm_80"
    subject.prepare(Problem(dtype="fp16"))
