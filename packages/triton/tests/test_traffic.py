"""What the kernels access and compute, counted, is what the closed forms say."""

import importlib.util
from dataclasses import replace
from inspect import getsource
from itertools import product

import pytest
import torch
import triton

from attnproof.traffic.sources import Setting
from online_softmax import traffic as steps
from triton_attention import attnproof_backend, interpreter, v1, v2_launches
from triton_attention.closed_forms import formula
from triton_attention.interpreter import OutOfBounds
from triton_attention.kernels import v1_forward, v2_backward, v2_forward
from triton_attention.traffic import V1, V2, Workload, block_for, count, launches

pytestmark = pytest.mark.skipif(
    not interpreter.enabled(), reason="kernels are compiled, and not counted"
)
PASSES = [(name, backward) for name in (V1, V2) for backward in (False, True)]
LENGTHS = (1, 15, 16, 40, 64, 100)  # blocks of 16 and 32 divide them and do not
HEAD_DIMS = (16, 24, 64)  # 24 is padded


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize(("name", "backward"), PASSES)
def test_counts_are_the_closed_forms(name, backward, seqlen, causal):
    for head_dim, dtype, block in product(HEAD_DIMS, ("fp32", "fp16", "bf16"), (16, 32)):
        load = Workload(seqlen=seqlen, head_dim=head_dim, dtype=dtype, causal=causal, block=block)
        assert count(name, load, backward) == formula(name, load, backward), load


@pytest.mark.parametrize(
    ("head_dim", "on_chip", "block"),
    [
        (16, 1024, 16),  # four times 16 x 16
        (16, 2047, 16),
        (16, 4096, 64),
        (4, 4096, 64),  # S of 64 x 64
        (64, 32768, 128),
        (96, 32768, 64),  # 85 rows would fit
        (1, 256, 16),
    ],
)
def test_tiles_fit_on_the_chip(head_dim, on_chip, block):
    assert block_for(head_dim, on_chip) == block


@pytest.mark.parametrize(("head_dim", "least"), [(1, 256), (16, 1024), (256, 16384)])
def test_a_chip_too_small_is_refused(head_dim, least):
    assert block_for(head_dim, least) == 16
    with pytest.raises(ValueError, match=f"on_chip={least - 1}: accepted is {least} elements"):
        block_for(head_dim, least - 1)


SETTING = Setting(seqlen=96, head_dim=16, on_chip=2048)
SOURCES = {source.name: source for source in attnproof_backend.traffic}


@pytest.mark.parametrize(("name", "backward"), PASSES)
def test_what_takes_too_many_tiles_is_not_run(monkeypatch, name, backward):
    source, setting = SOURCES[name], replace(SETTING, backward=backward, causal=True)
    monkeypatch.setattr(attnproof_backend, "FEW_TILES", 9)
    counted = source.count(setting)
    monkeypatch.setattr(attnproof_backend, "FEW_TILES", 8)
    by_formula = source.count(setting)
    assert (counted.ran, by_formula.ran) == (True, False)
    assert counted.as_dict() == by_formula.as_dict()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"on_chip": 1023}, "on_chip=1023: accepted is 1024 elements or more, 16 rows of each of"),
        ({"head_dim": 257}, "head_dim=257: accepted is 1 to 256"),
        ({"head_dim": 0}, "head_dim=0: accepted is 1 to 256"),
    ],
)
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_what_there_are_no_kernels_for(source, change, reason):
    assert source.unsupported(SETTING) is None
    setting = replace(SETTING, **change)
    assert source.unsupported(setting).startswith(reason)
    with pytest.raises(ValueError, match=reason):
        source.count(setting)


LOAD = Workload(seqlen=96, head_dim=16, dtype="fp16", block=32)  # 9 tiles


