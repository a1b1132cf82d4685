"""Ring attention in processes of its own, so that one process can call the distributed code.

``attention`` cuts a problem into shards, has R processes compute them with ``ring_attention``
over gloo, and puts their answers together. The processes are started on the first call and kept.

They are forked from a fresh program (``main``), which has torch loaded and no threads: the
process that calls may have threads, a GPU, and locks held.
They end when it does: the program sees the end of the connection to it and ends, and the kernel
ends them with the program. The calling process starts no threads.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from attn_reference.inputs import Attention, Inputs, key_count, output_shape
from attn_reference.problem import GRADIENT_NAMES, Problem
from attn_reference.sequences import gather_pages
from attn_reference.validation import validate

from .placement import positions
from .ring_distributed import ring_attention

START_SECONDS = 120.0  # for Python and torch to load on a busy machine
JOB_SECONDS = 300.0
GRACE_SECONDS = 0.5  # after the first rank has failed, for others to say why
LOOK_SECONDS = 1.0
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
LOADED_BY_AUTOGRAD = "torch.fx.experimental.symbolic_shapes"  # in the first backward pass
COMPUTE = "online_softmax.ring_processes:compute"
Job = dict[str, Any]


class RankError(RuntimeError):
    """A rank raised, ended, or did not answer."""


class Team:
    """R processes that are the ranks of one gloo group. ``run`` gives each a job."""

    def __init__(self, ranks: int, entry: str = COMPUTE) -> None:
        """``entry``: "module:function", what a rank calls with the fields of its job."""
        self.ranks, self.started_by = ranks, os.getpid()
        pairs = [multiprocessing.Pipe() for _ in range(ranks + 1)]
        self._control, *self._connections = (ours for ours, _ in pairs)
        theirs = [connection for _, connection in pairs]
        numbers = [connection.fileno() for connection in theirs]
        program = f"from {__name__} import main; main()"
        command = [sys.executable, "-P", "-c", program, entry, *map(str, numbers)]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=numbers)
        finally:
            for connection in theirs:
                connection.close()
        try:
            self.pids: list[int] = self._receive(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job], seconds: float = JOB_SECONDS) -> list[Any]:
        """What each rank gives for its job.

        Raises RankError, with the text of the rank, when one raises, ends, or does not answer
        within ``seconds``; the processes are gone then.
        """
        try:
            for connection, job in zip(self._connections, jobs, strict=True):
                with suppress(BrokenPipeError, ConnectionResetError):  # it has ended: seen below
                    connection.send(_packed(job))
            return self._receive(seconds)
        except BaseException:
            self.close()  # after an interrupt too: an answer would be taken for the next
            raise

    def _receive(self, seconds: float) -> list[Any]:
        """One answer of every rank; RankError for less."""
        found: dict[int, Any] = {}
        failed: dict[int, tuple[bool, str]] = {}  # whether it said why, and what
        deadline = time.monotonic() + seconds
        while len(found) + len(failed) < self.ranks:
            left = deadline - time.monotonic()
            awaited = {
                connection: rank
                for rank, connection in enumerate(self._connections)
                if rank not in found and rank not in failed
            }
            ready = wait(list(awaited), max(left, 0.0))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = awaited[connection]
                try:
                    answered, value = connection.recv()
                except (EOFError, OSError):
                    failed[rank] = False, f"rank {rank} ended before it answered"
                else:
                    if answered:
                        found[rank] = _unpacked(value)
                    else:
                        failed[rank] = True, f"rank {rank} raised {value}"
            if failed:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(found) == self.ranks:
            return [found[rank] for rank in range(self.ranks)]
        if failed:  # first those that ended: the others lament that they are gone
            raise RankError("\n".join(text for _, text in sorted(failed.values())))
        silent = ", ".join(str(rank) for rank in range(self.ranks) if rank not in found)
        raise RankError(f"no answer of rank {silent} within {seconds:g} s")

    @property
    def alive(self) -> bool:
        """Whether this process can give it another job."""
        return not self._control.closed and self.started_by == os.getpid()

    def close(self) -> None:
        """End the processes."""
        if self._control.closed:
            return
        for connection in (self._control, *self._connections):
            connection.close()
        if self.started_by == os.getpid():  # a copy of that process has the connections only
            try:
                self._process.wait(START_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


_teams: dict[int, Team] = {}


def team(ranks: int) -> Team:
    """The team of this process; started on first use, and anew when it is gone."""
    if ranks not in _teams or not _teams[ranks].alive:
        if ranks in _teams:
            _teams[ranks].close()
        _teams[ranks] = Team(ranks)
    return _teams[ranks]


@atexit.register
def _close() -> None:
    for one in _teams.values():
        one.close()


def unavailable() -> str | None:
    """Why there can be no team here, a sentence; None when there can."""
    if not dist.is_available():
        return "this torch is built without torch.distributed"
    if not dist.is_gloo_available():
        return "this torch is built without gloo"
    if not hasattr(os, "fork"):
        return f"{sys.platform} has no fork, which the ranks are started with"
    return None


# In the process that calls: cut, send, put together.


def attention(inputs: Inputs, problem: Problem, ranks: int) -> Attention:
    """out and lse of a whole problem, computed by ``ranks`` processes in zig-zag; differentiable.

    Raises ValueError when the inputs do not fit the problem, RankError when a rank fails.
    """
    validate(inputs, problem)
    if problem.page_size is not None:
        inputs, problem = _without_pages(inputs, problem)
    tensors = [getattr(inputs, name) for name in GRADIENT_NAMES]
    out, lse = _Attention.apply(*tensors, inputs, problem, ranks)  # type: ignore[no-untyped-call]
    return Attention(out=out, lse=lse, keep_mask=inputs.keep_mask)


class _Attention(torch.autograd.Function):
    """(q, k, v, bias, sinks, inputs, problem, ranks) -> (out, lse).

    Ranks forget a job when they have answered it: a backward pass does the forward pass again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        inputs: Inputs,
        problem: Problem,
        ranks: int,
    ) -> tuple[Tensor, Tensor]:
        plain = replace(inputs, q=q, k=k, v=v, bias=bias, sinks=sinks)
        answers = team(ranks).run(_jobs(plain, problem, ranks))
        shape = output_shape(problem)
        out = torch.zeros(shape, dtype=q.dtype, device=q.device)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.zeros(shape[:-1], dtype=wide, device=q.device)
        for (rows, _), answer in zip(_owned(problem, ranks), answers, strict=True):
            out[:, :, rows], lse[:, :, rows] = answer["out"], answer["lse"]
        ctx.inputs, ctx.problem, ctx.ranks = inputs, problem, ranks
        ctx.save_for_backward(q, k, v, bias, sinks)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        problem, ranks = ctx.problem, ctx.ranks
        named = dict(zip(GRADIENT_NAMES, ctx.saved_tensors, strict=True))
        needed = zip(GRADIENT_NAMES, ctx.needs_input_grad, strict=False)
        wanted = [name for name, need in needed if need]
        inputs = replace(ctx.inputs, **named, grad_out=grad_out, grad_lse=grad_lse)
        answers = team(ranks).run(_jobs(inputs, problem, ranks, wanted))
        totals: dict[str, Tensor] = {}
        for name in wanted:
            given = named[name]
            total = torch.zeros(given.shape, dtype=grad_lse.dtype, device=given.device)
            for (rows, keys), answer in zip(_owned(problem, ranks), answers, strict=True):
                part = answer[f"d{name}"]
                if name in ("k", "v"):
                    total[:, :, keys] = part.to(total.dtype)
                elif name == "q" or (name == "bias" and given.shape[2] != 1):
                    total[:, :, rows] = part.to(total.dtype)
                else:  # of what every rank has a copy of
                    total += part
            totals[name] = total.to(given.dtype)
        return (*(totals.get(name) for name in GRADIENT_NAMES), None, None, None)


