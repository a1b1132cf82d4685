"""When the kernels for Hopper are chosen, and with what. What they compute, a GPU says."""

import pytest
import torch

from triton_attention.arguments import Arguments
from triton_attention.hopper_launches import suits
from triton_attention.kernels import hopper_backward, hopper_forward, v2_backward, v2_forward
from triton_attention.tiles import GPUS
from triton_attention.tiles_table import FORWARD, HOPPER, find
from triton_attention.v2_launches import Launches


def tensors(seqlen_q=200, seqlen_k=300, dim=64, dim_v=64, dtype=torch.bfloat16, heads_kv=4):
    q = torch.empty(2, 4, seqlen_q, dim, dtype=dtype)
    k = torch.empty(2, heads_kv, seqlen_k, dim, dtype=dtype)
    v = torch.empty(2, heads_kv, seqlen_k, dim_v, dtype=dtype)
    return {"q": q, "k": k, "v": v}


def launches(gpu=90, hopper=True, **arguments):
    return Launches(Arguments(**arguments), gpu=GPUS[gpu], hopper=hopper)


def kernels(result):
    return [launch.kernel for launch in result.launches]


SUITED = [
    tensors(),
    tensors(dtype=torch.float16, heads_kv=2),
    tensors(dim=128, dim_v=40) | {"causal": "bottom-right"},
    tensors(seqlen_k=1) | {"causal": "top-left"},
    tensors() | {"window": (20, None)},
    tensors() | {"q": torch.empty(2, 200, 4, 64, dtype=torch.bfloat16).transpose(1, 2)},
]


@pytest.mark.parametrize("arguments", SUITED)
def test_dense_sequences_with_a_band_are_for_the_kernels_of_hopper(arguments):
    made = launches(**arguments)
    assert kernels(made.forward(splits=1)) == [hopper_forward.forward]
    assert kernels(launches(hopper=False, **arguments).forward(splits=1)) == [v2_forward.forward]
    assert kernels(launches(gpu=80, **arguments).forward(splits=1)) == [v2_forward.forward]
    assert kernels(launches(gpu=100, **arguments).forward(splits=1)) == [v2_forward.forward]


OTHERS = {
    "fp32": tensors(dtype=torch.float32),
    "few queries": tensors(seqlen_q=16),
    "narrow heads": tensors(dim=32, dim_v=32),
    "rows not aligned": tensors(dim=36),
    "softcap": tensors() | {"softcap": 5.0},
    "negative scale": tensors() | {"scale": -0.5},
    "sinks": tensors() | {"sinks": torch.zeros(4)},
    "mask": tensors() | {"mask": torch.ones(200, 300, dtype=torch.bool)[None, None]},
    "key lengths": tensors() | {"key_lengths": torch.tensor([300, 20], dtype=torch.int32)},
    "dropout": tensors() | {"dropout_p": 0.5},
    "one head for all": tensors()
    | {"k": torch.empty(2, 1, 300, 64, dtype=torch.bfloat16).expand(2, 4, 300, 64)},
    "columns apart": tensors()
    | {"q": torch.empty(2, 4, 64, 200, dtype=torch.bfloat16).transpose(2, 3)},
    "an offset": tensors()
    | {"q": torch.empty(2 * 4 * 200 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 4, 200, 64)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_is_for_the_others(name):
    assert not suits(Arguments(**OTHERS[name]))


def test_few_programs_share_keys_instead():
    arguments = tensors(seqlen_q=64, seqlen_k=65536)
    assert len(launches(**arguments).forward().launches) == 2  # and combine
    assert kernels(launches(**arguments).forward(splits=1)) == [hopper_forward.forward]


def test_a_grid_and_its_descriptors():
    arguments = tensors(seqlen_q=1000, dim=96, dim_v=128) | {"causal": "bottom-right"}
    (launch,) = launches(**arguments).forward(splits=1).launches
    tiles = find(HOPPER, FORWARD, 90, 2, 128, 1000)
    rows = 64 * tiles.consumers
    assert launch.grid == (-(-1000 // rows) * 4 * 2,)
    q, k = launch.arguments["q"], launch.arguments["k"]
    assert q.block_shape == [1, 1, 64, 128]  # 96 columns, and 32 of zeros
    assert k.block_shape == [1, 1, tiles.passing, 128]
    assert list(q.shape) == [2, 4, 1000, 96]


def test_gradients_that_come_in_any_layout():
    made = launches(**tensors())
    out, lse = torch.empty(2, 4, 200, 64, dtype=torch.bfloat16), torch.empty(2, 4, 200)
    expanded = torch.ones(1, dtype=torch.bfloat16).expand(out.shape)
    result = made.backward(out, lse, expanded, None, {"q", "k", "v"})
    assert kernels(result) == [
        v2_backward.delta,
        hopper_backward.keys_and_values,
        hopper_backward.queries,
    ]
    assert result.launches[1].arguments["grad_out"].strides == [4 * 200 * 64, 200 * 64, 64, 1]


def test_wide_heads_have_backward_with_pointers():
    made = launches(**tensors(dim=256, dim_v=256))
    out, lse = torch.empty(2, 4, 200, 256, dtype=torch.bfloat16), torch.empty(2, 4, 200)
    result = made.backward(out, lse, out, None, {"k"})
    assert kernels(result) == [v2_backward.delta, v2_backward.keys_and_values]
