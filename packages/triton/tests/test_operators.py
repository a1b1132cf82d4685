"""The operators: what torch asks of them, and that a compiled call is the plain one to the bit."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from triton_attention import attention, operators
from triton_attention.arguments import TENSORS

from . import dense
from .making import HQ, arguments, packed, paged, qkv, rand, randn
from .test_mask_rule import prefix

SQ, SK = 20, 35


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def lengths():
    return torch.tensor([30, 11], dtype=torch.int32)


def dense_qkv(sq=SQ, sk=SK, **sizes):
    return qkv(sq, sk, 16, **sizes)


FORMS = {
    "dense": lambda: dense_qkv(hq=2),
    "head-dim-v": lambda: dense_qkv(dv=24),
    "causal-gqa": lambda: dense_qkv() | {"causal": "bottom-right"},
    "window": lambda: dense_qkv() | {"window": (9, None), "scale": 0.3},
    "mask": lambda: dense_qkv() | {"mask": rand(1, HQ, SQ, SK) < 0.6},
    "bias": lambda: dense_qkv() | {"bias": randn(1, HQ, SQ, SK)},
    "bias-expanded": lambda: dense_qkv() | {"bias": randn(1, 1, 1, SK).expand(2, HQ, 1, SK)},
    "scores": lambda: (
        dense_qkv() | {"softcap": 3.0, "alibi_slopes": rand(HQ) * 0.2, "sinks": randn(HQ)}
    ),
    "key-lengths": lambda: dense_qkv() | {"key_lengths": lengths()},
    "packed": lambda: packed((13, 7), (9, 20), 16),
    "paged": lambda: paged((30, 11), 8, SQ, 16),
    "dropout": lambda: dense_qkv() | {"dropout_p": 0.3},
    "splits": lambda: dense_qkv(sq=1) | {"num_splits": 3},
    "transposed": lambda: {name: tensor.mT.contiguous().mT for name, tensor in dense_qkv().items()},
}


def given(form, device, dtype=torch.float32):
    """Keyword arguments of the plain function, which returns out alone."""
    made = arguments(device, dtype, **FORMS[form]())
    return {name: value for name, value in made.items() if not name.startswith("return")}


def of_the_operator(options):
    """The same for an operator: tensors in order, and options."""
    options = dict(options)
    tensors = [options.pop(name, None) for name in TENSORS]
    options["window_left"], options["window_right"] = options.pop("window", None) or (None, None)
    seed = None
    if options.get("dropout_p"):
        seed = torch.tensor([5], device=tensors[0].device)
    return (*tensors, seed), options


def with_leaves(options):
    leaves, others = dense.split(options)
    return leaves, leaves | others


@pytest.mark.parametrize("form", FORMS)
def test_what_torch_asks_of_the_forward_pass(form, device):
    """The schema is true, the fake kernel gives the same shapes, strides and dtypes, autograd is
    registered, and traces with dynamic shapes are right, forward and backward."""
    _, options = with_leaves(given(form, device))
    opcheck(operators.attention, *of_the_operator(options))


@pytest.mark.parametrize("form", FORMS)
def test_what_torch_asks_of_the_backward_pass(form, device):
    tensors, options = of_the_operator(given(form, device))
    out, lse = operators.attention(*tensors, **options)
    options.pop("num_splits", None)
    present = {name for name, tensor in zip(TENSORS, tensors, strict=False) if tensor is not None}
    if form == "paged":
        present -= {"k", "v"}
    wanted = [name in present for name in dense.DIFFERENTIABLE]
    before = (torch.randn_like(out), torch.randn_like(lse), out, lse, wanted)
    opcheck(operators.attention_backward, (*before, *tensors), options)


@pytest.mark.parametrize("form", ["dropout", "packed", "paged"])
def test_what_torch_asks_of_the_keep_mask(form, device):
    options = given(form, device) | {"dropout_p": 0.4}
    opcheck(operators.keep_mask, *of_the_operator(options))


@pytest.mark.parametrize(
    ("form", "dynamic"),
    [*((form, True) for form in FORMS), ("dense", False), ("packed", False), ("dropout", False)],
)
def test_compiled_is_plain_to_the_bit(form, dynamic, device):
    """Without a break of the graph, forward and backward."""
    leaves, options = with_leaves(given(form, device))
    call = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    found = []
    for function in (attention, call):
        torch.manual_seed(3)
        out, lse = function(**options, return_lse=True)
        torch.manual_seed(4)
        grads = torch.randn_like(out), torch.randn_like(lse)
        found.append((out, lse, *torch.autograd.grad((out, lse), leaves.values(), grads)))
    for plain, compiled in zip(*found, strict=True):
        assert torch.equal(plain, compiled)
        assert plain.stride() == compiled.stride()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what inductor imports
def test_compiled_by_inductor(device):
    leaves, options = with_leaves(
        given("scores", device) | {"bias": randn(1, HQ, SQ, SK).to(device)}
    )

    def layer(q, **others):
        out, lse = attention(q * 2, **others, return_lse=True)
        return out.transpose(1, 2).relu(), lse

    found = []
    for function in (layer, torch.compile(layer, fullgraph=True, dynamic=True)):
        out, lse = function(**options)
        grads = torch.autograd.grad(out.sum() + lse.sum(), list(leaves.values()))
        found.append((out, lse, *grads))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(plain, compiled)


def test_other_sizes_are_not_compiled_again(device):
    count = CompileCounterWithBackend("aot_eager")
    call = torch.compile(attention, backend=count, fullgraph=True, dynamic=True)
    counts = []
    for sq, sk, batch in ((20, 35, 5), (21, 50, 3), (40, 64, 6)):
        made = arguments(device, **dense_qkv(sq, sk, b=batch), causal="bottom-right")
        leaves, options = with_leaves(made)
        out, lse, _ = call(**options)
        plain, plain_lse, _ = attention(**options)
        assert torch.equal(out, plain)
        assert torch.equal(lse, plain_lse)
        torch.autograd.grad(out.sum(), list(leaves.values()))
        counts.append(count.frame_count)
    assert counts[0] == counts[-1], counts


def test_every_run_of_a_compiled_call_drops_others(device):
    options = given("dropout", device)
    call = torch.compile(attention, backend="aot_eager", fullgraph=True)

    def kept():
        return call(**options, return_keep_mask=True)[2]

    first, second = kept(), kept()
    assert first.shape == (2, HQ, SQ, SK)
    assert not torch.equal(first, second)
    assert first.float().mean().item() == pytest.approx(0.7, abs=0.05)


def test_the_seed_decides_what_is_dropped(device):
    tensors, options = of_the_operator(given("dropout", device))
    first, again, other = (
        operators.attention(*tensors[:-1], torch.tensor([seed], device=device), **options)[0]
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(ValueError, match="seed is None: accepted with dropout_p"):
        operators.attention(*tensors[:-1], None, **options)
    with pytest.raises(ValueError, match=r"dropout_p=0.0: accepted is more than 0, with a seed"):
        operators.keep_mask(*tensors, **options | {"dropout_p": 0.0})


def test_a_rule_breaks_the_graph_and_says_why(device):
    options = given("dense", device) | {"mask_rule": prefix}
    expected = attention(**options)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="mask_rule is a device function"):
        torch.compile(attention, backend="eager", fullgraph=True)(**options)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(attention, backend="eager")(**options), expected)


def test_wrong_arguments_of_a_compiled_call(device):
    options = given("dense", device) | {"softcap": -1.0}
    call = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"softcap=-1.0: accepted is 0 \(off\) or more"):
        call(**options)


@pytest.mark.parametrize("splits", [0, -1])
def test_splits_that_are_none(splits, device):
    with pytest.raises(ValueError, match=f"num_splits={splits}: accepted is 1 or more, or None"):
        attention(**given("dense", device), num_splits=splits)


def test_the_number_of_splits_reaches_the_kernel(device):
    options = given("splits", device)
    options["num_splits"] = 1
    whole = attention(**options)
    assert torch.equal(whole, attention(**options))
    split = attention(**options | {"num_splits": 3})
    torch.testing.assert_close(split, whole)
    assert not torch.equal(split, whole)


def test_gradients_that_there_are_not(device):
    tensors, options = of_the_operator(given("scores", device))
    tensors[TENSORS.index("alibi_slopes")].requires_grad_()
    with pytest.raises(ValueError, match="alibi_slopes requires a gradient, and has none"):
        operators.attention(*tensors, **options)
    tensors, options = of_the_operator(given("paged", device))
    tensors[1].requires_grad_()
    out, _ = operators.attention(*tensors, **options)
    with pytest.raises(NotImplementedError, match="k and v have no gradients where they are paged"):
        out.sum().backward()


def test_no_second_derivative(device):
    """An error, and not a gradient that is wrong."""
    leaves, options = with_leaves(given("dense", device))
    tensors, options = of_the_operator(options)
    out, _ = operators.attention(*tensors, **options)
    (grad,) = torch.autograd.grad(out.sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()
