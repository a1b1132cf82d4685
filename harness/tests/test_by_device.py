"""One name on two devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attn_reference.inputs import Attention, Inputs
from attn_reference.precision import EAGER, FLASH
from attn_reference.problem import Problem
from attnproof.backend import Backend, Capabilities, DeviceDependent
from attnproof.backends.by_device import ByDevice
from attnproof.inputs.make import make_inputs
from attnproof.signatures.common import FunctionBackend
from attnproof.targets import TargetSpec, describe, load


def zeros(inputs: Inputs, problem: Problem) -> Attention:
    return Attention(out=torch.zeros_like(inputs.q))


def nothing(inputs: Inputs, problem: Problem) -> Attention:
    raise AssertionError("that of the other device")


CPU = FunctionBackend(
    name="both",
    capabilities=Capabilities(dtypes=("fp32",), devices=("cpu",)),
    call=zeros,
    declared=EAGER,
)
CUDA = FunctionBackend(
    name="both",
    capabilities=Capabilities(dtypes=("bf16",), devices=("cuda",)),
    call=nothing,
    declared=FLASH,
)
BOTH = ByDevice(cpu=CPU, cuda=CUDA)


def test_it_is_a_backend_that_depends_on_the_device() -> None:
    assert isinstance(BOTH, Backend)
    assert isinstance(BOTH, DeviceDependent)
    assert not isinstance(CPU, DeviceDependent)
    assert BOTH.on_device("cpu") is CPU
    assert BOTH.on_device("cuda") is CUDA


def test_each_declaration_is_that_of_the_device() -> None:
    assert BOTH.name == "both"
    assert BOTH.capabilities == CPU.capabilities
    assert BOTH.precision("cpu") == EAGER
    assert BOTH.precision("cuda") == FLASH
    assert BOTH.availability("cpu") is None
    problem = Problem(seqlen_q=2, head_dim=8)
    assert not BOTH.attention(make_inputs(problem), problem).out.any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_the_one_on_cuda_is_not_available() -> None:
    assert "no CUDA device" in str(BOTH.availability("cuda"))


def test_a_target_is_loaded_for_a_device() -> None:
    flash = {device: load(TargetSpec("sdpa-flash"), device) for device in ("cpu", "cuda")}
    assert flash["cpu"].capabilities.dtypes == ("fp32", "fp16", "bf16")
    assert flash["cuda"].capabilities.dtypes == ("fp16", "bf16")
    assert describe(flash["cuda"], "cuda").capabilities == flash["cuda"].capabilities
    both = load(TargetSpec("sdpa-flash"))
    assert isinstance(both, DeviceDependent)


@pytest.mark.parametrize("name", ["sdpa-efficient", "sdpa-cudnn", "flex", "flashinfer", "xformers"])
def test_what_runs_on_cuda_alone_says_so_on_the_cpu(name: str) -> None:
    backend = load(TargetSpec(name), "cpu")
    assert backend.capabilities == replace(backend.capabilities, devices=("cuda",))
    assert backend.availability("cpu") is not None
