"""Kernels compiled for a GPU that need not be there, to be read and pinned."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_source
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from .launch import Launch

WARP_SIZE = 32


def compile_for(launch: Launch, capability: int) -> Any:
    """What a launch runs on a GPU of that compute capability (90: Hopper), compiled here.

    The arguments are those of the launch, on any device: their dtypes, alignment and divisibility
    decide what is compiled, as they do at run time. Gives Triton's compiled kernel: ``asm`` has
    "ttgir", "ptx" and "cubin", ``metadata`` the shared memory.
    """
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
    return compile_source(source, target=target, options=parsed.__dict__)
