"""Kernels compiled in processes of their own, over all cores; one that crashes costs its call."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path

from pebble import ProcessExpired, ProcessPool

from ..environment import cores
from .cache import Cache, default_folder
from .gate import Outcome
from .measure import measure
from .sources import CodegenSource

SECONDS = 600.0  # for the kernels of a call
INTERPRET = "TRITON_INTERPRET"  # a variable: what is set here need not be meant for the gate
Progress = Callable[[int, int], None]  # calls that are done, of how many


class CannotCompile(Exception):
    """Why nothing can be compiled here, a sentence."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The versions of the tools, and what became of each kernel."""

    toolchain: Mapping[str, str]
    kernels: Mapping[str, Outcome]


def compile_all(
    source: CodegenSource,
    toolchain: Mapping[str, str] | None = None,
    progress: Progress = lambda done, total: None,
    folder: Path | None = None,
) -> Found:
    """Every kernel of a source, or none where ``toolchain`` is given and is not the one here.

    ``folder``: of the cache, None for the user's. Raises CannotCompile where there is no compiler.
    """
    calls, kernels = source.calls(), dict[str, Outcome]()
    folder = folder or default_folder()
    workers = max(1, min(cores(), len(calls)))
    context = multiprocessing.get_context("spawn")
    with ProcessPool(workers, 0, _start, (), context) as pool:
        try:
            here = _toolchain(pool, source)
            if toolchain not in (None, here):
                return Found(toolchain=here, kernels={})
            futures: dict[Future[dict[str, Outcome]], str] = {
                pool.schedule(_compile, (source, call, folder), timeout=SECONDS): call
                for call in calls
            }
            for done, future in enumerate(as_completed(futures), 1):
                kernels |= _outcomes(future, futures[future])
                progress(done, len(calls))
        finally:
            pool.stop()  # type: ignore[no-untyped-call]
    return Found(toolchain=here, kernels=dict(sorted(kernels.items())))


def _start() -> None:
    os.environ.pop(INTERPRET, None)


def _toolchain(pool: ProcessPool, source: CodegenSource) -> Mapping[str, str]:
    future: Future[Mapping[str, str]] = pool.schedule(source.toolchain, timeout=SECONDS)
    try:
        return future.result()
    except (ImportError, OSError, RuntimeError) as error:
        raise CannotCompile(f"{source.name}: {error}") from error


def _outcomes(future: Future[dict[str, Outcome]], call: str) -> dict[str, Outcome]:
    """What a process has answered, or the call with the reason why it has not."""
    try:
        return future.result()
    except ProcessExpired as died:
        reason = f"the compiler ended its process with exit code {died.exitcode}"
    except TimeoutError:
        reason = f"the compiler gave no answer in {SECONDS:g} s"
    except Exception as error:
        reason = described(error)
    return {call: Outcome(error=reason, limits={})}


def _compile(source: CodegenSource, call: str, folder: Path) -> dict[str, Outcome]:
    """In a process of the pool."""
    found, cache = {}, Cache(folder)
    for kernel in source.kernels(call):
        measured, error = None, None
        try:
            key = kernel.key()
            measured = cache.get(key)
            if measured is None:
                measured = measure(kernel.compile())
                cache.put(key, measured)
        except Exception as failed:
            error = described(failed)
        found[kernel.name] = Outcome(measured=measured, error=error, limits=kernel.limits)
    return found


def described(error: Exception) -> str:
    """An exception in one line, of the first and the last that it has: compilers write pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " … ".join([type(error).__name__, *dict.fromkeys([*lines[:1], *lines[-1:]])])[:300]
