"""The codegen gate on what Triton compiles: each planted fault is caught, and nothing else."""

import json
from pathlib import Path

import pytest

from attnproof.codegen.compiling import compile_all
from attnproof.codegen.gate import compare
from triton_attention import codegen
from triton_attention.attnproof_backend import codegen as source
from triton_attention.tiles import GPUS

ROOT = Path(__file__).parents[3]
SPILLS = {"bytes of spill stores", "bytes of spill loads"}
# By fault: what is pinned, and what fails.
FAULTS = {
    "ampere, too few warps": ("ampere", SPILLS),
    "ampere, fp32": ("ampere", {"HMMA"}),
    "hopper, large tiles, too few warps": (
        "hopper, large tiles",
        SPILLS | {"advisory C7511 of ptxas"},
    ),
    "hopper, too many stages": ("hopper", {"bytes of shared memory"}),
    "hopper, rows of 32": ("hopper", {"HGMMA"}),
    "hopper, fp32": ("hopper", {"HGMMA"}),
    "hopper, pointers": ("hopper", {"UTMALDG", "UTMASTG"}),
    "hopper, no descriptor for out": ("hopper", {"UTMASTG"}),
    "hopper": ("hopper, specialized", {"warp-specialised loops"}),
    "blackwell, rows of 256": (
        "blackwell",
        {"columns of tensor memory", "UTCMMA", "UTMALDG", "UTMASTG"},
    ),
}
# What only warns, and the count that shows it.
DRIFT = {"hopper, exp": "FMUL", "hopper, divide": "MUFU", "hopper, specialized": "registers"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every planted kernel, compiled in processes that do not interpret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)  # where those processes look as well
        from codegen_faults import Planted

        return compile_all(Planted(), folder=tmp_path_factory.mktemp("cache")).kernels


def changes(found, pinned, compiled):
    """What differs when one kernel is pinned and the other is compiled in its place."""
    return compare({"kernel": found[pinned].measured}, {"kernel": found[compiled]})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails(found, fault):
    pinned, expected = FAULTS[fault]
    assert changes(found, pinned, pinned) == []
    assert {change.what for change in changes(found, pinned, fault) if change.fails} == expected


@pytest.mark.parametrize("fault", DRIFT)
def test_drift_only_warns(found, fault):
    drifted = changes(found, "hopper", fault)
    assert DRIFT[fault] in {change.what for change in drifted}
    assert not any(change.fails for change in drifted)


def test_what_does_not_compile_fails(found):
    (change,) = compare({"kernel": found["hopper"].measured}, {"kernel": found["hopper, wrong"]})
    assert change.fails
    assert "does not compile: CompilationError" in change.what
    assert "must have equal ranks" in change.what


def test_the_calls_cover_what_is_used():
    named = [(capability, *name.split()) for capability, name in codegen.calls()]
    assert {capability for capability, *_ in named} == set(GPUS) == {80, 86, 89, 90, 100}
    for capability in GPUS:
        passes = {what for found, what, *_ in named if found == capability}
        assert passes >= {"forward", "backward", "decode", "v1-forward", "v1-backward"}
        features = {feature for found, *_, feature in named if found == capability}
        assert features >= {"dense", "causal", "window", "bias", "softcap-alibi", "dropout"}
        assert features >= {"varlen", "paged"}
        dtypes = {dtype for found, _, dtype, *_ in named if found == capability}
        assert dtypes == {"fp32", "fp16", "bf16"}
    dims = {int(dim) for _, _, _, dim, _ in named}
    assert {16, 32, 64, 128, 256} < dims
    assert any(dim & (dim - 1) for dim in dims), "a power of two is padded to itself"
    assert len(set(named)) == len(named)


def test_every_call_is_pinned():
    pins = json.loads((ROOT / "golden/codegen/kernels.json").read_text("utf-8"))["triton"][
        "kernels"
    ]
    assert {name.rpartition(": ")[0] for name in pins} == set(source.calls())


def test_an_unknown_call_is_named():
    with pytest.raises(ValueError, match=r"call 'forward bf16 7 dense' for sm_90: accepted are"):
        source.kernels("sm_90 forward bf16 7 dense")
