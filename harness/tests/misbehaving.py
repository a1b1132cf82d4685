"""Targets that misbehave, one function each, for the tests of the runners. The signature is
attnproof's own: (q, k, v) in, out (or out, lse) back."""

from __future__ import annotations

import _thread
import ctypes
import gc
import json
import math
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import torch

MARKER = "ATTNPROOF_TEST_MARKER"


def attention(q, k, v, *, scale=None, mask=None, bias=None, return_lse=False):
    """The good one."""
    scores = q.double() @ k.double().transpose(-1, -2)
    scores = scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    out = (torch.softmax(scores, -1) @ v.double()).to(q.dtype)
    return (out, torch.logsumexp(scores, -1).float()) if return_lse else out


def once(name):
    """True the first time in this process."""
    first = name not in _DONE
    _DONE.add(name)
    return first


_DONE: set[str] = set()


def segfault(q, k, v):
    ctypes.string_at(0)


def exits(q, k, v):
    print("leaving early")
    os._exit(0)


def raises_system_exit(q, k, v):
    sys.exit(0)


def raises_value_error(q, k, v):
    raise ValueError("head_dim 16 is not for me")


def declines(q, k, v):
    raise NotImplementedError("odd lengths are not supported")


def raises_unprintable(q, k, v):
    class Unprintable(Exception):
        def __str__(self):
            raise RuntimeError

    raise Unprintable


def raises_with_code_in_its_text(q, k, v):
    class Trap(BaseException):
        def __str__(self):
            raise SystemExit

    raise Trap


def raises_megabytes(q, k, v):
    raise ValueError("x" * 10_000_000)


def hangs(q, k, v):
    while True:
        pass


def sleeps(q, k, v):
    time.sleep(1000)


def hangs_deaf(q, k, v):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "1000"])
    print(f"grandchild {child.pid}", flush=True)
    time.sleep(1000)


def out_of_memory(q, k, v):
    return torch.empty(1 << 60)


def memory_error(q, k, v):
    return bytearray(1 << 60)


def kills_its_parent(q, k, v):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(0.2)
    return attention(q, k, v)


def kills_itself(q, k, v):
    os.kill(os.getpid(), signal.SIGKILL)


def prints_megabytes(q, k, v):
    for _ in range(100):
        print("x" * 100_000)
        print("y" * 100_000, file=sys.stderr)
    return attention(q, k, v)


def leaves_a_thread(q, k, v):
    threading.Thread(target=time.sleep, args=(1000,), name="straggler", daemon=True).start()
    return attention(q, k, v)


def leaves_a_hidden_thread(q, k, v):
    _thread.start_new_thread(time.sleep, (1000,))
    time.sleep(0.1)  # for it to start
    return attention(q, k, v)


def uses_a_thread(q, k, v):
    out = []
    worker = threading.Thread(target=lambda: out.append(attention(q, k, v)))
    worker.start()
    worker.join()
    return out[0]


def writes_late(q, k, v):
    out = torch.zeros_like(q)
    good = attention(q, k, v)

    def finish():
        time.sleep(0.05)
        out.copy_(good)

    threading.Thread(target=finish).start()
    return out


def dies_later(q, k, v):
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -ALRM {os.getpid()}"])
    return attention(q, k, v)


def sets_a_timer(q, k, v):
    signal.setitimer(signal.ITIMER_REAL, 1000.0)
    return attention(q, k, v)


def sets_a_trace_function(q, k, v):
    sys.settrace(lambda *_: None)
    return attention(q, k, v)


def sets_a_profile_function(q, k, v):
    sys.setprofile(lambda *_: None)
    return attention(q, k, v)


def lowers_a_limit(q, k, v):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    return attention(q, k, v)


def replaces_an_operator(q, k, v):
    replaces_an_operator.library = torch.library.Library("aten", "IMPL")
    replaces_an_operator.library.impl("softmax.int", lambda x, *_: x, "CPU")
    return attention(q, k, v)