def _without_pages(inputs: Inputs, problem: Problem) -> tuple[Inputs, Problem]:
    """The same with k and v in one piece, behind their keys zeros."""
    assert inputs.page_table is not None
    lengths = problem.key_lengths or (problem.keys,) * problem.batch
    whole: dict[str, Tensor] = {}
    for name in ("k", "v"):
        pages = getattr(inputs, name).detach()
        shape = (problem.batch, problem.kv_heads, problem.keys, pages.shape[-1])
        whole[name] = pages.new_zeros(shape)
        for entry, length in enumerate(lengths):
            found = gather_pages(pages, inputs.page_table[entry], length)
            whole[name][entry, :, :length] = found
    return replace(inputs, **whole, page_table=None), problem.replace(page_size=None)


def _owned(problem: Problem, ranks: int) -> list[tuple[Tensor, Tensor]]:
    """The rows and the keys of each rank, among those of the canonical tensors."""
    rows: Sequence[int] = [output_shape(problem)[2]]
    keys: Sequence[int] = [key_count(problem)]
    if problem.packed is not None:
        rows, keys = ([pair[side] for pair in problem.packed] for side in (0, 1))
    return [(positions(rows, ranks, r), positions(keys, ranks, r)) for r in range(ranks)]


def _jobs(inputs: Inputs, problem: Problem, ranks: int, wanted: Sequence[str] = ()) -> list[Job]:
    """What each rank computes: its shards, and how; ``wanted`` are gradients."""
    options = {
        name: getattr(problem, name)
        for name in ("scale", "causal", "window", "softcap", "dropout", "key_lengths", "packed")
    }
    of_rows = ("q", "mask", "bias", "keep_mask", "grad_out", "grad_lse")
    jobs = []
    for rows, keys in _owned(problem, ranks):
        job: Job = {"options": options, "wanted": list(wanted)}
        for name, tensor in inputs.tensors().items():
            tensor = tensor.detach()
            if name in ("k", "v"):
                tensor = tensor[:, :, keys]
            elif name in of_rows and not (name in ("mask", "bias") and tensor.shape[2] == 1):
                tensor = tensor[:, :, rows]
            elif name in ("key_lengths", "cu_seqlens_q", "cu_seqlens_k"):
                continue  # the problem has their values
            if name == "bias" and tensor.dtype not in (torch.float32, torch.float64):
                tensor = tensor.float()  # so that parts of its gradient are not rounded
            job[name] = tensor
        if not wanted:
            job.pop("grad_out", None)
            job.pop("grad_lse", None)
        jobs.append(job)
    return jobs


