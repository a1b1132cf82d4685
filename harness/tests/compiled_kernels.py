"""A source of the codegen gate that needs no compiler: what its kernels compile to is in a file.

The file holds, by kernel, the number of HGMMA, or what happens in place of compiling. Each time a
kernel is compiled, a line is added to a second file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnproof.codegen.sources import Compiled

LOG = "ptxas info    : Used 32 registers, used 1 barriers\n"


@dataclass(frozen=True)
class FakeKernel:
    name: str
    is_: int | str
    folder: Path

    @property
    def limits(self) -> Mapping[str, int]:
        return {"shared": 100}

    def key(self) -> str:
        return f"{self.name} {self.is_}"

    def compile(self) -> Compiled:
        with (self.folder / "compiled").open("a") as file:
            file.write(f"{self.name}\n")
        if self.is_ == "dies":
            os._exit(7)
        if isinstance(self.is_, str):
            raise RuntimeError(f"{self.is_}\nmore\n")
        lines = [
            f"        /*{n:04x}*/                   HGMMA.64x64x16 R1 ;" for n in range(self.is_)
        ]
        exit_ = f"        /*{self.is_:04x}*/                   EXIT ;"
        return Compiled(sass="\n".join([*lines, exit_]), log=LOG, shared=64)


@dataclass(frozen=True)
class Fake:
    folder: Path
    name: str = "fake"
    version: str = "1.0"

    def calls(self) -> Sequence[str]:
        return list(self._kernels())

    def kernels(self, call: str) -> Sequence[FakeKernel]:
        return [FakeKernel(call, self._kernels()[call], self.folder)]

    def toolchain(self) -> Mapping[str, str]:
        if self.version == "none":
            raise ImportError("No module named 'compiler'")
        return {"compiler": self.version}

    def _kernels(self) -> dict[str, int | str]:
        return json.loads((self.folder / "kernels").read_text())
