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
# What fails, by fault.
FAILS = {
    "ampere, too few warps": SPILLS,
    "ampere, fp32": {"HMMA"},
    "hopper, large tiles, too few warps": SPILLS | {"advisory C7511 of ptxas"},
    "hopper, too many stages": {"bytes of shared memory"},
    "hopper, rows of 32": {"HGMMA"},
    "hopper, fp32": {"HGMMA"},
    "hopper, pointers": {"UTMALDG"},
    "hopper, no descriptor for out": {"UTMASTG"},
    "hopper": {"warp-specialised loops"},
    "blackwell, rows of 256": {"columns of tensor memory", "UTCMMA", "UTMALDG", "UTMASTG"},
}
# What only warns, and the count that shows it.
DRIFT = {"hopper, exp": "FMUL", "hopper, divide": "MUFU"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every planted kernel, compiled in processes that do not interpret."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)  # where those processes look as well
        import codegen_faults

        folder = tmp_path_factory.mktemp("cache")
        kernels = compile_all(codegen_faults.Planted(), folder=folder).kernels
        files = times(folder)
        assert len(files) == sum(outcome.error is None for outcome in kernels.values())
        assert compile_all(codegen_faults.Planted(), folder=folder).kernels == kernels
        assert times(folder) == files, "nothing is measured again"
        return kernels, codegen_faults.FAULTS


def times(folder):
    """When each file was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def changes(found, fault):
    """What differs when the kernel as it should be is pinned, and the fault is compiled."""
    kernels, faults = found
    good = kernels[faults[fault]]
    assert compare({fault: good.measured}, {fault: good}) == []
    return compare({fault: good.measured}, {fault: kernels[fault]})


@pytest.mark.parametrize("fault", FAILS)
def test_a_planted_fault_fails(found, fault):
    assert {change.what for change in changes(found, fault) if change.fails} == FAILS[fault]


@pytest.mark.parametrize("fault", DRIFT)
def test_drift_only_warns(found, fault):
    drifted = changes(found, fault)
    assert DRIFT[fault] in {change.what for change in drifted}
    assert not any(change.fails for change in drifted)


def test_what_does_not_compile_fails(found):
    (change,) = changes(found, "hopper, wrong")
    assert change.fails
    assert "does not compile: CompilationError" in change.what
    assert "must have equal ranks" in change.what


def test_every_fault_is_tested(found):
    assert found[1].keys() == {*FAILS, *DRIFT, "hopper, wrong"}


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


def test_every_kernel_is_pinned_for_every_architecture():
    pins = json.loads((ROOT / "golden/codegen/kernels.json").read_text("utf-8"))["triton"][
        "kernels"
    ]
    found = {}
    for name in pins:
        architecture, call, *_, kernel = name.split()
        if "hopper" not in call:
            found.setdefault(architecture, set()).add((call.startswith("v1"), kernel))
    assert len(found) == 5
    assert len({frozenset(kernels) for kernels in found.values()}) == 1


@pytest.mark.parametrize("kernel", ["forward", "keys_and_values", "queries"])
def test_the_kernels_for_hopper_are_pinned_as_such(kernel):
    pins = json.loads((ROOT / "golden/codegen/kernels.json").read_text("utf-8"))["triton"][
        "kernels"
    ]
    found = [pin for name, pin in pins.items() if "hopper" in name and name.endswith(f": {kernel}")]
    assert found
    for pin in found:
        assert pin["warp_specialized"] >= 1
        assert {"HGMMA", "UTMALDG"} <= pin["instructions"].keys()


def test_an_unknown_call_is_named():
    with pytest.raises(ValueError, match=r"call 'forward bf16 7 dense' for sm_90: accepted are"):
        source.kernels("sm_90 forward bf16 7 dense")