def _packed(value: Any) -> Any:
    """Tensors as bytes: those of torch would be shared through a thread."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        data = plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        return _Tensor((str(plain.dtype).removeprefix("torch."), tuple(plain.shape), data))
    return {n: _packed(v) for n, v in value.items()} if isinstance(value, dict) else value


def _unpacked(value: Any) -> Any:
    """The inverse."""
    if isinstance(value, _Tensor):
        name, shape, data = value
        dtype = getattr(torch, name)
        if not data:
            return torch.zeros(shape, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape)
    return {n: _unpacked(v) for n, v in value.items()} if isinstance(value, dict) else value


class _Tensor(tuple[str, tuple[int, ...], bytes]):
    """dtype, shape and bytes."""


# In the program that the ranks are forked from, and in the ranks.


def compute(options: dict[str, Any], wanted: Sequence[str], **tensors: Any) -> dict[str, Tensor]:
    """The job of a rank: out and lse, or the gradients ``wanted`` ("dq", …)."""
    incoming = [tensors.pop(name) for name in ("grad_out", "grad_lse") if name in tensors]
    for name in wanted:
        tensors[name].requires_grad_()
    out, lse = ring_attention(**tensors, **options)
    if not wanted:
        return {"out": out, "lse": lse}
    found = torch.autograd.grad([out, lse], [tensors[name] for name in wanted], incoming)
    return {f"d{name}": gradient for name, gradient in zip(wanted, found, strict=True)}


def main() -> None:
    """Fork the ranks, and end with them when the process that started this one ends."""
    started_by, entry = os.getppid(), sys.argv[1]
    control, *descriptors = map(int, sys.argv[2:])
    torch.set_num_threads(1)
    with suppress(ImportError):
        importlib.import_module(LOADED_BY_AUTOGRAD)  # once, and not by every rank
    if loopback := [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback[0]  # not what a host name may resolve to
    folder = tempfile.mkdtemp(prefix="ring-")
    running = []
    try:
        for rank in range(len(descriptors)):
            with warnings.catch_warnings():
                # Of threads: those of numpy's BLAS, which sees to it that it can be forked.
                warnings.simplefilter("ignore")
                pid = os.fork()
            if not pid:
                for other in (control, *descriptors):
                    if other != descriptors[rank]:
                        os.close(other)
                _become_rank(rank, len(descriptors), descriptors[rank], folder, entry)
            running.append(pid)
        for descriptor in descriptors:
            os.close(descriptor)
        connection = Connection(control)
        # Nothing is ever sent: what can be read is the end of the connection.
        while not wait([connection], LOOK_SECONDS) and os.getppid() == started_by:
            continue
    finally:
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in running:
            os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # unloading torch takes a second


def _become_rank(rank: int, ranks: int, descriptor: int, folder: str, entry: str) -> None:
    """Never returns: this is the forked process."""
    try:
        _end_with_parent()
        _serve(rank, ranks, Connection(descriptor), folder, entry)
    except (EOFError, OSError):
        pass  # nobody is there to be told
    finally:
        os._exit(0)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that
            os._exit(0)


def _serve(rank: int, ranks: int, connection: Connection, folder: str, entry: str) -> None:
    """Join the group, then do one job after the other until the connection ends."""
    try:
        module, name = entry.split(":")
        work = getattr(importlib.import_module(module), name)
        store = dist.FileStore(f"{folder}/store", ranks)  # type: ignore[attr-defined]
        limit = timedelta(seconds=JOB_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=limit)
        dist.barrier()
    except Exception as error:
        connection.send((False, _text(error)))
        return
    connection.send((True, os.getpid()))
    while True:
        job = _unpacked(connection.recv())
        try:
            answer = (True, _packed(work(**job)))
        except Exception as error:
            answer = (False, _text(error))
        connection.send(answer)


def _text(error: Exception) -> str:
    """What it is, and where it was raised."""
    where = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {error}\n{where}"
