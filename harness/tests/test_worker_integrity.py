"""What is noticed about a process, one kind at a time; the rest is in test_isolation."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attnproof.worker.integrity import Functions, Settings, Threads, Watch


@pytest.fixture
def functions():
    return Functions()


def test_nothing_has_been_replaced(functions):
    assert functions.replaced() == []


@pytest.mark.parametrize(
    ("owner", "name", "told"),
    [
        (torch, "empty", "torch.empty"),
        (torch.nn.functional, "softmax", "torch.nn.functional.softmax"),
        (torch.linalg, "norm", "torch.linalg.norm"),
        (torch.autograd, "grad", "torch.autograd.grad"),
        (torch.cuda, "synchronize", "torch.cuda.synchronize"),
        (time, "perf_counter_ns", "time.perf_counter_ns"),
        (torch.Tensor, "backward", "torch.Tensor.backward"),
        (torch.Tensor, "copy_", "torch.Tensor.copy_"),  # inherited: hidden, not replaced
        (torch.autograd.Function, "apply", "torch.autograd.function.Function.apply"),
    ],
)
def test_a_replaced_attribute_is_named(functions, monkeypatch, owner, name, told):
    monkeypatch.setattr(owner, name, lambda *_, **__: None)
    assert functions.replaced() == [told]


def test_a_removed_attribute_is_named(functions, monkeypatch):
    monkeypatch.delattr(torch, "matmul")
    assert functions.replaced() == ["torch.matmul"]


def test_a_replaced_module_is_named(functions, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "time", object())
    assert functions.replaced() == ["sys.modules['time']"]


def test_an_added_attribute_is_no_concern(functions, monkeypatch):
    monkeypatch.setattr(torch, "my_kernels", object(), raising=False)
    monkeypatch.setattr(torch.Tensor, "my_method", lambda self: 0, raising=False)
    assert functions.replaced() == []


def test_torchs_own_kernels_for_vmap_are_no_concern(functions):
    torch.vmap(lambda x: x + 1)(torch.zeros(2))  # torch registers them when it is first called
    assert any(name.endswith("/FuncTorchBatched") for name in torch.library._impls)
    assert functions.replaced() == []


def test_the_progress_of_torchs_compiler_is_no_concern():
    tqdm = pytest.importorskip("tqdm", reason="tqdm is not installed: torch shows no progress")
    before = Threads.running()
    monitor_interval = tqdm.tqdm.monitor_interval
    assert monitor_interval > 0
    tqdm.tqdm(range(1), disable=True)  # as in torch/_inductor/async_compile.py
    try:
        assert any(thread.name == "tqdm_monitor" for thread in threading.enumerate())
        assert before.left_running() == []
    finally:
        if tqdm.tqdm.monitor is not None:
            tqdm.tqdm.monitor.exit()
            tqdm.tqdm.monitor = None


def test_an_idle_pool_is_no_concern_and_a_busy_one_is():
    before = Threads.running()
    with ThreadPoolExecutor(2) as pool:
        pool.submit(int).result()
        assert before.left_running() == []
        stop = threading.Event()
        pool.submit(stop.wait)
        (left,) = before.left_running()
        stop.set()
    assert "in wait" in left


def test_a_thread_that_ends_soon_is_waited_for():
    before = Threads.running()
    threading.Thread(target=time.sleep, args=(0.05,)).start()
    assert before.left_running() == []


def test_threads_of_torch_itself_are_exempt(tmp_path):
    # Code compiled under a file name inside torch stands for its compiler's own threads.
    stop = threading.Event()
    source = compile("def work(): stop.wait()", torch.__file__, "exec")
    scope = {"stop": stop}
    exec(source, scope)
    before = Threads.running()
    thread = threading.Thread(target=scope["work"])
    thread.start()
    left = before.left_running()
    stop.set()
    thread.join()
    assert left == []


SETTINGS = {
    "the default dtype": (
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_dtype(torch.float32),
    ),
    "the default device": (
        lambda: torch.set_default_device("meta"),
        lambda: torch.set_default_device(None),
    ),
    "grad mode": (
        lambda: torch.set_grad_enabled(False),
        lambda: torch.set_grad_enabled(True),
    ),
    "anomaly detection": (
        lambda: torch.autograd.set_detect_anomaly(True),
        lambda: torch.autograd.set_detect_anomaly(False),
    ),
    "autocast on cpu": (
        lambda: torch.set_autocast_enabled("cpu", True),
        lambda: torch.set_autocast_enabled("cpu", False),
    ),
    "deterministic algorithms": (
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(False),
    ),
    "what scaled_dot_product_attention may use": (
        lambda: torch.backends.cuda.enable_math_sdp(False),
        lambda: torch.backends.cuda.enable_math_sdp(True),
    ),
    "the flushing of subnormal numbers": (
        lambda: torch.set_flush_denormal(True),
        lambda: torch.set_flush_denormal(False),
    ),
    "torch's random state": (lambda: torch.rand(1), lambda: None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_changed_setting_is_named(name):
    change, back = SETTINGS[name]
    before = Settings.now(random=True)
    assert before.changes() == []
    change()
    try:
        said = before.changes()
    finally:
        back()
    assert any(s.startswith(f"changed {name}") for s in said)
    assert name == "torch's random state" or before.changes() == []


def test_the_random_state_is_left_alone_where_it_may_change():
    before = Settings.now(random=False)
    torch.rand(1)
    assert before.changes() == []


def test_a_watch_brings_it_all_together(monkeypatch):
    watch, settings = Watch.begin(), Settings.now(random=True)
    assert watch.complaints(settings) == []
    monkeypatch.setattr(torch, "zeros", None)
    torch.rand(1)
    assert watch.complaints(settings) == ["replaced torch.zeros", "changed torch's random state"]
