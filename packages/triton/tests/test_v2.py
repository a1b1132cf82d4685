"""V2 against the formula in fp64: every feature, with the LSE and all gradients."""

import math

import pytest
import torch

from triton_attention import attention, attention_v1
from triton_attention.arguments import Arguments
from triton_attention.v2_launches import Launches

from . import dense
from .making import HKV, HQ, SK, SQ, B, D, arguments, everything, packed, paged, qkv, rand, randn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


FEATURES = {
    "causal-top-left": lambda: {"causal": "top-left"},
    "causal-bottom-right": lambda: {"causal": "bottom-right"},
    "window": lambda: {"window": (20, 7)},
    "window-left": lambda: {"window": (33, None)},
    "window-right": lambda: {"window": (None, 0)},
    "window-of-one": lambda: {"window": (0, 0)},
    "window-causal-top-left": lambda: {"window": (20, 7), "causal": "top-left"},
    "softcap": lambda: {"softcap": 1.5},
    "scale": lambda: {"scale": 0.6},
    "scale-negative": lambda: {"scale": -0.3},
    "scale-zero": lambda: {"scale": 0.0},
    "alibi": lambda: {"alibi_slopes": rand(HQ)},
    "alibi-top-left": lambda: {"alibi_slopes": rand(HQ), "causal": "top-left"},
    "mask": lambda: {"mask": rand(B, HQ, SQ, SK) < 0.6},
    "mask-of-heads": lambda: {"mask": rand(1, HQ, 1, SK) < 0.6},
    "mask-of-batches": lambda: {"mask": rand(B, 1, SQ, SK) < 0.6},
    "mask-of-queries": lambda: {"mask": rand(B, 1, SQ, 1) < 0.6},
    "mask-expanded": lambda: {"mask": (rand(1, 1, SQ, SK) < 0.6).expand(B, HQ, SQ, SK)},
    "mask-hides-rows": lambda: {"mask": rand(B, 1, SQ, SK).cummax(2).values < 0.97},
    "mask-transposed": lambda: {"mask": (rand(B, HQ, SK, SQ) < 0.6).mT},
    "bias": lambda: {"bias": randn(B, HQ, SQ, SK)},
    "bias-of-heads": lambda: {"bias": randn(1, HQ, 1, SK)},
    "bias-of-queries": lambda: {"bias": randn(1, HQ, SQ, 1)},
    "bias-of-batches": lambda: {"bias": randn(B, 1, SQ, SK)},
    "bias-of-keys": lambda: {"bias": randn(1, 1, 1, SK)},
    "bias-of-all": lambda: {"bias": randn(1, 1, 1, 1)},
    "bias-expanded": lambda: {"bias": randn(1, 1, SQ, SK).expand(B, HQ, SQ, SK)},
    "bias-hides": lambda: {"bias": torch.where(rand(1, HQ, SQ, SK) < 0.3, -torch.inf, 0.5)},
    "sinks": lambda: {"sinks": torch.tensor([0.0, 3.0, -2.0, 9.0])},
    "sinks-absent": lambda: {"sinks": torch.tensor([1.0, -torch.inf, 2.0, 5.0])},
    "key-lengths": lambda: {"key_lengths": torch.tensor([53, 90], dtype=torch.int32)},
    "key-lengths-empty": lambda: {"key_lengths": torch.tensor([0, 1], dtype=torch.int32)},
    "key-lengths-causal": lambda: {
        "key_lengths": torch.tensor([40, 77], dtype=torch.int32),
        "causal": "bottom-right",
    },
    "dropout": lambda: {"dropout_p": 0.3},
}
# Shifts that no row of probabilities notices: they show in the LSE alone.
LSE_ALONE = {"bias-of-queries", "bias-of-all"}


OF_POSITIONS = [name for name in FEATURES if name.startswith(("causal", "window", "alibi"))]


