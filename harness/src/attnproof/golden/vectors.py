"""golden/vectors: small problems with their inputs, and answers and gradients in fp64.

A vector is a safetensors file NAME.safetensors: the tensors of ``Inputs`` under their names,
out, lse, dq, dk, dv, dbias and dsinks in fp64, and the id of the problem in its metadata
under "problem", so that ``attnproof explain`` and other languages can read it. The manifest
holds the ids, SHA-256 sums and the versions that wrote each vector.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from attn_reference.inputs import Inputs
from attn_reference.problem import Problem

from ..writing import replace_file
from .comparison import Update
from .problems import VECTORS, answers, rounding_bounds, vector_inputs

DIRECTORY = Path("golden/vectors")
MANIFEST = "manifest.json"
SUFFIX = ".safetensors"
NAME = re.compile(r"[a-z0-9-]+")  # no way out of the directory


def verify(directory: Path = DIRECTORY) -> list[str]:
    """Recompute every vector and compare: what differs, a sentence each; empty when nothing does.

    Files and inputs must be the same to the bit; answers may differ by what fp64 rounding
    explains, since the order of its sums is the machine's. Missing and unknown files differ.
    """
    if not directory.is_dir():
        return [f"{directory}: no such directory"]
    manifest, differences = _read_manifest(directory)
    for name in sorted(manifest.keys() - VECTORS.keys()):
        differences.append(f"{name}: in the manifest, but not a vector of this version")
    known = {MANIFEST, *(name + SUFFIX for name in manifest.keys() | VECTORS.keys())}
    for path in sorted(directory.iterdir()):
        if path.name not in known:
            differences.append(f"{path.name}: unknown file")
    for name, problem in VECTORS.items():
        found = _compare(directory / (name + SUFFIX), manifest.get(name), problem)
        differences += [f"{name}: {difference}" for difference in found]
    return differences


def update(directory: Path = DIRECTORY) -> Update:
    """Rewrite the vectors that ``verify`` would find different, and the manifest.

    Vectors that agree keep their bytes. A file that no manifest knew is reported, not removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    manifest, wrong = _read_manifest(directory)
    why_manifest = [sentence.removeprefix(f"{MANIFEST}: ") for sentence in wrong]
    changed = []
    for name in sorted(manifest.keys() - VECTORS.keys()):
        del manifest[name]
        try:
            (directory / (name + SUFFIX)).unlink()
            changed.append(f"{name}: removed, no longer a vector")
        except FileNotFoundError:
            why_manifest.append(f"{name} is no longer a vector")
    for name, problem in VECTORS.items():
        path = directory / (name + SUFFIX)
        if why := _compare(path, manifest.get(name), problem):
            manifest[name] = _write(path, problem)
            changed.append(f"{name}: written ({'; '.join(why)})")
    if changed or why_manifest:
        entries = {name: manifest[name] for name in sorted(manifest)}
        text = json.dumps({"vectors": entries}, indent=1) + "\n"
        replace_file(directory / MANIFEST, text.encode())
        because = f" ({'; '.join(why_manifest)})" if why_manifest else ""
        changed.append(f"{MANIFEST}: written{because}")
    known = {MANIFEST, *(name + SUFFIX for name in VECTORS)}
    strangers = [path.name for path in sorted(directory.iterdir()) if path.name not in known]
    notes = [f"{stranger}: unknown file, left alone" for stranger in strangers]
    return Update(changed=changed, notes=notes)


def files() -> list[str]:
    """The names of the files that ``update`` may write."""
    return [MANIFEST, *(name + SUFFIX for name in VECTORS)]


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read_manifest(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """The entries by name, and what is wrong with the file."""
    path = directory / MANIFEST
    try:
        entries = json.loads(path.read_text("utf-8"))["vectors"]
        for name, entry in entries.items():
            if not NAME.fullmatch(name) or not isinstance(entry, dict):
                raise ValueError(f"the entry {name!r} is not one of a vector")
    except FileNotFoundError:
        return {}, [f"{MANIFEST}: missing"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{MANIFEST}: not readable as a manifest ({error})"]
    return entries, []


def _compare(path: Path, entry: dict[str, Any] | None, problem: Problem) -> list[str]:
    """How a vector's file and its entry in the manifest differ from what they should be."""
    if entry is None:
        return ["not in the manifest"]
    if not path.is_file():
        return [f"{path.name} is missing"]
    inputs = vector_inputs(problem)
    differences = []
    if entry.get("problem") != problem.id:
        differences.append(f"the manifest says {entry.get('problem')}, the problem is {problem.id}")
    if entry.get("inputs_sha256") != digest(inputs.tensors()):
        differences.append("the inputs made here are not those of the manifest")
    if entry.get("sha256") != file_digest(path):
        differences.append(f"the SHA-256 of {path.name} is not that of the manifest")
    try:
        with safe_open(path, framework="pt") as file:
            stored_id = (file.metadata() or {}).get("problem")
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        return [*differences, f"{path.name} cannot be read ({error})"]
    if stored_id != problem.id:
        differences.append(f"{path.name} holds {stored_id}, the problem is {problem.id}")
    return differences + _compare_tensors(stored, inputs, problem)


def _compare_tensors(stored: dict[str, Tensor], inputs: Inputs, problem: Problem) -> list[str]:
    """How stored tensors differ from inputs made and answers computed here."""
    expected_inputs, expected = inputs.tensors(), answers(inputs, problem)
    wanted = expected_inputs | expected
    differences = [f"{name} is missing" for name in sorted(wanted.keys() - stored.keys())]
    differences += [f"{name} is unknown" for name in sorted(stored.keys() - wanted.keys())]
    bounds = rounding_bounds(inputs, problem)
    for name in sorted(wanted.keys() & stored.keys()):
        here, there = wanted[name], stored[name]
        if (here.dtype, here.shape) != (there.dtype, there.shape):
            found, meant = ((t.dtype, tuple(t.shape)) for t in (there, here))
            differences.append(f"{name} is {found}, not {meant}")
        elif name in expected_inputs:
            if _bytes(here) != _bytes(there):
                differences.append(f"{name} is not the input made here")
        elif difference := _beyond(here, there, bounds[name]):
            differences.append(f"{name} {difference}")
    return differences


def _beyond(here: Tensor, there: Tensor, bound: Tensor) -> str:
    """In how many elements, where and by how much two answers differ by more than the bound."""
    same = (here == there) | (here.isnan() & there.isnan())
    off = (~same & ~((here - there).abs() <= bound)).nonzero()
    if not len(off):
        return ""
    where = tuple(off[0].tolist())
    return (
        f"differs in {len(off)} of {here.numel()} elements, first at {where}: "
        f"stored {there[where]:.17g}, recomputed {here[where]:.17g}, "
        f"rounding explains {bound[where]:.1g}"
    )


def _write(path: Path, problem: Problem) -> dict[str, Any]:
    """Write the vector of a problem; gives its entry in the manifest."""
    inputs = vector_inputs(problem)
    tensors = inputs.tensors() | answers(inputs, problem)
    # One key of metadata: the order of several would not be the same every time.
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    replace_file(path, save(contiguous, metadata={"problem": problem.id}))
    return {
        "problem": problem.id,
        "sha256": file_digest(path),
        "inputs_sha256": digest(inputs.tensors()),
        "attnproof": version("attnproof"),
        "torch": torch.__version__,
    }
