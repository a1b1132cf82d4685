"""Arithmetic of interpreted kernels against torch, and that Triton's interpreter has it wrong."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from triton_attention import interpreter

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EVERY_BF16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(bf16)
SHUFFLED_BF16 = EVERY_BF16[torch.randperm(2**16, generator=torch.Generator().manual_seed(1))]


@triton.jit
def elementwise(x, y, z, out, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    result = OPERATION(tl.load(x + i), tl.load(y + i), tl.load(z + i))
    tl.store(out + i, result.to(out.dtype.element_ty))


def compute(operation, x, y=None, z=None, dtype=None):
    out = torch.empty_like(x, dtype=dtype)
    arguments = {"x": x, "y": x if y is None else y, "z": x if z is None else z, "out": out}
    interpreter.run(elementwise, (1,), {**arguments, "OPERATION": operation, "BLOCK": x.numel()})
    return out


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def first(x, y, z):
    return x


@triton.jit
def second_cast_to_x(x, y, z):
    return y.to(x.dtype)


@triton.jit
def add(x, y, z):
    return x + y


@triton.jit
def sub(x, y, z):
    return x - y


@triton.jit
def mul(x, y, z):
    return x * y


@triton.jit
def div(x, y, z):
    return x / y


@triton.jit
def rem(x, y, z):
    return x % y


@triton.jit
def fma(x, y, z):
    return tl.fma(x, y, z)


@triton.jit
def maximum(x, y, z):
    return tl.maximum(x, y)


@triton.jit
def maximum_of_nan(x, y, z):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x, y, z):
    return tl.minimum(x, y)


@triton.jit
def minimum_of_nan(x, y, z):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamped(x, y, z):
    return tl.clamp(x, y, z)


@triton.jit
def negative(x, y, z):
    return -x


@triton.jit
def magnitude(x, y, z):
    return tl.abs(x)


@triton.jit
def less(x, y, z):
    return x < y


@triton.jit
def unequal(x, y, z):
    return x != y


@triton.jit
def halved(x, y, z):
    return x * 0.5 + 1.5


@triton.jit
def chosen(x, y, z):
    return tl.where(tl.arange(0, x.shape[0]) % 2 == 0, x, y)


@triton.jit
def moved(x, y, z):
    square = tl.trans(tl.reshape(x, [256, 256]))[:, None, :]
    return tl.reshape(tl.trans(tl.reshape(square, [256, 256])), [65536])


def of_numbers(operation, x, y):
    """NaN is dropped, also one that signals, which torch.fmax keeps."""
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, operation(x, y)))


BF16 = {
    add: torch.add,
    sub: torch.sub,
    mul: torch.mul,
    div: torch.div,
    rem: lambda x, y: torch.fmod(x.double(), y.double()).to(bf16),
    fma: lambda x, y: (x.double() * y.double() + x.double()).float().to(bf16),
    maximum: lambda x, y: of_numbers(torch.maximum, x, y),
    maximum_of_nan: torch.maximum,
    minimum: lambda x, y: of_numbers(torch.minimum, x, y),
    minimum_of_nan: torch.minimum,
    negative: lambda x, y: 0 - x,
    magnitude: lambda x, y: x.abs(),
    less: lambda x, y: (x < y).to(bf16),
    unequal: lambda x, y: (x != y).to(bf16),
    halved: lambda x, y: (x * 0.5) + 1.5,
}


@pytest.mark.parametrize("operation", BF16, ids=lambda operation: operation.__name__)
def test_bf16_computes_in_fp32_and_rounds_once(operation):
    found = compute(operation, EVERY_BF16, SHUFFLED_BF16)
    assert_same(found, BF16[operation](EVERY_BF16, SHUFFLED_BF16))


@pytest.mark.parametrize("operation", [first, moved], ids=["loaded and stored", "reshaped"])
def test_bits_of_bf16_are_carried_unchanged(operation):
    found = compute(operation, EVERY_BF16)
    assert torch.equal(found.view(torch.int16), EVERY_BF16.view(torch.int16))


def test_bits_of_bf16_are_selected_unchanged():
    found = compute(chosen, EVERY_BF16, SHUFFLED_BF16).view(torch.int16)
    x, y = EVERY_BF16.view(torch.int16), SHUFFLED_BF16.view(torch.int16)
    assert torch.equal(found[::2], x[::2])
    assert torch.equal(found[1::2], y[1::2])


def random_bits(dtype, integer):
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(2))
    return bits.to(integer).view(dtype)


FLOATS = {
    bf16: EVERY_BF16,
    fp16: EVERY_BF16.view(fp16),
    fp32: random_bits(fp32, torch.int32),
    fp64: random_bits(fp32, torch.int32).double(),
}


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_floats_are_cast_as_torch_does(source, target):
    values = FLOATS[source]
    assert_same(compute(first, values, dtype=target), values.to(target))


def test_fp64_is_cast_to_bf16_at_once():
    above_a_tie = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=fp64)  # a tie as fp32
    assert compute(first, above_a_tie, dtype=bf16) == 1 + 2.0**-7


@pytest.mark.parametrize("integer", [torch.int32, torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_are_cast_to_bf16_and_back_as_torch_does(integer):
    values = torch.randint(-(2**31), 2**31, (2**10,), generator=torch.Generator().manual_seed(3))
    values = values.to(integer)
    assert_same(compute(first, values, dtype=bf16), values.to(bf16))
    small = torch.arange(-128.0, 128.0).to(bf16) * 0.75
    if integer.is_signed:
        assert_same(compute(first, small, dtype=integer), small.to(integer))


def test_tritons_own_interpreter_gets_bf16_wrong():
    x, y = torch.rand(2**10), torch.rand(2**10).to(bf16)
    out = torch.empty_like(y)
    arguments = {"x": x, "y": x, "z": x, "out": out, "BLOCK": x.numel()}
    elementwise[(1,)](**arguments, OPERATION=first)
    assert not torch.equal(out, x.to(bf16)), "casts truncate"
    arguments |= {"x": y, "y": y, "z": y}
    elementwise[(1,)](**arguments, OPERATION=add)
    assert not torch.equal(out, y + y), "bits are added"


def test_fp16_and_fp32_arithmetic_rounds_once():
    x, y = (random_bits(fp16, torch.int16) for _ in range(2))
    assert_same(compute(add, x, y.flip(0)), x + y.flip(0))
    tiny = torch.full((16,), 1 + 2.0**-12)
    exact = tiny.double() * tiny.double() - 1
    assert_same(compute(fma, tiny, tiny, torch.full((16,), -1.0)), exact.float())


def test_clamp_drops_nan():
    x = torch.tensor([float("nan"), -5.0, 0.5, 5.0])
    found = compute(clamped, x, torch.zeros(4), torch.ones(4))
    assert found.tolist() == [0.0, 0.0, 0.5, 1.0]


@triton.jit
def product(
    a, b, c, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    left, right = tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n)
    places = m * N + n
    acc = tl.load(c + places)
    acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    tl.store(out + places, acc)


def multiply(a, b, c, precision="ieee"):
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty_like(c)
    arguments = {"a": a, "b": b, "c": c, "out": out, "M": m, "N": n, "K": k}
    interpreter.run(product, (1,), {**arguments, "PRECISION": precision})
    return out


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=str)
def test_dot_adds_up_in_fp32(dtype):
    # Integers whose products and sums are exact in fp32, and neither in bf16 nor in fp16.
    a, b = (torch.randint(-100, 100, shape).to(dtype) for shape in ((16, 32), (32, 64)))
    c = torch.randint(-(2**20), 2**20, (16, 64)).float()
    assert_same(multiply(a, b, c), (a.double() @ b.double() + c.double()).float())


def test_dot_adds_to_fp16_in_fp16():
    a, b, c = torch.ones(16, 16).half(), torch.ones(16, 16).half(), torch.full((16, 16), 2048.0)
    a[0] = 0.0625
    found = multiply(a, b, c.half())
    assert found[0, 0] == 2048
    assert found[1, 1] == 2064


@pytest.mark.parametrize(("precision", "kept"), [("ieee", True), ("tf32", False), ("tf32x3", True)])
def test_tf32_rounds_fp32_operands_to_ten_bits(precision, kept):
    a = torch.eye(16) * (1 + 2.0**-12)
    found = multiply(a, torch.eye(16), torch.zeros(16, 16), precision)
    assert_same(found, a if kept else torch.eye(16))


@triton.jit
def reductions(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tile = tl.load(x + i[:, None] * COLUMNS + j[None, :])
    tl.store(out + i, tl.sum(tile, 1).to(tl.float32))
    tl.store(out + ROWS + i, tl.max(tile, axis=-1).to(tl.float32))
    tl.store(out + 2 * ROWS + i[:, None], tl.min(tile, 1, keep_dims=True).to(tl.float32))
    tl.store(out + 3 * ROWS, tl.sum(tile).to(tl.float32))
    tl.store(out + 3 * ROWS + 1, tl.max(tile).to(tl.float32))
    tl.store(out + 3 * ROWS + 2 + j, tl.max(tile, 0).to(tl.float32))


def reduce(x):
    rows, columns = x.shape
    out = torch.empty(3 * rows + 2 + columns)
    arguments = {"x": x, "out": out, "ROWS": rows, "COLUMNS": columns}
    interpreter.run(reductions, (1,), arguments)
    return out.split([rows, rows, rows, 1, 1, columns])


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32, torch.int32, torch.int8], ids=str)
def test_reductions(dtype):
    x = torch.randint(-100, 100, (8, 4), generator=torch.Generator().manual_seed(4)).to(dtype)
    exact = x.double()
    sums, maxima, minima, total, top, down = reduce(x)
    assert_same(maxima, exact.amax(1).float())
    assert_same(minima, exact.amin(1).float())
    assert_same(top, exact.amax().float()[None])
    assert_same(down, exact.amax(0).float())
    if dtype is bf16:
        assert_same(sums, ((x[:, 0] + x[:, 1]) + (x[:, 2] + x[:, 3])).float())
    else:
        assert_same(sums, exact.sum(1).float())
        assert_same(total, exact.sum().float()[None])


def test_sums_of_fp16_round_every_addition():
    sums, *_ = reduce(torch.tensor([[2048.0, 1.0, 1.0, 1.0]]).half())
    assert sums == 2050  # 2048 + 1 rounds to 2048, then 2 are added


def test_sums_of_int32_wrap():
    sums, *_ = reduce(torch.full((2, 2), 2**30, dtype=torch.int32))
    assert sums.tolist() == [-(2**31), -(2**31)]


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=str)
def test_maxima_drop_nan_unless_there_is_nothing_else(dtype):
    nan = float("nan")
    x = torch.tensor([[nan, 1.0], [2.0, nan], [nan, nan], [3.0, float("-inf")]]).to(dtype)
    sums, maxima, minima, *_ = reduce(x)
    assert_same(maxima, torch.tensor([1.0, 2.0, nan, 3.0]))
    assert_same(minima, torch.tensor([1.0, 2.0, nan, float("-inf")]))
    assert_same(sums, torch.tensor([nan, nan, nan, float("-inf")]))


@triton.jit
def promotions(x, out):
    single, double = tl.load(x + tl.arange(0, 4)), tl.load(x).to(tl.float64)
    short, narrow = single.to(tl.bfloat16), tl.arange(0, 4)
    wide = narrow.to(tl.int64)
    tl.static_assert((short / short).dtype == tl.float32)
    tl.static_assert((short * 0.1).dtype == tl.bfloat16)
    tl.static_assert((short * single).dtype == tl.float32)
    tl.static_assert((narrow + wide).dtype == tl.int64)
    tl.static_assert((narrow * 0.5).dtype == tl.float32)
    tl.static_assert((narrow + single).dtype == tl.float32)
    tl.static_assert((single * double).dtype == tl.float64)
    tl.static_assert((single < 1).dtype == tl.int1)
    tl.store(out, double * 0.1)


def test_operands_are_promoted_as_triton_does():
    out = torch.zeros(1, dtype=fp64)
    interpreter.run(promotions, (1,), {"x": torch.ones(4), "out": out})
    assert out == 0.1


@triton.jit
def both(x0, y0, x1, y1):
    return x0 + x1, y0 * y1


@triton.jit
def general(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    total, product = tl.reduce((value, value), 0, both)
    tl.store(out, total)
    tl.store(out + 1, product)
    tl.store(out + 2, tl.argmax(value, 0))
    tl.store(out + 3 + i, tl.cumsum(value, 0))
    tl.store(out + 3 + BLOCK + i, tl.sort(value))


def test_what_is_left_to_triton():
    x, out = torch.tensor([3.0, 1.0, 4.0, 2.0]), torch.empty(11)
    interpreter.run(general, (1,), {"x": x, "out": out, "BLOCK": 4})
    assert out.tolist() == [10, 24, 2, 3, 4, 8, 10, 1, 2, 3, 4]


@triton.jit
def philox(seed, counter, out):
    one = tl.arange(0, 1)
    c0, c1 = tl.load(counter + one), tl.load(counter + 1 + one)
    c2, c3 = tl.load(counter + 2 + one), tl.load(counter + 3 + one)
    r0, r1, r2, r3 = tl.philox(tl.load(seed), c0, c1, c2, c3)
    tl.store(out + one, r0)
    tl.store(out + 1 + one, r1)
    tl.store(out + 2 + one, r2)
    tl.store(out + 3 + one, r3)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, kat_vectors
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox(counter, key, expected):
    out = torch.empty(4, dtype=torch.uint32)
    counters = torch.tensor(counter, dtype=torch.uint32)
    seed = torch.tensor([key])
    interpreter.run(philox, (1,), {"seed": seed, "counter": counters, "out": out})
    assert out.tolist() == expected


@triton.jit
def unsigned(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a * b)
    tl.store(out + BLOCK + i, a + b)
    tl.store(out + 2 * BLOCK + i, a - b)
    tl.store(out + 3 * BLOCK + i, tl.umulhi(a, b))


def test_uint32_wraps():
    x, y = np.random.default_rng(5).integers(0, 2**32, (2, 256), dtype=np.uint32)
    out = torch.empty(4 * 256, dtype=torch.uint32)
    arguments = {"x": torch.from_numpy(x), "y": torch.from_numpy(y), "out": out, "BLOCK": 256}
    interpreter.run(unsigned, (1,), arguments)
    wide_x, wide_y = x.astype(np.uint64), y.astype(np.uint64)
    expected = (x * y, x + y, x - y, (wide_x * wide_y >> np.uint64(32)).astype(np.uint32))
    np.testing.assert_array_equal(out.numpy(), np.concatenate(expected))


@triton.jit
def exceptional(x, out):
    i = tl.arange(0, 8)
    value = tl.load(x + i)
    tl.store(out + i, tl.log(value))
    tl.store(out + 8 + i, tl.exp2(value) + value / 0.0 - tl.sqrt(value))
    tl.store(out + 16 + i, (value - value) * 1e38 * 1e38)
    tl.store(out + 24 + i, value.to(tl.int32).to(tl.float32))


def test_hardware_does_not_warn():
    x = torch.tensor([0.0, -1.0, float("inf"), float("-inf"), float("nan"), 3e38, 1e-45, 200.0])
    out = torch.empty(32)
    interpreter.run(exceptional, (1,), {"x": x, "out": out})  # warnings are errors
    assert_same(out[:8], x.log())