@pytest.mark.parametrize(
    ("name", "sq", "sk"),
    [*((name, SQ, SK) for name in FEATURES), *((name, SK, SQ) for name in OF_POSITIONS)],
)
def test_a_feature(name, sq, sk, device):
    options = FEATURES[name]()
    tensors = qkv(sq, sk)
    found = dense.check(attention, arguments(device, **tensors, **options))
    without = dense.attention(*(tensor.double() for tensor in tensors.values()))
    shown = dense.errors(found, dict(zip(("out", "lse"), without, strict=True)))
    assert shown["lse" if name in LSE_ALONE else "out"] > 1e-2  # the feature mattered


@pytest.mark.parametrize("causal", ["none", "top-left"])
@pytest.mark.parametrize(("sq", "sk"), [(SQ, 20), (20, SQ)])
@pytest.mark.parametrize("form", ["dense", "packed", "paged"])
def test_windows_that_hide_nothing(form, sq, sk, causal, device):
    made = {
        "dense": lambda: qkv(sq, sk),
        "packed": lambda: packed((sq, 9), (sk, 30)),
        "paged": lambda: paged((sk, 9), 4, sq),
    }
    given = arguments(device, **made[form](), causal=causal)
    grads = randn(*given["q"].shape).to(device), randn(*given["q"].shape[:3]).to(device)
    without = dense.results(attention, given, grads)
    exact = {name: dense.exact(tensor) for name, tensor in without.items()}
    for window in ((2**31 - sq, 2**31 - 1), (2**31 - 1, None), (None, 2**64)):
        found = dense.results(attention, given | {"window": window}, grads)
        measured = dense.errors(found, exact)
        assert max(measured.values()) <= dense.TOLERANCE[torch.float32], (window, measured)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sq", [SQ, 3], ids=["many-queries", "few-queries"])
def test_all_features_together(dtype, sq, device):
    dense.check(attention, arguments(device, dtype, **qkv(sq), **everything(sq=sq)))


@pytest.mark.parametrize(("hq", "hkv"), [(1, 1), (6, 2), (5, 1), (3, 3)])
def test_groups_of_heads(hq, hkv, device):
    dense.check(attention, arguments(device, **qkv(hq=hq, hkv=hkv), causal="bottom-right"))


DIMS = [(16, 16), (40, 40), (72, 72), (256, 256), (40, 24), (24, 64), (64, 24), (1, 7), (130, 20)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "dv"), DIMS)
def test_head_dims(d, dv, dtype, device):
    tensors = qkv(150, 200, d, dv, hq=2, hkv=1, b=1)
    dense.check(attention, arguments(device, dtype, **tensors, causal="bottom-right"))


@pytest.mark.parametrize(("sq", "sk"), [(0, 9), (9, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"causal": "bottom-right", "sinks": torch.ones(HQ)}])
def test_empty_and_smallest(sq, sk, options, device):
    given = {"bias": randn(B, 1, sq, sk), "dropout_p": 0.5, **options}
    # With one key dP - delta is what rounding leaves of numbers that are the same.
    dense.check(attention, arguments(device, **qkv(sq, sk), **given), room=50)


