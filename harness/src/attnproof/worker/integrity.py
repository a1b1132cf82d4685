"""What a call must leave as it found it: functions, threads, and the settings of the process.

Everything here runs in the process of the target, so it sees careless and moderately hostile
code, not code that patches this module as well. What has to hold against that is checked by
the parent, from outside (see docs/isolation.md).
"""

from __future__ import annotations

import _thread
import builtins
import concurrent.futures.thread
import importlib.util
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch

GRACE_SECONDS = 0.25  # for threads and processes that are about to end
NAME_LIMIT = 200  # characters of a name that the target chose
# Attributes that torch itself replaces: torch.compile wraps manual_seed, and a new default
# dtype, which has a complaint of its own, comes with a new Storage.
REPLACED_BY_TORCH = frozenset({"torch.manual_seed", "torch.Storage"})
WATCHED_MODULES: tuple[ModuleType, ...] = (
    torch,
    torch.nn.functional,
    torch.autograd,
    torch.linalg,
    torch.cuda,
    time,
    builtins,
)
WATCHED_CLASSES: tuple[type, ...] = (torch.Tensor, torch.autograd.Function)

# torch chooses kernels of its own for these when it is told to.
CHOSEN_BY_TORCH = ("aten/_scaled_dot_product", "aten/_flash_attention")

# Taken before any target is loaded: a patched clock or frame getter does not reach these.
_sleep = time.sleep
_now = time.monotonic
_current_frames = sys._current_frames
_thread_count = _thread._count
_own_pid = os.getpid
_POOL_WORKER: CodeType = concurrent.futures.thread._worker.__code__
_OWN_PACKAGES = tuple(
    os.path.join(folder, "")
    for name in ("torch", "triton", "tqdm")  # with tqdm torch's compiler shows its progress
    if (spec := importlib.util.find_spec(name)) is not None
    for folder in spec.submodule_search_locations or ()
)
_THREADING_FILE = threading.__file__
_PROCESSES = Path("/proc")  # Linux has it
# By number: some have two names.
_LIMITS = {getattr(resource, n): n for n in dir(resource) if n.startswith("RLIMIT_")}
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class Functions:
    """The attributes of torch, the clock and the builtins, as they were when this was made.

    Attributes that are added are no concern: lazy imports do that. One that is added to a
    class and hides an inherited one is.
    """

    def __init__(self) -> None:
        owners: dict[str, ModuleType | type] = {m.__name__: m for m in WATCHED_MODULES}
        for watched in WATCHED_CLASSES:
            owners[f"{watched.__module__}.{watched.__name__}"] = watched
        self._owners = owners
        self._before: dict[str, dict[str, Any]] = {}
        for owner_name, owner in owners.items():
            # The data of a module changes: torch.cuda remembers that it has been initialised.
            self._before[owner_name] = {
                name: value
                for name, value in vars(owner).items()
                if isinstance(owner, type) or callable(value)
            }
        self._operators = _operators()
        self._inherited = {
            name: frozenset().union(*map(vars, owner.__mro__[1:])) - vars(owner).keys()
            for name, owner in owners.items()
            if isinstance(owner, type)
        }

    def replaced(self) -> list[str]:
        """Dotted names of what has been replaced or removed since."""
        found = []
        for owner_name, before in self._before.items():
            now: Mapping[str, Any] = vars(self._owners[owner_name])
            for name, value in before.items():
                if now.get(name, self) is not value:
                    found.append(f"{owner_name}.{name}")
            hidden = self._inherited.get(owner_name, frozenset()) & now.keys()
            found += [f"{owner_name}.{name}" for name in sorted(hidden)]
            module = self._owners[owner_name]
            if isinstance(module, ModuleType) and sys.modules.get(owner_name) is not module:
                found.append(f"sys.modules[{owner_name!r}]")
        found += [f"the operator {name}" for name in sorted(_operators() - self._operators)]
        return [name for name in found if name not in REPLACED_BY_TORCH]


def _operators() -> set[str]:
    """Kernels for torch's own operators that Python code has registered: "aten/mm/CPU". Those
    for the meta device compute nothing, those for vmap concern nothing outside of it, and torch
    registers both when they are needed."""
    registered: set[str] = torch.library._impls
    return {
        name
        for name in registered
        if name.startswith("aten/")
        and not name.endswith(("/Meta", "/FuncTorchBatched"))
        and not name.startswith(CHOSEN_BY_TORCH)
    }


@dataclass(frozen=True)
class Threads:
    """The Python threads that ran at one moment."""

    identifiers: frozenset[int]
    frameless: int  # started with _thread on a function that is not Python's: no frame shows them

    @classmethod
    def running(cls) -> Threads:
        """Those that run now."""
        frames = _current_frames()
        return cls(frozenset(frames), _thread_count() + 1 - len(frames))

    def left_running(self) -> list[str]:
        """The threads started since that still run after a short grace, in words.

        Exempt are idle workers of a thread pool, which have no work to write anything with,
        and threads of torch, triton and tqdm themselves (compilers keep some).
        """
        deadline = _now() + GRACE_SECONDS
        looked_twice = False
        while True:
            left = self._left()
            if left and _now() >= deadline:
                return left
            if not left and (looked_twice or _current_frames().keys() <= self.identifiers):
                return []
            # A worker of a pool may be about to take up its work: look a second time.
            looked_twice = not left
            _sleep(0.005 if left else 0.001)

    def _left(self) -> list[str]:
        now = Threads.running()
        left = [
            _in_words(identifier, frame)
            for identifier, frame in _current_frames().items()
            if identifier not in self.identifiers and not _is_exempt(frame)
        ]
        if now.frameless > self.frameless:
            left.append(f"{now.frameless - self.frameless} outside Python code")
        return left