def leaves_a_long_name(q, k, v):
    name = "n" * 5_000_000
    threading.Thread(target=time.sleep, args=(1000,), name=name, daemon=True).start()
    return attention(q, k, v)


def forks(q, k, v):
    """Both processes go on and answer, the copy a little later."""
    if not os.fork():
        time.sleep(0.05)
    return attention(q, k, v)


def forks_and_the_copy_raises(q, k, v):
    if not os.fork():
        sys.exit(3)
    return attention(q, k, v)


def forks_for_good(q, k, v):
    if not os.fork():
        time.sleep(1000)
    return attention(q, k, v)


def starts_a_program(q, k, v):
    subprocess.Popen(["sleep", "1000"])
    return attention(q, k, v)


def closes_every_file(q, k, v):
    out = attention(q, k, v)
    os.closerange(0, 1 << 12)
    return out


def closes_what_it_prints_to(q, k, v):
    for descriptor in (1, 2):
        os.close(descriptor)
    return attention(q, k, v)


def stops_itself(q, k, v):
    os.kill(os.getpid(), signal.SIGSTOP)


def stops_its_parent(q, k, v):
    os.kill(os.getppid(), signal.SIGSTOP)
    return attention(q, k, v)


def interrupts(q, k, v):
    raise KeyboardInterrupt


def changes_q(q, k, v):
    out = attention(q, k, v)
    q.data.mul_(2)
    return out


def changes_one_element_of_k(q, k, v):
    out = attention(q, k, v)
    k.detach()[0, 0, 3, 5] += 1
    return out


class ChangesGradOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return attention(q, k, v)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            taken = torch.autograd.grad(attention(*leaves), leaves, grad.clone())
        grad.zero_()
        return taken


def changes_grad_out(q, k, v):
    return ChangesGradOut.apply(q, k, v)


def replaces_torch_empty(q, k, v):
    torch.empty = torch.zeros
    return attention(q, k, v)


def replaces_the_clock(q, k, v):
    time.perf_counter = lambda: 0.0
    return attention(q, k, v)


def replaces_clone(q, k, v):
    torch.Tensor.clone = lambda self, **_: self
    return attention(q, k, v)


def replaces_autograd(q, k, v):
    torch.autograd.grad = lambda *_, **__: None
    return attention(q, k, v)


def changes_default_dtype(q, k, v):
    torch.set_default_dtype(torch.float64)
    return attention(q, k, v)


def turns_gradients_off(q, k, v):
    torch.set_grad_enabled(False)
    return attention(q, k, v)


def changes_threads(q, k, v):
    torch.set_num_threads(torch.get_num_threads() + 1)
    return attention(q, k, v)


def reseeds(q, k, v):
    torch.manual_seed(0)
    return attention(q, k, v)


def flushes_subnormals(q, k, v):
    torch.set_flush_denormal(True)
    return attention(q, k, v)


def stale(q, k, v):
    """Computes once, and answers that again."""
    if once("stale"):
        stale.first = attention(q, k, v)
    return stale.first.clone()


def same_buffer(q, k, v):
    if once("buffer"):
        same_buffer.out = torch.empty_like(q)
    return same_buffer.out.copy_(attention(q, k, v))


def out_is_q(q, k, v):
    return q


def out_is_a_view_of_v(q, k, v):
    return v.expand(q.shape)