def test_the_order_of_accesses():
    assert count(V1, LOAD).lines == (
        "store O", "store l", "store m",  # line 2
        "load K", "load V",  # line 6
        "load Q", "load O", "load l", "load m",  # line 8
    )  # fmt: skip
    assert count(V2, LOAD).lines == ("load Q", "load K", "load V", "store O", "store LSE")


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_v1_reads_and_writes_o_once_per_block_of_keys_and_v2_writes_it_once(blocks):
    load = replace(LOAD, seqlen=16 * blocks, block=16)
    o = load.seqlen * load.head_dim
    first, second = count(V1, load), count(V2, load)
    assert (first.loads["O"], first.stores["O"]) == (blocks * o, (1 + blocks) * o)  # and zeros
    assert (second.loads.get("O", 0), second.stores["O"]) == (0, o)


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_v1_adds_dq_up_in_memory_and_v2_writes_it_once(blocks):
    load = replace(LOAD, seqlen=16 * blocks, block=16)
    dq = load.seqlen * load.head_dim
    first, second = (count(name, load, backward=True) for name in (V1, V2))
    assert (first.loads["dQ"], first.stores["dQ"]) == (blocks * dq, (1 + blocks) * dq)
    assert (second.loads.get("dQ", 0), second.stores["dQ"]) == (0, dq)
    # What V2 pays for that, and for the same bits every time: S and dP twice.
    assert (first.matmul, second.matmul) == tuple(n * 2 * 16**3 * blocks**2 for n in (5, 7))


def step(name, load, backward=False):
    """The same by online_softmax, in plain torch in a memory that counts."""
    work = steps.Workload(
        seqlen_q=load.seqlen, seqlen_k=load.seqlen, head_dim=load.head_dim, dtype=load.dtype,
        causal=load.causal, block_q=load.block, block_k=load.block,
    )  # fmt: skip
    return steps.count(name, work, backward)


def difference(more, less):
    """Operations by kind that one computes more often than the other, or, negative, less often."""
    kinds = more.other.keys() | less.other.keys()
    by_kind = {kind: more.other.get(kind, 0) - less.other.get(kind, 0) for kind in kinds}
    return {kind: number for kind, number in by_kind.items() if number}