@pytest.mark.parametrize("function", [attention, attention_v1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low", [256, 300], ids=["first-keys", "all-keys"])
def test_scores_that_overflow_weigh_nothing(low, dtype, function, device):
    """Blocks of keys that no mask is needed for, whose scores are all -inf."""
    tensors = {name: tensor.to(device, dtype) for name, tensor in qkv(sk=300).items()}
    tensors["q"] = tensors["q"].abs() + 1
    few = {name: tensors[name][:, :, low:] for name in "kv"}
    tensors["k"][:, :, :low] = -3e38
    grads = randn(B, HQ, SQ, D).to(device, dtype), randn(B, HQ, SQ).to(device)
    found = dense.results(function, tensors | {"return_lse": True}, grads)
    plain = {name: dense.exact(tensor) for name, tensor in (tensors | few).items()}
    expected = dense.results(dense.attention, plain, tuple(dense.exact(grad) for grad in grads))
    for name in "kv":
        assert not found[name][:, :, :low].any()
        found[name] = found[name][:, :, low:]
    measured = dense.errors(found, expected)
    assert max(measured.values()) <= dense.TOLERANCE[dtype], measured


def test_an_empty_batch(device):
    given = arguments(device, **qkv(b=0), **everything(0))
    found = dense.results(attention, given, (torch.empty(0, HQ, SQ, D, device=device),))
    assert found["out"].shape == (0, HQ, SQ, D)
    assert found["k"].shape == (0, HKV, SK, D)
    assert not found["bias"].any()
    assert not found["sinks"].any()


def test_keys_beyond_their_lengths_are_not_read(device):
    given = arguments(device, **qkv(), **FEATURES["key-lengths-causal"](), bias=randn(B, 1, SQ, SK))
    for n, length in enumerate(given["key_lengths"].tolist()):
        for tensor in (given["k"], given["v"], given["bias"].mT):
            tensor[n, :, length:] = math.nan
    found = dense.check(attention, given)
    assert not found["k"][0, :, 40:].any()
    assert not found["v"][1, :, 77:].any()


@pytest.mark.parametrize("sq", [3, 40], ids=["few-queries", "many-queries"])
@pytest.mark.parametrize("form", ["dense", "paged"])
def test_key_lengths_beyond_the_keys(form, sq, device):
    """All keys then count, and none of the next head, or page of nobody."""
    given = qkv(sq) if form == "dense" else paged((32, 80), 16, sq)
    if form == "paged":  # behind the last page: that of no sequence
        given["page_table"] = given["page_table"][:, :5]
        given["page_table"][0, 2:] = given["page_table"][1, :3]
    room = SK if form == "dense" else 80
    options = {"causal": "bottom-right", "bias": randn(1, HQ, sq, room), "dropout_p": 0.2}
    lengths = {"key_lengths": torch.tensor([room + 12, room], dtype=torch.int32)}
    all_keys = {"key_lengths": torch.tensor([room, room], dtype=torch.int32)}
    grads = randn(B, HQ, sq, D).to(device), randn(B, HQ, sq).to(device)
    found = []
    for known in (lengths, all_keys):
        torch.manual_seed(1)
        given_now = arguments(device, **(given | options | known))
        found.append(dense.results(attention, given_now, grads))
    for name, tensor in found[1].items():
        assert torch.equal(found[0][name], tensor), name


# Packed.


LENGTHS = [
    pytest.param((50, 1, 70), (60, 33, 50), id="ragged"),
    pytest.param((0, 40, 0, 9, 5, 0), (7, 0, 0, 40, 5, 3), id="some-empty"),
    pytest.param((3, 16, 1), (90, 20, 31), id="few-queries"),
    pytest.param((0, 0), (0, 5), id="no-queries"),
]


@pytest.mark.parametrize("behind", [0, 6])
@pytest.mark.parametrize(("lens_q", "lens_k"), LENGTHS)
def test_packed(lens_q, lens_k, behind, device):
    given = arguments(device, **packed(lens_q, lens_k, behind=behind), causal="bottom-right")
    grads = (randn(1, HQ, sum(lens_q) + behind, D), randn(1, HQ, sum(lens_q) + behind))
    grads[0][:, :, sum(lens_q) :] = 0  # NaN * 0 would be NaN in a product with it
    found = dense.check(attention, given, tuple(grad.to(device) for grad in grads))
    assert (found["out"][:, :, sum(lens_q) :] == 0).all()
    assert (found["lse"][:, :, sum(lens_q) :] == -torch.inf).all()


@pytest.mark.parametrize("coming", [0.0, 1.0, math.nan])
def test_sinks_have_no_gradient_from_rows_of_no_sequence(coming, device):
    given = packed((30, 40), (50, 0), behind=6) | {"sinks": torch.tensor([0.5, -torch.inf, 3, -2])}
    grads = randn(1, HQ, 76, D), randn(1, HQ, 76)
    for grad in grads:
        grad[:, :, 70:] = coming
    given = arguments(device, **given)
    found = dense.results(attention, given, tuple(grad.to(device) for grad in grads))
    for grad in grads:
        grad[:, :, 70:] = 0.0
    plain = {n: dense.exact(t) for n, t in given.items() if not n.startswith("return_")}
    expected = dense.results(dense.attention, plain, tuple(grad.double() for grad in grads))
    measured = dense.errors(found, {"sinks": expected["sinks"]})
    assert measured["sinks"] <= dense.TOLERANCE[torch.float32], measured


@pytest.mark.parametrize(("lens_q", "lens_k"), LENGTHS)
@pytest.mark.parametrize("shape", ["full", "of-keys", "of-queries", "of-all"])
def test_packed_with_all_features(lens_q, lens_k, shape, device):
    sq, sk = sum(lens_q), sum(lens_k)
    options = everything(1, sq, sk)
    shapes = {"full": (1, HQ, sq, sk), "of-keys": (1, 1, 1, sk), "of-queries": (1, HQ, sq, 1)}
    options["bias"] = randn(*shapes.get(shape, (1, 1, 1, 1)))
    dense.check(attention, arguments(device, **packed(lens_q, lens_k), **options))


# Paged.


@pytest.mark.parametrize("sq", [1, 40])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_paged(page_size, sq, device):
    given = paged((37, 0, 80, 1), page_size, sq)
    found = dense.check(attention, arguments(device, **given, causal="bottom-right"))
    assert found["lse"].isneginf().any(-1).any(-1).tolist()[1]


@pytest.mark.parametrize("room", [False, True], ids=["of-keys", "of-room"])
def test_paged_with_all_features(room, device):
    """A mask and a bias may end where the keys do, or where the pages do."""
    given = paged((37, 80), 16, 40)
    keys = given["page_table"].shape[1] * 16 if room else 80
    dense.check(attention, arguments(device, **given, **everything(2, 40, keys)))


def test_a_page_table_with_a_stride(device):
    given = paged((37, 80), 16, 40)
    wide = torch.full((2, 50), 10**6, dtype=torch.int32)
    wide[:, : given["page_table"].shape[1]] = given["page_table"]
    given["page_table"] = wide[:, : given["page_table"].shape[1]]
    dense.check(attention, arguments(device, **given))


def test_pages_have_no_gradients(device):
    given = arguments(device, **paged((5,), 4, 3))
    given["k"].requires_grad_()
    out, _, _ = attention(**given)
    with pytest.raises(NotImplementedError, match="k and v have no gradients where they are paged"):
        out.sum().backward()


# Memory layouts.

LAYOUTS = {
    "bshd": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "columns-first": lambda t: t.mT.contiguous().mT,
    "every-other-column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "part-of-more": lambda t: torch.nn.functional.pad(t, (3, 5, 2, 1, 1, 0))[:, 1:, 2:-1, 3:-5],
    "heads-outside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout, device):
    options = {"bias": randn(B, HQ, SQ, SK), "mask": rand(B, HQ, SQ, SK) < 0.7}
    given = arguments(device, **qkv(dv=24), **options)
    laid = {n: LAYOUTS[layout](given[n]) for n in ("q", "k", "v", "bias")}
    laid["mask"] = LAYOUTS["bshd"](given["mask"])
    assert not laid["q"].is_contiguous()
    grads = LAYOUTS[layout](randn(B, HQ, SQ, 24).to(device)), randn(B, SQ, HQ).to(device).mT
    dense.check(attention, given | laid, grads)


def every_other(tensor):
    """The same numbers with others between them."""
    return torch.stack([tensor, tensor * 0 + 1], -1)[..., 0]


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *(("dense", name) for name in ("sinks", "alibi_slopes", "key_lengths")),
        *(("packed", name) for name in ("cu_seqlens_q", "cu_seqlens_k")),
        *(("paged", name) for name in ("page_table", "key_lengths")),
    ],
)
@pytest.mark.parametrize("sq", [3, 40], ids=["few-queries", "many-queries"])
def test_strides_of_vectors(form, name, sq, device):
    made = {
        "dense": lambda: qkv(sq) | FEATURES["key-lengths"]() | {"sinks": randn(HQ)},
        "packed": lambda: packed((sq, 30), (50, 20)),
        "paged": lambda: paged((37, 80), 16, sq),
    }
    given = arguments(device, **made[form](), alibi_slopes=rand(HQ))
    given[name] = every_other(given[name])
    assert not given[name].is_contiguous()
    dense.check(attention, given)


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes", "key_lengths"])
def test_vectors_that_broadcast(name, device):
    vector, n = (
        (torch.tensor([53], dtype=torch.int32), B) if name == "key_lengths" else (rand(1), HQ)
    )
    # Expanded where it is used: a copy to another device is dense.
    given = arguments(device, **qkv(), **{name: vector})
    given[name] = given[name].expand(n)
    assert given[name].stride() == (0,)
    dense.check(attention, given)


def test_a_transposed_page_table(device):
    given = arguments(device, **paged((37, 80), 16, 40))
    given["page_table"] = given["page_table"].mT.contiguous().mT
    dense.check(attention, given)


def test_gradients_that_broadcast(device):
    """out.sum().backward() brings a gradient whose strides are all 0."""
    grads = torch.ones((), device=device).expand(B, HQ, SQ, D), torch.ones(1, device=device)
    dense.check(attention, arguments(device, **qkv()), (grads[0], grads[1].expand(B, HQ, SQ)))


# Gradients.


def test_a_gradient_through_out_alone(device):
    dense.check(attention, arguments(device, **qkv()), (randn(B, HQ, SQ, D).to(device),))


def test_a_gradient_through_the_lse_alone(device):
    given = arguments(device, **qkv(), sinks=randn(HQ), causal="top-left")
    grad = randn(B, HQ, SQ).to(device)

    def lse(function, convert):
        leaves, others = dense.split({name: convert(value) for name, value in given.items()})
        found = function(**leaves, **others)[1]
        grads = torch.autograd.grad(found, list(leaves.values()), convert(grad), allow_unused=True)
        zeros = (torch.zeros_like(leaf) for leaf in leaves.values())
        pairs = zip(leaves, grads, zeros, strict=True)
        return {name: zero if grad is None else grad for name, grad, zero in pairs}

    found = lse(attention, lambda value: value)
    del given["return_lse"], given["return_keep_mask"]
    measured = dense.errors(found, lse(dense.attention, dense.exact))
    assert max(measured.values()) <= dense.TOLERANCE[torch.float32], measured


def test_gradients_only_of_what_is_wanted(device):
    options = {"bias": randn(1, HQ, 1, SK), "sinks": randn(HQ)}
    given = arguments(device, **qkv(), **options)
    grads = randn(B, HQ, SQ, D).to(device), randn(B, HQ, SQ).to(device)
    all_of_them = dense.results(attention, given, grads)
    for name in dense.DIFFERENTIABLE:
        leaf = given[name].detach().requires_grad_()
        out, lse, _ = attention(**(given | {name: leaf}))
        torch.autograd.backward((out, lse), grads)
        assert torch.equal(leaf.grad, all_of_them[name]), name
    out, lse, _ = attention(**given)
    assert not out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize(
    ("wanted", "written", "kernels"),
    [
        (set(), set(), 1),
        ({"q"}, {"q"}, 2),
        ({"v"}, {"k", "v"}, 2),
        ({"bias"}, {"bias"}, 2),
        ({"q", "k", "bias"}, {"q", "k", "v", "bias"}, 4),
    ],
)
def test_kernels_only_for_what_is_wanted(wanted, written, kernels, device):
    tensors = {n: t.to(device) for n, t in qkv(dv=D).items()}
    x = Arguments(**tensors, bias=randn(1, 1, SQ, SK).to(device))
    out, lse = torch.empty_like(x.q), torch.empty_like(x.q[..., 0])
    backward = Launches(x).backward(out, lse, out, None, wanted)
    assert set(backward.tensors) == written | {"delta"}
    assert len(backward.launches) == kernels


def test_the_same_bits_twice(device):
    given = arguments(device, **qkv(), **everything())
    grads = randn(B, HQ, SQ, D).to(device), randn(B, HQ, SQ).to(device)
    first, second = [], []
    for found in (first, second):
        torch.manual_seed(1)
        found.append(dense.results(attention, given, grads))
    for name, tensor in first[0].items():
        assert torch.equal(tensor, second[0][name]), name


def test_backward_twice_of_one_forward(device):
    given = arguments(device, **qkv(), **everything())
    leaves, others = dense.split(given)
    out, _, _ = attention(**leaves, **others)
    grad = randn(B, HQ, SQ, D).to(device)
    first, second = (
        torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def changeable(device):
    """Arguments that together hold every tensor there is, but for pages."""
    dense_ones = qkv() | everything() | FEATURES["key-lengths"]()
    return {
        "dense": arguments(device, **dense_ones),
        "packed": arguments(device, **packed((30, 40), (50, 40))),
        "paged": arguments(device, **paged((37, 80), 16, 40)),
    }


CHANGES = [
    *(("dense", n) for n in ("q", "k", "v", "bias", "sinks", "mask", "alibi_slopes")),
    ("dense", "key_lengths"),
    *(("packed", n) for n in ("cu_seqlens_q", "cu_seqlens_k")),
    *(("paged", n) for n in ("k", "v", "page_table", "key_lengths")),
]


@pytest.mark.parametrize(("form", "name"), CHANGES)
def test_a_change_between_forward_and_backward_is_an_error(form, name, device):
    leaves, others = dense.split(changeable(device)[form])
    out, _, _ = attention(**leaves, **others)
    with torch.no_grad():
        (leaves | others)[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_second_derivative_is_an_error(device):
    leaves, others = dense.split(arguments(device, **qkv()))
    out, _, _ = attention(**leaves, **others)
    grad_out = torch.ones_like(out, requires_grad=True)
    (grad,) = torch.autograd.grad(out, leaves["q"], grad_out, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Dropout: that the keep mask explains out and gradients is checked wherever there is dropout.


def kept(device, seed, p=0.3, **options):
    torch.manual_seed(seed)
    found = attention(**arguments(device, **(qkv() | options)), dropout_p=p)
    return found[2]


def test_dropout_follows_the_seed(device):
    tensors = qkv()
    first, again, other = (kept(device, seed, **tensors) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first != other).float().mean() > 0.3


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_dropout_has_its_rate(p, device):
    found = kept(device, 3, p)
    assert found.dtype == torch.bool
    assert found.shape == (B, HQ, SQ, SK)
    deviation = math.sqrt(p * (1 - p) / found.numel())
    assert abs(found.double().mean().item() - (1 - p)) < 5 * deviation


def test_dropout_differs_everywhere(device):
    found = kept(device, 4)
    for other in (found.flip(0), found.flip(1), found.roll(1, 2), found.roll(1, 3)):
        assert (found != other).float().mean() > 0.3


def test_dropout_depends_on_positions_alone(device):
    """Neither on tiles nor on how many queries there are: a part has the mask of the whole."""
    tensors = qkv(sq=200)
    part = tensors | {"q": tensors["q"][:, :, :9], "k": tensors["k"][:, :, :50]}
    whole = kept(device, 5, **tensors)
    few = kept(device, 5, **(part | {"v": tensors["v"][:, :, :50]}))
    assert torch.equal(whole[:, :, :9, :50], few)


@pytest.mark.parametrize("form", ["packed", "paged"])
def test_dropout_of_sequences(form, device):
    given = packed((30, 40), (50, 31)) if form == "packed" else paged((37, 80), 16, 40)
    found = dense.check(attention, arguments(device, **given, dropout_p=0.4))
    assert 0.5 < found["keep_mask"][:, :, :30, :30].float().mean() < 0.7


def test_what_is_returned(device):
    given = {name: tensor.to(device) for name, tensor in qkv().items()}
    out = attention(**given)
    with_lse = attention(**given, return_lse=True)
    with_kept = attention(**given, return_keep_mask=True)
    assert isinstance(out, torch.Tensor)
    assert [len(with_lse), len(with_kept)] == [2, 3]
    assert with_kept[2] is None
    assert torch.equal(out, with_lse[0])
    assert torch.equal(out, with_kept[0])
    assert torch.equal(with_lse[1], with_kept[1])
