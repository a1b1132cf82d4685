"""Do the ranks of a ring agree on what they compute?

Every rank learns what the others were called with, so that all of them raise where one would,
and none waits for a rank that has given up.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attn_reference.inputs import Inputs, key_count
from attn_reference.problem import DTYPES, Problem

from .placement import PLACEMENTS, Placement, size

FACTS = ("batch", "heads of q", "heads of k", "head_dim", "head_dim of v", "dtype")


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks have in common, and which of them this is."""

    problem: Problem  # the whole
    placement: Placement
    group: dist.ProcessGroup
    rank: int
    ranks: int
    keys: tuple[int, ...]  # that each rank holds


def agree(
    inputs: Inputs,
    group: dist.ProcessGroup | None,
    placement: str | Placement,
    options: dict[str, Any],
    blocks: tuple[int, int],
) -> Agreed:
    """What is computed; ValueError, on every rank, when the ranks do not fit together.

    ``options`` are fields of ``Problem``; sizes follow from the shards.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("there is no process group: call torch.distributed.init_process_group")
    group = dist.group.WORLD if group is None else group
    if group is None or (rank := dist.get_rank(group)) < 0:
        raise ValueError("this process is not in the group that it was called with")
    complaint = _tensor_complaint(inputs) or _option_complaint(placement, blocks)
    facts = [] if complaint else _facts(inputs, placement, options, blocks)
    device = _device_of(inputs)
    everyone = _gather(complaint, facts, len(FACTS) + 3, group, device)
    for fact, *values in zip((*FACTS, "options"), *(f[2:] for f in everyone), strict=True):
        if len(set(values)) > 1:
            given = "" if fact == "options" else f", {', '.join(map(str, values))}"
            raise ValueError(
                f"the ranks were called with different {fact}{given}: accepted is the same on "
                "every rank; options are all arguments but the values of tensors"
            )
    rows, keys = (tuple(facts[n] for facts in everyone) for n in (0, 1))
    problem = _problem(inputs, sum(rows), sum(keys), options)
    place = PLACEMENTS[placement] if isinstance(placement, str) else placement
    _check_shares(problem, place, rows, keys)
    if problem.dropout or inputs.tensors().keys() - {"q", "k", "v"}:
        _gather(_beside_complaint(inputs, problem), [], 0, group, device)
    return Agreed(
        problem=problem, placement=place, group=group, rank=rank, ranks=len(everyone), keys=keys
    )


def _facts(
    inputs: Inputs, placement: str | Placement, options: dict[str, Any], blocks: tuple[int, int]
) -> list[int]:
    """Queries and keys that this rank holds; then FACTS and a checksum of everything else."""
    q, k, v, tensors = inputs.q, inputs.k, inputs.v, inputs.tensors()
    named = placement if isinstance(placement, str) else placement.__qualname__
    wanted = [name for name, t in tensors.items() if torch.is_grad_enabled() and t.requires_grad]
    words = repr((sorted(options.items()), sorted(tensors), named, blocks, wanted))
    dtype = list(DTYPES.values()).index(q.dtype)
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    return [q.shape[2], k.shape[2], *sizes, dtype, zlib.crc32(words.encode())]


def _device_of(inputs: Inputs) -> torch.device:
    """Where the ranks talk: a CUDA device if any tensor is on one."""
    given = [t.device for t in inputs.tensors().values() if isinstance(t, Tensor)]
    return next((d for d in given if d.type == "cuda"), torch.device("cpu"))


def _gather(
    complaint: str | None,
    facts: Sequence[int],
    count: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[int]]:
    """``count`` facts of every rank; ValueError, on all of them, if one has a complaint."""
    said = [complaint is not None, *(facts or [0] * count)]
    own = torch.tensor(said, dtype=torch.int64, device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    everyone = [one.tolist() for one in found]
    if complaint is not None:
        raise ValueError(complaint)
    if wrong := [str(rank) for rank, (complains, *_) in enumerate(everyone) if complains]:
        raise ValueError(f"what rank {', '.join(wrong)} was called with was refused there")
    return [theirs for _, *theirs in everyone]


def _tensor_complaint(inputs: Inputs) -> str | None:
    """What is wrong with the tensors of this rank whatever the others hold."""
    q, k, v = (getattr(inputs, name) for name in "qkv")
    for name, tensor in inputs.tensors().items():
        if not isinstance(tensor, Tensor):
            return f"{name} is a {type(tensor).__name__}: expected is a torch.Tensor"
        if tensor.device != q.device:
            return f"{name} is on {tensor.device}: expected is {q.device}, where q is"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            return f"{name} has shape {tuple(tensor.shape)}: expected are 4 dimensions"
        if tensor.dtype != q.dtype or tensor.dtype not in DTYPES.values():
            return f"{name} has dtype {tensor.dtype}: expected is that of q, of {', '.join(DTYPES)}"
    if k.shape[:3] != v.shape[:3]:
        return f"v has shape {tuple(v.shape)}: expected is {(*k.shape[:3], v.shape[3])}, as k has"
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        return (
            f"k has shape {tuple(k.shape)}: expected are batch and head_dim of q {tuple(q.shape)}"
        )
    return None


def _option_complaint(placement: str | Placement, blocks: tuple[int, int]) -> str | None:
    """What is wrong with the arguments that ``Problem`` does not know."""
    if not callable(placement) and placement not in PLACEMENTS:
        return f"placement={placement!r}: accepted are {', '.join(PLACEMENTS)}, or a function"
    for name, block in zip(("block_q", "block_k"), blocks, strict=True):
        if not isinstance(block, int) or block < 1:
            return f"{name}={block!r}: accepted is 1 or more"
    return None


def _problem(inputs: Inputs, rows: int, keys: int, options: dict[str, Any]) -> Problem:
    """The whole that the ranks have a share of; ValueError when it makes no sense."""
    packed = options["packed"]
    if packed is not None and inputs.q.shape[0] != 1:
        raise ValueError(f"packed with a batch of {inputs.q.shape[0]}: accepted is 1")
    sizes = {"batch": inputs.q.shape[0], "seqlen_q": rows, "seqlen_k": keys}
    return Problem(
        **(options if packed is not None else options | sizes),
        heads_q=inputs.q.shape[1],
        heads_kv=inputs.k.shape[1],
        head_dim=inputs.q.shape[3],
        head_dim_v=inputs.v.shape[3],
        dtype=next(name for name, dtype in DTYPES.items() if dtype == inputs.q.dtype),
        alibi=inputs.alibi_slopes is not None,
        mask=None if inputs.mask is None else "given",
        bias=None if inputs.bias is None else "given",
        sinks=inputs.sinks is not None,
    )


def _check_shares(
    problem: Problem, placement: Placement, rows: tuple[int, ...], keys: tuple[int, ...]
) -> None:
    """ValueError unless every rank holds as much as the placement gives it."""
    if problem.packed is not None:
        lengths = [[pair[side] for pair in problem.packed] for side in (0, 1)]
    else:
        lengths = [[problem.seqlen_q], [problem.keys]]
    ranks = len(rows)
    for what, found, of in (("queries", rows, lengths[0]), ("keys", keys, lengths[1])):
        each = [placement(length, ranks) for length in of]
        expected = tuple(sum(size(shares[rank]) for shares in each) for rank in range(ranks))
        if found != expected:
            raise ValueError(
                f"the ranks hold {', '.join(map(str, found))} {what}: expected are "
                f"{', '.join(map(str, expected))}, as {placement.__qualname__} places "
                f"{' and '.join(map(str, of))}"
            )


def _beside_complaint(inputs: Inputs, problem: Problem) -> str | None:
    """What is wrong with the other tensors of this rank."""
    batch, heads, rows = inputs.q.shape[:3]
    block = (batch, heads, rows, key_count(problem))
    own, floats = inputs.q.dtype, (torch.float32, torch.float64)
    of_heads = {"alibi_slopes": floats, "sinks": floats}
    of_block = {"mask": (torch.bool,), "bias": (own, torch.float32), "keep_mask": (torch.bool,)}
    if problem.dropout and inputs.keep_mask is None:
        return f"keep_mask is missing: dropout={problem.dropout}"
    for name, dtypes in (of_heads | of_block).items():
        tensor = getattr(inputs, name)
        if tensor is None:
            continue
        shape = (heads,) if name in of_heads else block
        fits = tensor.dim() == len(shape) and all(
            found == want or (found == 1 and name in ("mask", "bias"))
            for found, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            ones = ", or 1 in place of any of them" if name in ("mask", "bias") else ""
            return f"{name} has shape {tuple(tensor.shape)}: expected is {shape}{ones}"
        if tensor.dtype not in dtypes:
            accepted = " or ".join(dict.fromkeys(map(str, dtypes)))
            return f"{name} has dtype {tensor.dtype}: expected is {accepted}"
    return None