@pytest.mark.parametrize("seqlen", [96, 100])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_v1_is_the_step_of_the_same_name(seqlen, causal, dtype):
    """But for the LSE, which the paper's V1 does not compute: it hands on l and m."""
    load = replace(LOAD, seqlen=seqlen, causal=causal, dtype=dtype)
    here, there = count(V1, load), step("tiled-v1", load)
    assert (here.loads, here.stores, here.lines) == (there.loads, there.stores, there.lines)
    assert (here.load_bytes, here.store_bytes) == (there.load_bytes, there.store_bytes)
    if seqlen % load.block == 0:  # nothing is computed beyond
        assert here.matmul == there.matmul
        assert difference(there, here) == {"add": seqlen, "log": seqlen}
    else:
        assert here.matmul > there.matmul

    here, there = count(V1, load, backward=True), step("tiled-v1", load, backward=True)
    assert (here.loads, here.stores) == (there.loads, there.stores)
    if seqlen % load.block == 0:
        assert here.matmul == there.matmul
        # D is subtracted, where the step adds dLSE - D.
        tiles = (seqlen // load.block) ** 2
        scores, rows = tiles * load.block**2, tiles * load.block
        assert difference(here, there) == {"sub": scores, "add": -scores, "neg": -rows}


@pytest.mark.parametrize("seqlen", [96, 100])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_v2_is_the_step_of_the_same_name(seqlen, causal, dtype):
    """But for powers of two in the place of e, and additions to O that the products do."""
    load = replace(LOAD, seqlen=seqlen, causal=causal, dtype=dtype)
    here, there = count(V2, load), step("tiled-v2", load)
    assert (here.loads, here.stores, here.lines) == (there.loads, there.stores, there.lines)
    assert (here.load_bytes, here.store_bytes) == (there.load_bytes, there.store_bytes)
    if seqlen % load.block:
        assert here.matmul > there.matmul
        return
    assert here.matmul == there.matmul
    blocks = seqlen // load.block
    rows = (blocks * (blocks + 1) // 2 if causal else blocks**2) * load.block
    assert difference(here, there) == {
        "exp2": there.other["exp"],
        "exp": -there.other["exp"],
        "log2": seqlen,
        "log": -seqlen,
        "mul": rows + seqlen,  # every maximum, and the LSE, from one base to the other
        "add": -rows * load.head_dim,
    }


def test_causality_halves_what_v2_computes_and_not_what_v1_does():
    load = replace(LOAD, seqlen=10 * 16, block=16)
    for name, backward in PASSES:
        full, causal = (count(name, replace(load, causal=c), backward) for c in (False, True))
        assert causal.matmul * 100 == full.matmul * (55 if name == V2 else 100)


# Faults that are planted: what they load or compute too often must show.


def variant(module, tmp_path, old, new):
    """A kernel module with a line that is different."""
    source = getsource(module)
    assert source.count(old) == 1
    file = tmp_path / "planted.py"
    file.write_text(source.replace(old, new), "utf-8")
    spec = importlib.util.spec_from_file_location("triton_attention.kernels.planted", file)
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    return planted


def test_v_that_is_loaded_twice_shows(monkeypatch, tmp_path):
    line = "            m_tile = tl.max(s, 1)  # line 10\n"
    again = "v_j = load_rows(v_start, wide_j * v.row, v.column, j < seqlen_k, HEAD_DIM_V, PADDED_V)"
    planted = variant(v1_forward, tmp_path, line, f"{line}            {again}\n")
    monkeypatch.setattr(v1, "forward", planted.forward)
    counted, right = count(V1, LOAD), formula(V1, LOAD)
    wrong = {tensor for tensor, number in right.loads.items() if counted.loads[tensor] != number}
    assert wrong == {"V"}
    assert counted.loads["V"] == (1 + 3) * right.loads["V"]
    assert (counted.stores, counted.matmul) == (right.stores, right.matmul)


@triton.jit
def everything(first, last, place, shape, BLOCK):
    """In the place of key_range: no block is skipped, and each is masked."""
    return 0, 0, 0, place.len_k


@pytest.mark.parametrize(("module", "backward"), [(v2_forward, False), (v2_backward, True)])
def test_tiles_that_are_not_skipped_show(monkeypatch, module, backward):
    load = replace(LOAD, causal=True)
    right = count(V2, load, backward)
    monkeypatch.setattr(module, "key_range", everything)
    counted = count(V2, load, backward)
    assert counted != formula(V2, load, backward) == right
    # All 9 tiles in the place of 6; of backward those of dQ, 3 products each beside 4 of 6.
    products = (4 * 6 + 3 * 9, 7 * 6) if backward else (9, 6)
    assert counted.matmul * products[1] == right.matmul * products[0]


def test_a_division_in_every_step_shows(monkeypatch, tmp_path):
    line = "        m = m_new\n"
    planted = variant(v2_forward, tmp_path, line, line + "        acc = acc / 1.0\n")
    monkeypatch.setattr(v2_launches, "forward", planted.forward)
    counted, right = count(V2, LOAD), formula(V2, LOAD)
    assert difference(counted, right) == {"div": 9 * LOAD.block * LOAD.head_dim}
    assert replace(counted, other=right.other) == right


# Accesses out of bounds


def tensors(launch):
    """The tensors of a launch, by the name that they are passed under."""
    return {
        name: argument
        for name, argument in launch.arguments.items()
        if isinstance(getattr(argument, "ptr", argument), torch.Tensor)
    }


@pytest.mark.parametrize("seqlen", [40, 64])
@pytest.mark.parametrize(("name", "backward"), PASSES)
def test_a_tensor_that_is_a_row_too_short_is_noticed(name, backward, seqlen):
    """Of every tensor of every launch, whether tiles end with the last row or go beyond."""
    load = replace(LOAD, seqlen=seqlen)
    for launch in launches(name, load, backward).launches:
        launch.run()
        given = tensors(launch)
        assert len(given) >= 3
        for passed_as, argument in given.items():
            tensor = getattr(argument, "ptr", argument)
            short = tensor[:, :, : seqlen - 1]
            row = load.head_dim if tensor.dim() == 4 else 1
            if isinstance(argument, tuple):
                short = argument._replace(ptr=short)
            beyond = f"{passed_as} in program .*: {row} elements? beyond its last"
            with pytest.raises(OutOfBounds, match=f"^(load|store) {beyond}"):
                replace(launch, arguments={**launch.arguments, passed_as: short}).run()
