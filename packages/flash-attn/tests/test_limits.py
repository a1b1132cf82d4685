"""What each form takes, by version and by GPU, over a table of GPUs."""

from __future__ import annotations

from typing import Any

import pytest

from attn_reference import FEATURES
from attnproof.device import ARCHITECTURES, Device, capability_of
from flash_attn_backend.attnproof_backend import flash_attn_2, flash_attn_3, flash_attn_4
from flash_attn_backend.forms import FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4, FORMS, Form
from flash_attn_backend.limits import LIMITS, limits, refusals
from flash_attn_backend.loading import numbers

ORDINARY: dict[str, Any] = {
    "shape": (2, 4, 33, 64),
    "head_dim_v": 64,
    "dropout": False,
    "softcap": False,
    "gradients": True,
    "splits": False,
}


def refused(form: Form, arch: str, **changes: Any) -> str:
    return "; ".join(refusals(form, capability_of(arch), **{**ORDINARY, **changes}))


@pytest.mark.parametrize(
    ("backend", "takes"),
    [
        (flash_attn_2, {"Ampere", "Ada", "Hopper", "Blackwell"}),
        (flash_attn_3, {"Hopper"}),
        (flash_attn_4, {"Hopper", "Blackwell"}),
    ],
)
def test_architectures(backend: Any, takes: set[str]) -> None:
    for capability, architecture in ARCHITECTURES.items():
        gpu = Device(name="a GPU", capability=capability, memory=10**10)
        lacks = backend.requirement.unmet(gpu)
        assert bool(lacks) == (architecture not in takes), architecture
        if lacks:
            assert lacks[0].startswith(f"{backend.form.module} needs sm_")
            assert lacks[0].endswith(f"this is a GPU, {gpu.sm}")


@pytest.mark.parametrize("name", FORMS)
def test_features_are_those_of_the_vocabulary(name: str) -> None:
    assert LIMITS[name].features <= set(FEATURES)
    for pair in LIMITS[name].excludes:
        assert set(pair) <= LIMITS[name].features


@pytest.mark.parametrize(
    ("version", "missing"),
    [
        ("2.2.0", {"window", "alibi", "paged", "softcap"}),
        ("2.3.6", {"alibi", "paged", "softcap"}),
        ("2.5.9.post1", {"softcap"}),
        ("2.6.0", set()),
        ("2.10.0", set()),
    ],
)
def test_what_a_version_does_not_have_yet(version: str, missing: set[str]) -> None:
    newest = LIMITS["flash-attn-2"].features
    assert newest - limits(FLASH_ATTN_2, numbers(version), None).features == missing


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_what_is_ordinary_is_taken_everywhere(name: str, arch: str) -> None:
    assert refused(FORMS[name], arch) == ""


@pytest.mark.parametrize(
    ("form", "arch", "changes", "said"),
    [
        (FLASH_ATTN_2, "sm_90", {"shape": (0, 4, 33, 64)}, "a batch or query length of 0"),
        (FLASH_ATTN_2, "sm_90", {"shape": (2, 4, 0, 64)}, "a batch or query length of 0"),
        (
            FLASH_ATTN_2,
            "sm_89",
            {"shape": (2, 4, 33, 256), "dropout": True},
            "on compute capability 8.9 there is no backward with dropout of head_dim above 192",
        ),
        (FLASH_ATTN_3, "sm_90", {"shape": (2, 4, 33, 96)}, "head_dim 96 with 64 of V"),
        (FLASH_ATTN_4, "sm_90", {"splits": True}, "keys are not split"),
        (
            FLASH_ATTN_4,
            "sm_100",
            {"shape": (2, 4, 33, 192), "head_dim_v": 192},
            "above 128 there are 192 with 128, and 256 with 256",
        ),
        (
            FLASH_ATTN_4,
            "sm_100",
            {"shape": (2, 4, 33, 256), "head_dim_v": 256, "softcap": True},
            "no backward with softcap of head_dim 256",
        ),
    ],
)
def test_refusals(form: Form, arch: str, changes: dict[str, Any], said: str) -> None:
    assert said in refused(form, arch, **changes)


@pytest.mark.parametrize(
    ("form", "arch", "changes"),
    [
        (FLASH_ATTN_2, "sm_80", {"shape": (2, 4, 33, 256), "dropout": True}),
        (FLASH_ATTN_2, "sm_89", {"shape": (2, 4, 33, 192), "dropout": True}),
        (FLASH_ATTN_2, "sm_89", {"shape": (2, 4, 33, 256), "dropout": True, "gradients": False}),
        (FLASH_ATTN_3, "sm_90", {"shape": (2, 4, 33, 192), "head_dim_v": 128}),
        (FLASH_ATTN_4, "sm_90", {"shape": (2, 4, 33, 192), "head_dim_v": 192}),
        (FLASH_ATTN_4, "sm_100", {"shape": (2, 4, 33, 192), "head_dim_v": 128, "splits": True}),
    ],
)
def test_what_is_beside_a_refusal_is_taken(form: Form, arch: str, changes: dict[str, Any]) -> None:
    assert refused(form, arch, **changes) == ""


def test_blackwell_of_workstations_has_less() -> None:
    hopper, small = (limits(FLASH_ATTN_4, None, capability_of(a)) for a in ("sm_90", "sm_120"))
    assert hopper.features - small.features == {"paged"}
    assert "sinks" not in small.gradients
    assert (hopper.head_dim_max, small.head_dim_max) == (256, 128)
