"""Tiles: those of every GPU fit its shared memory; those that are interpreted are bounded."""

import itertools

import pytest

from triton_attention import tiles, tiles_table
from triton_attention.tiles import GPUS, NO_GPU, WIDTHS, Kind, padded, padded_dims

DIMS = sorted({padded_dims(d, dv) for d, dv in itertools.product(range(1, 257), repeat=2)})
CHOICES = {
    "forward": (tiles.forward_tiles, "block_m", lambda kind: kind.padded_dim),
    "keys": (tiles.keys_tiles, "block_n", lambda kind: kind.both),
    "queries": (tiles.queries_tiles, "block_m", lambda kind: kind.both),
    "bias": (tiles.bias_tiles, "block_m", lambda kind: kind.both),
}


def kinds(gpu):
    for itemsize, (dim, dim_v), elementwise in itertools.product((2, 4), DIMS, (False, True)):
        yield Kind(
            gpu=gpu,
            itemsize=itemsize,
            padded_dim=dim,
            padded_dim_v=dim_v,
            elementwise=elementwise,
        )


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("capability", GPUS)
def test_tiles_fit_the_shared_memory(capability, name):
    """What stays in a loop, and once per stage what passes by: two tiles, and mask and bias."""
    gpu = GPUS[capability]
    choose, stays, columns = CHOICES[name]
    for kind, rows in itertools.product(kinds(gpu), (1, 16, 64, 4096)):
        chosen = choose(kind, rows, 4096)
        passes = chosen.block_n if stays == "block_m" else chosen.block_m
        passing = passes * (kind.padded_dim + kind.padded_dim_v)
        if kind.elementwise:
            passing += 2 * chosen.block_m * chosen.block_n
        staying = getattr(chosen, stays) * columns(kind)
        needed = (staying + chosen.num_stages * passing) * kind.itemsize
        assert needed <= gpu.shared_memory, (kind, chosen)
        for size in (chosen.block_m, chosen.block_n):
            assert size >= 16, (kind, chosen)  # the least that tl.dot takes
            assert size & (size - 1) == 0
        assert chosen.num_warps in (4, 8)
        assert chosen.num_stages >= 1
        if name == "forward" and rows <= 16:
            assert chosen.block_m == 16


@pytest.mark.parametrize("capability", GPUS)
def test_tiles_of_v1_fit_the_shared_memory(capability):
    """Blocks of q, dO, k, v and of O and dQ in fp32 at once."""
    for kind in kinds(GPUS[capability]):
        chosen = tiles.v1_tiles(kind, 4096, 4096)
        rows = chosen.block_m * kind.both * (kind.itemsize + 4)
        assert rows + chosen.block_n * kind.both * kind.itemsize <= kind.gpu.shared_memory


def test_less_shared_memory_makes_smaller_tiles():
    """The estimate is what decides: it can be exceeded."""
    kind = next(k for k in kinds(GPUS[90]) if k.padded_dim == 256 and k.itemsize == 2)
    small = Kind(**(vars(kind) | {"gpu": GPUS[86]}))
    assert tiles.forward_tiles(kind, 4096, 4096) != tiles.forward_tiles(small, 4096, 4096)


SIZES = (1, 16, 17, 32, 33, 64, 65, 129, 256)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dv", SIZES)
def test_padded_dims(d, dv):
    found = padded_dims(d, dv)
    for size, wide in zip((d, dv), found, strict=True):
        assert wide in WIDTHS
        assert wide >= size
    if max(d, dv) > 32:
        assert min(found) >= 64  # tiles of 32 and 64 columns do not meet in one kernel
        assert all(wide == max(64, padded(size)) for size, wide in zip((d, dv), found, strict=True))
    if d == dv:
        assert found == (padded(d), padded(d))


@pytest.mark.parametrize("length", [0, 1, 32, 255, 256, 257, 5000, 10**6])
def test_interpreted_tiles(length):
    kind = next(kinds(NO_GPU))
    found = [
        *(choose(kind, length, length) for choose, *_ in CHOICES.values()),
        tiles.v1_tiles(kind, length, length),
        tiles.rows_tiles(NO_GPU, length),
        tiles.elementwise_tiles(NO_GPU, length, length),
    ]
    for chosen in found:
        for block in (chosen.block_m, chosen.block_n):
            assert tiles.SMALLEST <= block <= tiles.LARGEST
            assert block & (block - 1) == 0
            # As few as make every loop turn, and no more than that.
            assert -(-length // block) <= max(8, -(-length // tiles.LARGEST))
            assert block == tiles.SMALLEST or -(-length // block) > 4


def test_interpreted_tiles_follow_each_length():
    chosen = tiles.forward_tiles(next(kinds(NO_GPU)), 40, 4000)
    assert (chosen.block_m, chosen.block_n) == (32, 512)


@pytest.mark.parametrize(
    ("programs", "keys", "splits"),
    [(1, 100, 1), (1, 256, 1), (1, 257, 2), (1, 10**6, 132), (66, 10**6, 2), (67, 10**6, 1)],
)
def test_splits_fill_the_gpu(programs, keys, splits):
    assert tiles.splits(programs, keys, GPUS[90]) == splits


def test_splits_of_nothing():
    assert tiles.splits(0, 0, GPUS[90]) == 1


@pytest.mark.parametrize(("group", "queries", "heads"), [(4, 16, 4), (4, 17, 1), (1, 1, 1)])
def test_few_queries_share_a_block(group, queries, heads):
    assert tiles.packed_heads(group, queries) == heads


def table(*rows):
    made = {"kernel": tiles_table.POINTERS, "direction": tiles_table.KEYS, "itemsize": 2}
    return [tiles_table.Row(**made | row) for row in rows]


def of(size):
    return tiles_table.Tiles(block_m=size, block_n=size)


def test_a_table_is_written_as_it_is_read(tmp_path):
    rows = tiles_table.read()
    assert {row.direction for row in rows} >= {"forward", "keys", "queries", "bias"}
    tiles_table.write(reversed(rows), tmp_path / "tiles.json")
    assert (tmp_path / "tiles.json").read_text() == tiles_table.PATH.read_text()


def test_what_fits_best_is_found(tmp_path, monkeypatch):
    rows = table(
        {"width": 128, "tiles": of(16)},
        {"width": 64, "tiles": of(32)},
        {"width": 64, "gpu": 90, "tiles": of(64)},
        {"width": 64, "gpu": 90, "rows": 1024, "tiles": of(128)},
    )
    tiles_table.write(rows, tmp_path / "tiles.json")
    read = tuple(tiles_table.read(tmp_path / "tiles.json"))
    monkeypatch.setattr(tiles_table, "_table", lambda: read)

    def found(gpu, width, count, itemsize=2):
        return tiles_table.find.__wrapped__("pointers", "keys", gpu, itemsize, width, count)

    assert found(80, 64, 1) == of(32)
    assert found(80, 128, 1) == of(16)
    assert found(90, 64, 1024) == of(128)
    assert found(90, 32, 1025) == of(64)
    assert found(90, 128, 1) is None  # it has rows of its own, none that wide
    assert found(80, 256, 1) is None
    assert found(80, 64, 1, itemsize=4) is None


def test_every_kind_has_tiles():
    for gpu, direction in itertools.product(GPUS.values(), ("forward", "keys", "queries", "bias")):
        for itemsize, width in itertools.product((2, 4), WIDTHS):
            arguments = ("pointers", direction, gpu.capability, itemsize, width, 1 << 20)
            assert tiles_table.find(*arguments) is not None, arguments