def _is_exempt(frame: FrameType) -> bool:
    if frame.f_code is _POOL_WORKER:
        queue = frame.f_locals.get("work_queue")
        return queue is not None and bool(queue.empty())
    return _root(frame).f_code.co_filename.startswith(_OWN_PACKAGES)


def _root(frame: FrameType) -> FrameType:
    """The outermost frame that is not the threading module's own."""
    chain = [frame]
    while chain[-1].f_back is not None:
        chain.append(chain[-1].f_back)
    return next((f for f in reversed(chain) if f.f_code.co_filename != _THREADING_FILE), frame)


def _in_words(identifier: int, frame: FrameType) -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    name = names.get(identifier, f"thread {identifier}, not started by the threading module")
    name = str(name)[:NAME_LIMIT]
    return f"{name}, in {frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"


def copies_left_running() -> list[str]:
    """Processes forked from this one that still run after a short grace, in words.

    They hold its memory, its inputs and its connection. Programs that it has started are no
    copies: compilers keep some.
    """
    deadline = _now() + GRACE_SECONDS
    while (left := list(_copies())) and _now() < deadline:
        _sleep(0.005)
    return [f"process {pid}" for pid in left]


def _copies() -> Iterator[int]:
    own = _PROCESSES / str(_own_pid())
    try:
        command = (own / "cmdline").read_bytes()
        lists = [thread / "children" for thread in (own / "task").iterdir()]
        children = [int(pid) for one in lists for pid in one.read_text().split()]
    except OSError:  # no such files on this system
        return
    for pid in children:
        try:
            # That of a process that has ended is empty.
            copy = (_PROCESSES / str(pid) / "cmdline").read_bytes() == command
        except OSError:
            continue
        if copy:
            yield pid


@dataclass(frozen=True)
class Settings:
    """The settings of this process and thread that change what later code computes."""

    values: Mapping[str, Any]

    @classmethod
    def now(cls, *, random: bool) -> Settings:
        """As they are; ``random``: the state of torch's generators too."""
        values: dict[str, Any] = {
            "the default dtype": torch.get_default_dtype(),
            "the default device": torch.get_default_device(),
            "the number of threads": torch.get_num_threads(),
            "grad mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "anomaly detection": torch.is_anomaly_enabled(),
            "autocast on cpu": torch.is_autocast_enabled("cpu"),
            "autocast on cuda": torch.is_autocast_enabled("cuda"),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "the precision of float32 products": torch.get_float32_matmul_precision(),
            "cuDNN's deterministic flag": torch.backends.cudnn.deterministic,
            "what scaled_dot_product_attention may use": _sdpa_backends(),
            "the stack of torch function modes": torch._C._len_torch_function_stack(),
            "the stack of torch dispatch modes": torch._C._len_torch_dispatch_stack(),
            "the flushing of subnormal numbers": sys.float_info.min / 2 == 0.0,
            # What belongs to the target is not printed: its text would be the target's code.
            "the trace function": str(id(sys.gettrace())).encode(),
            "the profile function": str(id(sys.getprofile())).encode(),
            "the timers that send signals": _timers(),
        }
        for limit, name in _LIMITS.items():
            values[f"the limit {name}"] = resource.getrlimit(limit)
        if random:
            values["torch's random state"] = bytes(torch.get_rng_state().numpy())
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            values["the current GPU"] = torch.cuda.current_device()
            values["the current stream"] = torch.cuda.current_stream().cuda_stream
            if random:
                state = torch.cuda.get_rng_state()
                values["torch's random state on the GPU"] = bytes(state.numpy())
        return cls(values)

    def changes(self) -> list[str]:
        """What is different now, as sentences."""
        now = Settings.now(random="torch's random state" in self.values).values
        said = []
        for name, value in self.values.items():
            if name in now and now[name] != value:
                shown = "" if isinstance(value, bytes) else f" from {value} to {now[name]}"
                said.append(f"changed {name}{shown}")
        return said


def _timers() -> tuple[bool, ...]:
    """Which of the three are set."""
    return tuple(signal.getitimer(timer)[0] > 0 for timer in _TIMERS)


def _sdpa_backends() -> tuple[bool, ...]:
    allowed = torch.backends.cuda
    return (
        allowed.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        allowed.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        allowed.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        allowed.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
    )


@dataclass(kw_only=True)
class Watch:
    """What is watched over the calls of a plan. Make one before the target is loaded."""

    functions: Functions
    threads: Threads

    @classmethod
    def begin(cls) -> Watch:
        """Remember functions and threads as they are now."""
        return cls(functions=Functions(), threads=Threads.running())

    def complaints(self, settings: Settings) -> list[str]:
        """What a call did to the process beside computing, as sentences."""
        said = [f"replaced {name}" for name in self.functions.replaced()]
        said += [f"left a thread running: {thread}" for thread in self.threads.left_running()]
        said += [f"left a copy of its process running: {copy}" for copy in copies_left_running()]
        return said + settings.changes()
