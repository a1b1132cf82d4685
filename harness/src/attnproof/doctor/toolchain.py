"""The compilers that are here: what CUDA extensions and Triton's launchers are built with."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .probing import Answer

# The program, and where in what it prints its version is.
TOOLS = {
    "nvcc": r"release (\d+(?:\.\d+)+)",
    "gcc": r"(\d+\.\d+(?:\.\d+)*)",
    "g++": r"(\d+\.\d+(?:\.\d+)*)",
    "clang": r"version (\d+(?:\.\d+)+)",
    "ninja": r"(\d+(?:\.\d+)+)",
}
CUDA_HOMES = ("CUDA_HOME", "CUDA_PATH")
USUAL_CUDA_HOME = "/usr/local/cuda"


def commands() -> dict[str, list[str]]:
    """The probes that ask each tool for its version; those that are not here are asked too."""
    return {name: [path_of(name) or name, "--version"] for name in TOOLS}


def tools(answers: Mapping[str, Answer]) -> dict[str, dict[str, Any]]:
    """Path, version and, where there is none, what is wrong, by name."""
    return {name: _tool(name, answers[name]) for name in TOOLS}


def path_of(name: str) -> str | None:
    """Where a tool is: on the PATH; nvcc where torch looks for it, which prefers CUDA_HOME."""
    if name != "nvcc":
        return shutil.which(name)
    homes = [home for variable in CUDA_HOMES if (home := os.environ.get(variable))]
    for home in homes:
        if (path := Path(home) / "bin" / name).is_file():
            return str(path)
    return shutil.which(name) or shutil.which(name, path=f"{USUAL_CUDA_HOME}/bin")


def _tool(name: str, answer: Answer) -> dict[str, Any]:
    path = path_of(name)
    match = re.search(TOOLS[name], _without_parentheses(answer.output))
    problem = answer.problem
    if path is None:
        problem = "is not here"
    elif problem is None and match is None:
        problem = "says no version"
    return {"path": path, "version": match[1] if match else None, "problem": problem}


def _without_parentheses(text: str) -> str:
    """gcc names its packager's version in parentheses, before its own."""
    return re.sub(r"\([^)]*\)", "", text)
