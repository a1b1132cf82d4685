"""What torch and triton are like here, and the environment of a run; imports both."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..environment import environment
from .probing import answers, say


def torch_values() -> dict[str, Any]:
    """How torch was built; none of this starts CUDA."""
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cxx11_abi": bool(torch._C._GLIBCXX_USE_CXX11_ABI),
        "archs": _archs(),
    }


def _archs() -> list[str]:
    """What torch has machine code for: ["sm_80", "sm_90"]."""
    import torch

    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: "")() or ""
    return [flag for flag in flags.split() if flag.startswith("sm_")]


def triton_values() -> dict[str, Any]:
    """The version of triton that can be imported, or why none can."""
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return {"version": None, "problem": "is not installed"}
    try:
        import triton
    except Exception as error:
        return {"version": installed, "problem": f"{type(error).__name__}: {error}"}
    return {"version": triton.__version__, "problem": None}


def main() -> None:
    """Say it, that first which is known first."""
    out = answers()
    say(out, {"torch": torch_values()})
    say(out, {"environment": environment()})
    say(out, {"triton": triton_values()})


if __name__ == "__main__":
    main()
