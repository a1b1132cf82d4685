"""One saved computation: a safetensors file with inputs, outputs, and what was computed.

Tensors go by the names of ``Inputs`` (q, k, v, mask, bias, …, keep_mask, grad_out, grad_lse), of
``Attention`` (out, lse) and dq, dk, dv, dbias, dsinks. The metadata holds the problem's id under
"problem" and, if it is not that of a flash kernel, a precision under "precision": the name of a
profile, or its fields as JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attn_reference.inputs import Attention, Gradients, Inputs
from attn_reference.precision import FLASH, PROFILES, Precision
from attn_reference.problem import DTYPES, GRADIENT_NAMES, Problem
from attn_reference.validation import validate

from .backend import Capabilities
from .judge.form import canonical_lse
from .plan import CallResult
from .writing import replacing

INPUTS = tuple(f.name for f in fields(Inputs))
GRADIENTS = tuple(f"d{name}" for name in GRADIENT_NAMES)
KNOWN = (*INPUTS, "out", "lse", *GRADIENTS)
# What a mask or bias that came in a file is called: its pattern has no name.
FROM_FILE = "from-file"


class ComputationError(Exception):
    """A file is not a computation that can be judged; the message is one line that says why."""


@dataclass(frozen=True, kw_only=True)
class Computation:
    """Problem, inputs and results of one file."""

    problem: Problem
    inputs: Inputs
    result: CallResult
    precision: Precision
    assumed: tuple[str, ...] = ()  # sentences about what the file does not say


def save_computation(
    path: Path,
    problem: Problem,
    inputs: Inputs,
    result: CallResult,
    precision: Precision | None = None,
    capabilities: Capabilities | None = None,
) -> None:
    """Write a computation in the form that ``load_computation`` and ``explain`` read.

    ``capabilities`` says how the LSE of the result is to be read; it is written as the natural
    LSE, (B, H, S). OSError when the file cannot be written.
    """
    tensors = inputs.tensors()
    if result.attention is not None:
        tensors["out"] = result.attention.out
        if result.attention.lse is not None:
            lse = result.attention.lse
            tensors["lse"] = lse if capabilities is None else canonical_lse(lse, capabilities)
        if result.attention.keep_mask is not None:
            tensors["keep_mask"] = result.attention.keep_mask
    if result.gradients is not None:
        found = result.gradients.tensors()
        tensors |= {f"d{name}": gradient for name, gradient in found.items()}
    metadata = {"problem": problem.id}
    if precision is not None:
        metadata["precision"] = json.dumps(precision.as_dict())
    # Each tensor in memory of its own: safetensors refuses shared memory.
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        with replacing(path) as part:
            save_file(plain, part, metadata=metadata)
    except SafetensorError as error:
        raise OSError(None, str(error)) from None


def load_computation(
    path: Path, problem: Problem | None = None, precision: Precision | None = None
) -> Computation:
    """Read a computation; ComputationError says what is wrong with the file.

    ``problem`` and ``precision`` are used where the metadata has none; without a problem, one is
    made of the tensors that are there.
    """
    tensors, metadata = _read(path)
    for name in ("q", "k", "v", "out"):
        if name not in tensors:
            raise ComputationError(f"{path}: holds no tensor {name!r}; needed are q, k, v and out")
    assumed: list[str] = []
    if unknown := sorted(set(tensors) - set(KNOWN)):
        assumed.append(f"not looked at: {', '.join(unknown)}")
    try:
        problem = _problem(tensors, metadata, problem, assumed)
        precision = _precision(metadata, precision)
        inputs = Inputs(**{n: t for n, t in tensors.items() if n in INPUTS})
        _validate(inputs, problem)
    except (ValueError, TypeError) as error:
        raise ComputationError(f"{path}: {error}") from None
    gradients = {n[1:]: t for n, t in tensors.items() if n in GRADIENTS}
    result = CallResult(
        attention=Attention(out=tensors["out"], lse=tensors.get("lse")),
        gradients=Gradients(**gradients) if gradients else None,
    )
    return Computation(
        problem=problem, inputs=inputs, result=result, precision=precision, assumed=tuple(assumed)
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise ComputationError(f"{path}: {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ComputationError(
            f"{path}: cannot be read as safetensors ({error}); .pt and .npz are not accepted"
        ) from None


def _problem(
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    given: Problem | None,
    assumed: list[str],
) -> Problem:
    """The problem of the metadata, or the one given, or what the tensors show."""
    if "problem" in metadata:
        problem = Problem.from_id(metadata["problem"])
    elif given is not None:
        problem = given
    else:
        problem = _shown(tensors)
        assumed.append(
            f"the metadata has no problem; taken to be {problem.id}, as the tensors show, with "
            "the default scale and without causality, window, softcap and dropout"
        )
    returned = tuple(name for name in GRADIENT_NAMES if f"d{name}" in tensors)
    if missing := [name for name in problem.gradients if name not in returned]:
        assumed.append(f"not in the file: {', '.join(f'd{name}' for name in missing)}")
    with_lse = problem.lse_gradient or ("grad_lse" in tensors and bool(returned))
    return problem.replace(gradients=returned, lse_gradient=with_lse)


def _shown(tensors: dict[str, Tensor]) -> Problem:
    """The problem that the shapes and dtypes of the tensors show."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; accepted is "
                "(batch, heads, seqlen, head_dim)"
            )
    names = {dtype: name for name, dtype in DTYPES.items()}
    if q.dtype not in names:
        raise ValueError(f"q has dtype {q.dtype}; accepted are {', '.join(DTYPES)}")
    values: dict[str, Any] = {
        "batch": q.shape[0],
        "heads_q": q.shape[1],
        "heads_kv": k.shape[1],
        "seqlen_q": q.shape[2],
        "seqlen_k": k.shape[2],
        "head_dim": q.shape[3],
        "head_dim_v": v.shape[3],
        "dtype": names[q.dtype],
        "alibi": "alibi_slopes" in tensors,
        "sinks": "sinks" in tensors,
    }
    for name in ("mask", "bias"):
        if name in tensors:
            shape = "".join(
                "1" if size == 1 else letter
                for size, letter in zip(tensors[name].shape, "bhqk", strict=False)
            )
            values |= {name: FROM_FILE, f"{name}_shape": shape}
    if "key_lengths" in tensors:
        values["key_lengths"] = tuple(tensors["key_lengths"].tolist())
    if "cu_seqlens_q" in tensors and "cu_seqlens_k" in tensors:
        bounds = [tensors[f"cu_seqlens_{side}"].diff().tolist() for side in "qk"]
        values["packed"] = tuple(zip(*bounds, strict=True))
    if "page_table" in tensors:
        values |= {"page_size": k.shape[2], "batch": q.shape[0]}
        values["seqlen_k"] = max(values.get("key_lengths", (0,)))
    return Problem(**values)


def _precision(metadata: dict[str, str], given: Precision | None) -> Precision:
    text = metadata.get("precision")
    if text is None:
        return FLASH if given is None else given
    if text in PROFILES:
        return PROFILES[text]
    try:
        return Precision.from_dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"precision {text!r} in the metadata is neither {', '.join(PROFILES)} nor the fields "
            f"of a Precision as JSON ({error})"
        ) from None


def _validate(inputs: Inputs, problem: Problem) -> None:
    """As the reference does, except that what dropout kept may be unknown."""
    if problem.dropout and inputs.keep_mask is None:
        validate(inputs, problem.replace(dropout=0.0), backward=bool(problem.gradients))
    else:
        validate(inputs, problem, backward=bool(problem.gradients))
