"""The environment report."""

from __future__ import annotations

import json

import pytest
import torch

from attnproof.backend import Capabilities, Description
from attnproof.doctor import findings
from attnproof.environment import cores, cpu_model, environment, lines, memory_bytes, versions
from attnproof.listing import Listed, catalogue


def test_the_environment_is_json_and_names_what_a_verdict_depends_on() -> None:
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["isa"] == torch.backends.cpu.get_cpu_capability()
    assert found["cpu"]["cores"] == cores() >= 1
    assert found["memory_gib"] > 0.1
    assert memory_bytes() > 2**27
    assert cpu_model()
    assert "attnproof" in versions()


def test_the_environment_shows_variables_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNPROOF_TYPPO", "1")
    monkeypatch.setenv("UNRELATED", "1")
    shown = dict(lines())
    assert "ATTNPROOF_TYPPO=1" in shown["variables"]
    assert "UNRELATED" not in shown["variables"]


def usual() -> dict[str, object]:
    return {
        "memory_gib": 16.0,
        "gpus": [{"name": "a"}],
        "variables": {},
        "cpu": {"cores": 4, "torch_threads": 4},
    }


HERE = Listed(
    name="a", source="m:a", description=Description(name="a", capabilities=Capabilities())
)


def test_nothing_odd() -> None:
    assert findings(usual(), [HERE]) == []


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"memory_gib": 1.5}, "1.5 GiB of memory"),
        ({"gpus": []}, "torch sees no GPU"),
        ({"variables": {"ATEN_CPU_CAPABILITY": "default"}}, "ATEN_CPU_CAPABILITY=default"),
        ({"cpu": {"cores": 2, "torch_threads": 64}}, "64 threads on 2 cores: set OMP_NUM_THREADS"),
    ],
)
def test_what_is_odd_is_said(odd: dict[str, object], words: str) -> None:
    said = findings(usual() | odd, [HERE])
    assert len(said) == 1
    assert words in said[0]


def test_a_backend_says_why_it_is_not_here() -> None:
    away = Description(name="b", capabilities=Capabilities(), unavailable="no CUDA device")
    assert Listed(name="b", source="m:b", description=away).problem == "no CUDA device"
    broken = Listed(name="c", source="m:c", error="cannot be imported")
    assert broken.problem == "cannot be imported"
    assert findings(usual(), [broken]) == ["no backend can run here"]


def test_the_catalogue_counts_cases_by_level() -> None:
    found = catalogue()
    assert {"masks", "numerics", "gradients"} <= set(found)
    window = next(check for check in found["masks"] if check.name == "window")
    assert 0 < window.cases["quick"] < window.cases["full"]
    assert window.about
