"""The options of a run: what pytest is given, understood and checked before anything starts."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .writing import unwritable

if TYPE_CHECKING:
    from .cases import Case
    from .subject import Subject

DEVICES = ("auto", "cpu", "cuda")
# Variables of others that decide which kernel runs, and how.
FOREIGN_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTEST_ADDOPTS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TRITON_INTERPRET",
)
OWN_PREFIX = "ATTNPROOF_"


class OptionError(Exception):
    """An option has a value that is not accepted; the message is one line that says which are."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is to be judged, and how. Empty tuples stand for all."""

    target: str
    signature: str | None = None
    precision: str | None = None  # a profile's name; None: what the target declares
    device: str = "auto"
    level: str = "quick"
    dtypes: tuple[str, ...] = ()
    chapters: tuple[str, ...] = ()
    seed: int = 0
    timeout: float = 60.0  # seconds per case
    deviations: str | None = None  # a file, or 'none'; None: those that ship
    in_process: bool = False
    json: Path | None = field(default=None)
    resume: bool = False
    case: str | None = None
    model: str | None = None  # judged inside that model, in place of the chapters
    skip_budget: int | None = None  # cases that may go without being run; None: any number

    @property
    def journal(self) -> Path | None:
        """Where records go as they come: beside the JSON file, with an l at the end."""
        return None if self.json is None else self.json.with_name(f"{self.json.name}l")

    def run(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        names = ("target", "signature", "precision", "device", "seed", "deviations", "in_process")
        return {name: getattr(self, name) for name in names}

    def wants(self, case: Case) -> bool:
        """Whether a case is among those chosen by chapter and dtype."""
        return (not self.chapters or case.chapter in self.chapters) and (
            not self.dtypes or case.problem.dtype in self.dtypes
        )

    def shown(self) -> dict[str, str]:
        """Options with another value than the default, by their name on a command line; several
        values are separated by commas, flags have none."""
        given = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                name = {"dtypes": "dtype", "chapters": "chapter"}.get(f.name, f.name)
                text = ",".join(value) if isinstance(value, tuple) else str(value)
                given[f"--attn-{name.replace('_', '-')}"] = "" if value is True else text
        return given


def add_options(add: Any) -> None:
    """Declare every option; ``add`` is ``addoption`` of a group of pytest's parser."""

    def text(name: str, metavar: str, about: str, **more: Any) -> None:
        add(f"--attn-{name}", metavar=metavar, help=about, **more)

    text("target", "TARGET", "what to judge: a backend, module:function or file.py:function")
    text("signature", "NAME", "how the target is called: attnproof, sdpa or flash_attn")
    text("precision", "PROFILE", "what it does to numbers inside, instead of what it declares")
    text("device", "DEVICE", "auto, cpu or cuda", default="auto")
    text("level", "LEVEL", "quick or full", default="quick")
    text("dtype", "DTYPE", "judge this dtype only; may be repeated", action="append", default=[])
    text("chapter", "NAME", "judge this chapter only; may be repeated", action="append", default=[])
    text("case", "CASE_ID", "judge exactly this case, whatever the level")
    text("seed", "N", "added to the seed of every case", type=int, default=0)
    text("timeout", "SECONDS", "limit of a case", type=float, default=60.0)
    text("skip-budget", "N", "fail when more cases than that are not run", type=int)
    text("deviations", "FILE", "known deviations instead of those that ship, or none")
    text(
        "json",
        "FILE",
        "write the results there, and as they come to FILE + l",
    )
    add("--attn-resume", action="store_true", help="go on with the run that --attn-json holds")
    add(
        "--attn-in-process",
        action="store_true",
        help="run the target in this process, for debuggers, profilers and sanitizers",
    )


def read_options(given: argparse.Namespace) -> Options | None:
    """The options as pytest parsed them; None without --attn-target.

    OptionError, naming the option, its value and what is accepted, when they make no sense.
    """
    if given.attn_target is None:
        if strays := _strays(given):
            raise OptionError(
                f"{', '.join(strays)}: needs --attn-target, which names what to judge"
            )
        return None
    options = Options(
        target=given.attn_target,
        signature=given.attn_signature,
        precision=given.attn_precision,
        device=given.attn_device,
        level=given.attn_level,
        dtypes=tuple(given.attn_dtype),
        chapters=tuple(given.attn_chapter),
        seed=given.attn_seed,
        timeout=given.attn_timeout,
        deviations=given.attn_deviations,
        in_process=given.attn_in_process,
        json=None if given.attn_json is None else Path(given.attn_json),
        resume=given.attn_resume,
        case=given.attn_case,
        skip_budget=given.attn_skip_budget,
    )
    _check(options)
    return options


def environment() -> dict[str, str]:
    """The environment variables that bear on a run, those that begin with ATTNPROOF_ all: a
    misspelt one shows."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name in FOREIGN_VARIABLES or name.startswith(OWN_PREFIX)
    }


def _strays(given: argparse.Namespace) -> list[str]:
    """The options given without a target."""
    defaults = {"attn_device": "auto", "attn_level": "quick", "attn_timeout": 60.0, "attn_seed": 0}
    return [
        f"--{name.replace('_', '-')}"
        for name, value in sorted(vars(given).items())
        if name.startswith("attn_")
        and value is not False
        and value not in (None, [], defaults.get(name))
    ]


def _check(options: Options) -> None:
    from attn_reference.precision import PROFILES
    from attn_reference.problem import DTYPES

    from . import cases

    known: tuple[tuple[str, tuple[str, ...], Mapping[str, Any] | tuple[str, ...]], ...] = (
        ("device", (options.device,), DEVICES),
        ("level", (options.level,), cases.LEVELS),
        ("dtype", options.dtypes, DTYPES),
        ("chapter", options.chapters, cases.chapters()),
        ("precision", (options.precision,) if options.precision else (), PROFILES),
    )
    for name, values, accepted in known:
        for value in values:
            if value not in accepted:
                raise OptionError(
                    f"--attn-{name} {value}: unknown; accepted are {', '.join(accepted)}"
                )
    if not (math.isfinite(options.timeout) and options.timeout > 0):
        raise OptionError(f"--attn-timeout {options.timeout:g}: accepted is a time above 0 seconds")
    if options.skip_budget is not None and options.skip_budget < 0:
        raise OptionError(f"--attn-skip-budget {options.skip_budget}: accepted is 0 or more cases")
    if options.resume and options.json is None:
        raise OptionError("--attn-resume: needs --attn-json, which names the run to go on with")
    if options.json is not None and (why := unwritable(options.json)):
        raise OptionError(f"--attn-json {str(options.json)!r}: {why}")
    if options.journal is not None and (why := unwritable(options.journal)):
        raise OptionError(
            f"--attn-json {str(options.json)!r}: its journal {options.journal.name} {why}"
        )
    if options.case is not None:
        try:
            cases.find_case(options.case)
        except ValueError as error:
            raise OptionError(f"--attn-case: {error}") from None


def resolved_device(device: str) -> str:
    """'cuda' or 'cpu' for 'auto', by what torch finds here."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def loading_text(options: Options) -> str:
    """What is waited for while a target is loaded, and for how long at most."""
    if options.in_process:
        return f"loading {options.target}"
    from .worker.runners import LOAD_SECONDS

    return f"loading {options.target}, up to {LOAD_SECONDS:g} s"


def make_subject(options: Options) -> Subject:
    """The target, described and ready to be judged. Raises LoadError when it cannot be loaded."""
    from attn_reference.precision import PROFILES

    from .diagnosis.explainer import Explainer
    from .subject import Subject
    from .targets import TargetSpec
    from .worker.runners import InProcessRunner, IsolatedRunner

    device = resolved_device(options.device)
    spec = TargetSpec(options.target, options.signature)
    runner = (InProcessRunner if options.in_process else IsolatedRunner)(spec, device)
    description = runner.describe()
    named = options.precision
    precision = description.precision if named is None else PROFILES[named]
    subject = Subject(
        runner=runner,
        description=description,
        precision=precision,
        device=device,
        timeout=options.timeout,
        seed=options.seed,
    )
    subject.explain = Explainer(subject)
    return subject
