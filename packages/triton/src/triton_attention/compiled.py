"""Kernels compiled for a GPU that need not be there, to be read and pinned."""

from __future__ import annotations

import hashlib
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_source
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.cache import get_cache_key
from triton.runtime.jit import create_function_from_signature, get_cache_invalidating_env_vars

from .launch import Launch

WARP_SIZE = 32


def compile_for(launch: Launch, capability: int) -> Any:
    """What a launch runs on a GPU of that compute capability (90: Hopper), compiled here.

    The arguments are those of the launch, on any device: their dtypes, alignment and divisibility
    decide what is compiled, as they do at run time. Gives Triton's compiled kernel: ``asm`` has
    "ttgir", "ptx" and "cubin", ``metadata`` the shared memory.
    """
    source, target, options = _source(launch, capability)
    return compile_source(source, target=target, options=options)


def key_for(launch: Launch, capability: int) -> str:
    """A digest of all that decides what ``compile_for`` gives: source, arguments, options, Triton.

    It is that of Triton's own cache, made without compiling.
    """
    source, target, options = _source(launch, capability)
    backend = make_backend(target)
    parsed, variables = backend.parse_options(options), get_cache_invalidating_env_vars()
    key = get_cache_key(source, backend, parsed, env_vars=variables)
    return hashlib.sha256(key.encode()).hexdigest()


def _source(launch: Launch, capability: int) -> tuple[Any, GPUTarget, dict[str, Any]]:
    """What Triton compiles, for what, with which options."""
    kernel, target = launch.kernel, GPUTarget("cuda", capability, WARP_SIZE)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {**launch.options, "debug": False}
    bound, specialization, _ = bind(**launch.arguments, **options)
    parsed, signature, constexprs, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    of_kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = of_kind(kernel, signature, constexprs, attributes)
    return source, target, parsed.__dict__