class Lazy(torch.Tensor):
    """Computes when somebody looks."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        sys.stderr.write("looked at\n")
        return super().__torch_function__(func, types, args, kwargs or {})


def lazy(q, k, v):
    return attention(q, k, v).as_subclass(Lazy)


def meta(q, k, v):
    return q.to("meta")


class Bomb:
    """Leaves a mark in the process that unpickles it."""

    def __reduce__(self):
        return (os.putenv, (MARKER, "1"))


def bomb(q, k, v):
    return Bomb()


def seeks_the_answer(q, k, v):
    """Takes any tensor of the right shape that is not an input for the expected one."""
    given = {t.data_ptr() for t in (q, k, v)}
    for thing in gc.get_objects():
        alike = type(thing) is torch.Tensor and thing.shape == q.shape and thing.numel()
        if alike and thing.data_ptr() not in given:
            return thing.clone()
    return torch.full_like(q, 0.125)


def recognises_the_answer(q, k, v):
    """Looks through all tensors there are for one that it knows to be right."""
    right = attention(q, k, v)
    for thing in gc.get_objects():
        if (
            type(thing) is torch.Tensor
            and thing is not right
            and thing.numel() == right.numel()
            and torch.allclose(thing.reshape(-1).to(right.dtype), right.reshape(-1), atol=1e-3)
        ):
            return thing.clone()
    return torch.zeros_like(right)


def sockets():
    """The sockets of this process, those of the runner."""
    for descriptor in [d for d in range(3, 64) if is_socket(d)]:
        yield socket.socket(fileno=os.dup(descriptor))


def is_socket(descriptor):
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def forge(header, payload=b""):
    for connection in sockets():
        connection.sendall(json.dumps(header).encode() + b"\n" + payload)


def answer(tensor, **more):
    result = {
        "unsupported": None,
        "raised": None,
        "traceback": "",
        "complaints": [],
        "out_strides": None,
        "seconds": 0.0,
        "tensors": [tensor],
    }
    return {
        "serial": 1,
        "outcome": "answered",
        "reason": "",
        "tainted": False,
        "results": [result],
        **more,
    }


def forges_a_huge_shape(q, k, v):
    forge(answer({"role": "out", "dtype": "float32", "shape": [1 << 40]}))
    time.sleep(1000)


def forges_an_impossible_shape(q, k, v):
    forge(answer({"role": "out", "dtype": "float32", "shape": [0, 1 << 62, 1 << 62]}))
    time.sleep(1000)


def forges_too_few_bytes(q, k, v):
    forge(answer({"role": "out", "dtype": "float32", "shape": [4]}), b"1234")
    os._exit(0)


def forges_a_dtype(q, k, v):
    forge(answer({"role": "out", "dtype": "load", "shape": [4]}))
    time.sleep(1000)


def forges_nesting(q, k, v):
    for connection in sockets():
        connection.sendall(b"[" * 100_000 + b"\n")
    time.sleep(1000)


def forges_an_endless_line(q, k, v):
    for connection in sockets():
        while True:
            connection.sendall(b"x" * 100_000)


def forges_and_answers(q, k, v):
    """A well-formed answer of its own, followed by the true one."""
    forge(answer({"role": "out", "dtype": "float32", "shape": []}), b"1234")
    return attention(q, k, v)


def write_float(address, value):
    ctypes.memmove(address, ctypes.byref(ctypes.c_float(value)), 4)


def writes_past_k(q, k, v):
    write_float(k.data_ptr() + k.numel() * 4, 1.0)
    return attention(q, k, v)


def writes_before_v(q, k, v):
    write_float(v.data_ptr() - 4, 1.0)
    return attention(q, k, v)


def writes_into_gaps_of_q(q, k, v):
    write_float(q.data_ptr() + q.shape[-1] * 4, 1.0)
    return attention(q, k, v)


def reads_past_k(q, k, v):
    ctypes.string_at(k.data_ptr() + k.numel() * 4, 1)
    return attention(q, k, v)


def reads_before_q(q, k, v):
    ctypes.string_at(q.data_ptr() - 1, 1)
    return attention(q, k, v)


def uses_what_lies_past_k(q, k, v):
    beyond = ctypes.c_float.from_address(k.data_ptr() + k.numel() * 4).value
    return attention(q, k, v) + 0 * beyond


def writes_past_its_output(q, k, v):
    out = torch.empty_like(q)
    out.copy_(attention(q, k, v))
    ctypes.memset(out.data_ptr() + out.numel() * 4, 0, 16)
    return out


class WritesBeforeItsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q):
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        taken = torch.zeros_like(grad)
        ctypes.memset(taken.data_ptr() - 4, 0, 4)
        return taken.add_(grad)


def writes_before_its_gradient(q, k, v):
    return attention(WritesBeforeItsGradient.apply(q), k, v)


def never_writes_the_last_row(q, k, v):
    out = torch.empty_like(q)
    out[:, :, :-1] = attention(q, k, v)[:, :, :-1]
    return out


def returns_a_list_of_lists(q, k, v):
    return attention(q, k, v).tolist()


def nested(q, k, v):
    return torch.nested.nested_tensor(list(attention(q, k, v)))


def without_storage(q, k, v):
    out = attention(q, k, v)
    out.untyped_storage().resize_(0)
    return out


def half_of_its_storage(q, k, v):
    out = attention(q, k, v)
    out.untyped_storage().resize_(out.nbytes // 2)
    return out


def of_a_strange_dtype(q, k, v):
    return torch.zeros(q.shape, dtype=torch.uint16)


def parameter(q, k, v):
    return torch.nn.Parameter(attention(q, k, v))


def strided(q, k, v):
    return attention(q, k, v).transpose(1, 3).contiguous().transpose(1, 3)


def negated_lazily(q, k, v):
    return torch._neg_view(-attention(q, k, v))


def returns_an_expanded_scalar(q, k, v):
    return torch.zeros(1).expand(1 << 50)


def detached(q, k, v):
    return attention(q, k, v).detach()


def tells_a_variable(q, k, v):
    return attention(q, k, v) * 0 + float(os.environ[MARKER])


def prints_where_it_runs(q, k, v):
    return attention(q, k, v) * 0 + float(os.getpid())


def counts_threads(q, k, v):
    return attention(q, k, v) * 0 + float(torch.get_num_threads())


class Beside:
    """Elements beside a tensor on a GPU, for torch to wrap."""

    def __init__(self, tensor, offset, count):
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "<f4",
            "data": (tensor.data_ptr() + 4 * offset, False),
            "version": 3,
        }


def beside(tensor, offset, count):
    return torch.as_tensor(Beside(tensor, offset, count), device=tensor.device)


def writes_past_k_on_gpu(q, k, v):
    beside(k, k.numel(), 1).fill_(1)
    return attention(q, k, v)


def uses_what_lies_before_v_on_gpu(q, k, v):
    return attention(q, k, v) + 0 * beside(v, -1, 1)


def writes_past_its_output_on_gpu(q, k, v):
    out = torch.empty_like(q)
    out.copy_(attention(q, k, v))
    beside(out, out.numel(), 4).fill_(0)
    return out


class WritesBeforeItsGradientOnGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q):
        return q.clone()

    @staticmethod
    def backward(ctx, grad):
        taken = torch.zeros_like(grad)
        beside(taken, -1, 1).fill_(0)
        return taken.add_(grad)


def writes_before_its_gradient_on_gpu(q, k, v):
    return attention(WritesBeforeItsGradientOnGpu.apply(q), k, v)


def loses_the_gpu(q, k, v):
    beyond = torch.tensor([10**9], device=q.device)
    return q.flatten()[beyond] + attention(q, k, v)


def uses_the_default_stream(q, k, v):
    with torch.cuda.stream(torch.cuda.default_stream()):
        return attention(q, k, v)


def uses_a_stream_of_its_own_well(q, k, v):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = attention(q, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    return out


def reads_on_the_host(q, k, v):
    return attention(q * q.abs().max().item(), k, v)


def keeps_values_from_before(q, k, v):
    if once("kept"):
        keeps_values_from_before.q = q.clone()
    return attention(keeps_values_from_before.q, k, v)


def too_large_for_a_gpu(q, k, v):
    return torch.empty(1 << 44, device=q.device)
