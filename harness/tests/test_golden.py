"""golden/vectors is what this code computes, and every way to tamper with it is found."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from attn_reference.inputs import Gradients
from attn_reference.problem import CAUSAL_ALIGNMENTS, DTYPES, Problem
from attnproof.cli.main import app
from attnproof.golden import vectors as golden
from attnproof.golden.problems import VECTORS, answers, rounding_bounds, vector_inputs

CHECKED_IN = Path(__file__).parents[2] / "golden" / "vectors"
SOME = ("dense-bf16", "everything")


@pytest.fixture
def some(tmp_path, monkeypatch):
    """A directory with two vectors, which are all that there are."""
    monkeypatch.setattr(golden, "VECTORS", {name: VECTORS[name] for name in SOME})
    golden.update(tmp_path)
    assert golden.verify(tmp_path) == []
    return tmp_path


def times(directory):
    """When each file was written."""
    return {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}


def rewrite(directory, name, change):
    """Apply a change to the stored tensors, and make file and manifest agree about it."""
    path = directory / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["vectors"][name]["sha256"] = golden.file_digest(path)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_checked_in_vectors_are_what_is_computed_here():
    assert golden.verify(CHECKED_IN) == []


def test_checked_in_vectors_stay_small():
    assert sum(path.stat().st_size for path in CHECKED_IN.iterdir()) < 5_000_000


def test_every_feature_dtype_and_gradient_has_a_vector():
    features = {feature for problem in VECTORS.values() for feature in problem.features}
    everything = Problem(
        heads_q=2,
        heads_kv=1,
        head_dim_v=3,
        window=(1, 1),
        softcap=1.0,
        alibi=True,
        mask="random",
        bias="normal",
        sinks=True,
        scale=1.0,
        dropout=0.5,
        gradients=("q",),
        lse_gradient=True,
    )
    separate = {"causal top-left", "causal bottom-right", "key lengths", "packed", "paged"}
    assert features == separate | set(everything.features)
    assert {problem.dtype for problem in VECTORS.values()} == set(DTYPES)
    assert {problem.causal for problem in VECTORS.values()} == set(CAUSAL_ALIGNMENTS)
    asked = {name for problem in VECTORS.values() for name in problem.gradients}
    assert asked == {field.name for field in fields(Gradients)}


@pytest.mark.parametrize("name", VECTORS)
def test_bounds_leave_room_for_rounding_only(name):
    problem = VECTORS[name]
    inputs = vector_inputs(problem)
    found, bounds = answers(inputs, problem), rounding_bounds(inputs, problem)
    assert found.keys() == bounds.keys()
    for answer, bound in ((found[n], bounds[n]) for n in found):
        assert bound.shape == answer.shape
        finite = answer.isfinite()
        scale = max((1e-3, *answer[finite].abs().tolist()))
        assert (bound[finite] <= 1e-6 * scale).all()


def test_other_order_of_sums_is_rounding(some):
    """Keys in reverse order give the same answers up to rounding, and verify accepts those."""
    problem = VECTORS["dense-bf16"]
    inputs = vector_inputs(problem)
    inputs.k, inputs.v = inputs.k.flip(2), inputs.v.flip(2)
    reordered = answers(inputs, problem)
    reordered["dk"], reordered["dv"] = reordered["dk"].flip(2), reordered["dv"].flip(2)
    rewrite(some, "dense-bf16", lambda tensors: tensors.update(reordered))
    stored = load_file(some / "dense-bf16.safetensors")
    assert not torch.equal(stored["out"], answers(vector_inputs(problem), problem)["out"])
    assert golden.verify(some) == []


@pytest.mark.parametrize("answer", ["out", "lse", "dq", "dk", "dv", "dbias", "dsinks"])
def test_changed_answer_is_found(some, answer):
    def change(tensors):
        largest = tensors[answer].where(tensors[answer].isfinite(), 0).abs().flatten().argmax()
        tensors[answer].view(-1)[largest] *= 1 + 1e-9

    rewrite(some, "everything", change)
    (difference,) = golden.verify(some)
    assert difference.startswith(f"everything: {answer} differs in 1 of ")


def test_changed_infinity_is_found(some):
    def change(tensors):
        tensors["lse"].view(-1)[0] = float("nan")

    rewrite(some, "everything", change)
    (difference,) = golden.verify(some)
    assert difference.startswith("everything: lse differs in 1 of ")


def test_changed_input_is_found(some):
    def change(tensors):
        tensors["k"].view(torch.uint8).view(-1)[0] ^= 1

    rewrite(some, "dense-bf16", change)
    assert golden.verify(some) == ["dense-bf16: k is not the input made here"]


def test_missing_unknown_and_misshapen_tensors_are_found(some):
    def change(tensors):
        tensors["surplus"] = tensors.pop("dq")
        tensors["dk"] = tensors["dk"].float()

    rewrite(some, "dense-bf16", change)
    assert golden.verify(some) == [
        "dense-bf16: dq is missing",
        "dense-bf16: surplus is unknown",
        "dense-bf16: dk is (torch.float32, (2, 2, 13, 8)), not (torch.float64, (2, 2, 13, 8))",
    ]


@pytest.mark.parametrize("position", [0, 9, 40, 2000, -1])
def test_any_corrupted_byte_is_found(some, position):
    path = some / "dense-bf16.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    differences = golden.verify(some)
    assert "the SHA-256 of dense-bf16.safetensors is not that of the manifest" in differences[0]


def test_truncated_and_missing_files_are_found(some):
    path = some / "dense-bf16.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    (some / "everything.safetensors").unlink()
    differences = golden.verify(some)
    assert any(
        d.startswith("dense-bf16: dense-bf16.safetensors cannot be read") for d in differences
    )
    assert "everything: everything.safetensors is missing" in differences


def test_unknown_file_is_found_and_left_alone(some):
    (some / "stranger.bin").write_bytes(b"1")
    assert golden.verify(some) == ["stranger.bin: unknown file"]
    before = times(some)
    update = golden.update(some)
    assert update.changed == []
    assert update.notes == ["stranger.bin: unknown file, left alone"]
    assert times(some) == before
    assert (some / "stranger.bin").exists()


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", "{}", '{"vectors": {"everything": 1}}', '{"vectors": {"../escape": {}}}'],
)
def test_bad_manifest_is_found_and_made_again(some, content):
    path = some / "manifest.json"
    original = path.read_text()
    path.unlink() if content is None else path.write_text(content)
    assert golden.verify(some)[0].startswith("manifest.json: ")
    update = golden.update(some)
    assert update.changed[-1].startswith("manifest.json: written (")
    assert path.read_text() == original


@pytest.mark.parametrize("key", ["problem", "sha256", "inputs_sha256"])
def test_wrong_entry_is_found(some, key):
    path = some / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["vectors"]["everything"][key] = "other"
    path.write_text(json.dumps(manifest))
    (difference,) = golden.verify(some)
    assert difference.startswith("everything: ")


def test_vector_of_another_problem_is_found(some):
    (some / "dense-bf16.safetensors").write_bytes((some / "everything.safetensors").read_bytes())
    differences = golden.verify(some)
    assert any("holds b2_h4x2" in difference for difference in differences)


def test_update_rewrites_only_what_changed(some):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in some.iterdir()}
    rewrite(some, "everything", lambda tensors: tensors["out"].mul_(2))
    vector, manifest = golden.update(some).changed
    assert vector.startswith("everything: written (out differs in ")
    assert manifest == "manifest.json: written"
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in some.iterdir()}
    assert after["dense-bf16.safetensors"] == before["dense-bf16.safetensors"]
    assert {n: c for n, (c, _) in after.items()} == {n: c for n, (c, _) in before.items()}
    assert golden.update(some).changed == []


def test_update_removes_what_is_no_longer_a_vector(some, monkeypatch):
    monkeypatch.setattr(golden, "VECTORS", {"everything": VECTORS["everything"]})
    assert golden.verify(some) == ["dense-bf16: in the manifest, but not a vector of this version"]
    assert golden.update(some).changed == [
        "dense-bf16: removed, no longer a vector",
        "manifest.json: written",
    ]
    assert golden.verify(some) == []
    assert not (some / "dense-bf16.safetensors").exists()


def test_a_vector_that_is_gone_already_is_not_counted_as_removed(some, monkeypatch):
    monkeypatch.setattr(golden, "VECTORS", {"everything": VECTORS["everything"]})
    (some / "dense-bf16.safetensors").unlink()
    assert golden.update(some).changed == [
        "manifest.json: written (dense-bf16 is no longer a vector)"
    ]


def test_the_command_counts_the_files_that_it_changed(some):
    (some / "stranger.bin").write_bytes(b"1")
    (some / "dense-bf16.safetensors").unlink()
    before = times(some)
    result = CliRunner().invoke(app, ["golden", "update", str(some)])
    after = times(some)
    assert after.keys() - before.keys() == {"dense-bf16.safetensors"}
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert result.stdout.splitlines() == [
        "dense-bf16: written (dense-bf16.safetensors is missing)",
        "manifest.json: written",
        "stranger.bin: unknown file, left alone",
        f"2 files changed in {some}",
    ]
    result = CliRunner().invoke(app, ["golden", "update", str(some)])
    assert result.stdout.splitlines()[-1] == f"0 files changed in {some}"
    assert times(some) == after


def test_missing_directory_is_a_difference(tmp_path):
    assert golden.verify(tmp_path / "nowhere") == [f"{tmp_path / 'nowhere'}: no such directory"]
