"""Few queries: keys split between programs, and heads of a group that share a block of rows."""

import pytest
import torch

from triton_attention import attention, tiles
from triton_attention.arguments import Arguments
from triton_attention.v2_launches import Launches

from . import dense
from .making import HQ, SK, SQ, B, arguments, everything, packed, paged, qkv, rand, randn


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32)


CASES = {
    "plain": lambda sq: qkv(sq),
    "hidden-splits": lambda sq: qkv(sq, 300) | {"window": (20, 0), "causal": "top-left"},
    "hidden-rows": lambda sq: qkv(sq) | {"mask": (rand(B, HQ, sq, 1) < 0.5).expand(-1, -1, -1, SK)},
    "sinks": lambda sq: qkv(sq) | {"sinks": torch.tensor([0.0, 4.0, -torch.inf, 80.0])},
    "no-keys": lambda sq: qkv(sq) | {"key_lengths": lengths(0, 45), "sinks": randn(HQ)},
    "one-key": lambda sq: qkv(sq) | {"key_lengths": lengths(1, 33)},
    "together": lambda sq: qkv(sq) | everything(sq=sq) | {"dropout_p": 0.0},
    "packed": lambda sq: packed((sq, 0, 2), (SK, 50, 1)) | {"causal": "bottom-right"},
    "packed-sinks": lambda sq: packed((sq, 5), (SK, 40), behind=3) | {"sinks": randn(HQ)},
    "paged": lambda sq: paged((37, 80), 3, sq) | {"alibi_slopes": rand(HQ)},
}


def launched(given, splits):
    options = {n: value for n, value in given.items() if not n.startswith("return_")}
    result = Launches(Arguments(**options)).forward(splits=splits)
    assert len(result.launches) == (1 if splits == 1 else 2)
    return result.run()


@pytest.mark.parametrize("splits", [2, 3, 9])
@pytest.mark.parametrize("sq", [3, SQ], ids=["few-queries", "many-queries"])
@pytest.mark.parametrize("case", CASES)
def test_splits_change_nothing(case, sq, splits, device):
    given = arguments(device, **CASES[case](sq))
    one, several = launched(given, 1), launched(given, splits)
    expected = {name: dense.exact(tensor) for name, tensor in one.items()}
    measured = dense.errors(several, expected)
    assert max(measured.values()) <= dense.TOLERANCE[torch.float32], measured
    plain = {n: dense.exact(t) for n, t in given.items() if not n.startswith("return_")}
    truth = dict(zip(("out", "lse"), dense.attention(**plain), strict=True))
    measured = dense.errors(several, truth)
    assert max(measured.values()) <= dense.TOLERANCE[torch.float32], measured


@pytest.mark.parametrize("dtype", dense.TOLERANCE, ids=str)
def test_splits_are_taken_where_there_are_few_programs(dtype, device):
    given = arguments(device, dtype, **qkv(1, 600, b=1), sinks=randn(HQ), causal="bottom-right")
    options = {n: value for n, value in given.items() if not n.startswith("return_")}
    assert len(Launches(Arguments(**options)).forward().launches) == 2
    dense.check(attention, given)


def test_dropout_of_splits(device):
    dense.check(attention, arguments(device, **qkv(2, 600, b=1), dropout_p=0.3))


@pytest.mark.parametrize("case", [*CASES, "dropout"])
@pytest.mark.parametrize("sq", [1, 3, 16])
def test_packed_heads_change_nothing(case, sq, device, monkeypatch):
    made = qkv(sq) | {"dropout_p": 0.3} if case == "dropout" else CASES[case](sq)
    given = arguments(device, **made)
    found = []
    for pack in (True, False):
        if not pack:
            monkeypatch.setattr(tiles, "packed_heads", lambda group, seqlen_q: 1)
        torch.manual_seed(1)
        found.append(attention(**given))
        options = {n: value for n, value in given.items() if not n.startswith("return_")}
        launch = Launches(Arguments(**options), torch.zeros(1, device=device)).forward().launches[0]
        assert launch.arguments["shape"].pack == (2 if pack else 1)
    packed_heads, one_by_one = (dict(zip(("out", "lse"), f[:2], strict=True)) for f in found)
    expected = {name: dense.exact(tensor) for name, tensor in one_by_one.items()}
    measured = dense.errors(packed_heads, expected)
    assert max(measured.values()) <= dense.TOLERANCE[torch.float32], measured
    if case == "dropout":
        assert torch.equal(found[0][2], found[1][2])
