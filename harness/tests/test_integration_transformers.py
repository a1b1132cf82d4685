"""Backends as attention implementations of transformers, in models of several kinds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_reference.attnproof_backend import reference
from attnproof.integrations.transformers import (
    Implementation,
    alignment,
    implementation_name,
    register,
)
from attnproof.models import running
from attnproof.models.judging import judge
from attnproof.models.scenario import Scenario
from attnproof.targets import registered
from attnproof.verdict import Status

transformers = pytest.importorskip("transformers", reason="judges models of transformers")

TINY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
BATCH = torch.arange(60).reshape(2, 30) % 64
PADDED = torch.ones(2, 30, dtype=torch.long)
PADDED[0, :7] = 0
REAL = PADDED.bool()


class Without:
    """The reference without some of its features."""

    def __init__(self, *features: str) -> None:
        self.name = f"reference-without-{'-'.join(features).replace(' ', '-')}"
        kept = reference.capabilities.features - set(features)
        self.capabilities = replace(reference.capabilities, features=kept)
        self.precision = reference.precision
        self.availability = reference.availability
        self.attention = reference.attention


def logits(config: Any, implementation: str, **given: Any) -> Tensor:
    """The logits of a model with weights from a seed."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation
    )
    with torch.no_grad():
        return model.eval()(input_ids=BATCH, **given).logits


def test_names() -> None:
    assert implementation_name("triton-v2") == "attnproof-triton-v2"
    # A name with "flash" or with a slash in it would be looked for elsewhere.
    assert implementation_name("flash-attn-2") == "attnproof-Flash-attn-2"
    assert implementation_name("folder/file.py:attend") == "attnproof-folder.file.py.attend"


def test_every_registered_backend_has_a_function_and_a_mask() -> None:
    names = register()
    assert names == tuple(map(implementation_name, registered()))
    for name in names:
        assert name in transformers.AttentionInterface()
        assert name in transformers.AttentionMaskInterface()


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"backend 'nonsense': unknown; registered are .*eager"):
        register("nonsense")


def test_a_backend_that_cannot_run_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    implementation = Implementation("attnproof-sdpa", "sdpa")
    with pytest.raises(RuntimeError, match="attnproof-sdpa cannot run on cuda: "):
        implementation.on("cuda")


@pytest.mark.parametrize(
    ("features", "queries", "keys", "expected"),
    [
        ({"causal bottom-right", "causal top-left"}, 5, 9, "bottom-right"),
        ({"causal top-left"}, 9, 9, "top-left"),
        ({"causal top-left"}, 1, 9, "none"),
        ({"causal top-left"}, 5, 9, None),
        (set(), 5, 5, None),
    ],
)
def test_alignment(features: set[str], queries: int, keys: int, expected: str | None) -> None:
    assert alignment(frozenset(features), queries, keys) == expected


def test_out_is_contiguous_by_token_and_head() -> None:
    (name,) = register("reference")
    attend = transformers.AttentionInterface()[name]
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 9, 16)
    out, weights = attend(torch.nn.Module(), q, k, k, None, scaling=0.3, is_causal=True)
    assert out.shape == (2, 5, 4, 16)
    assert out.is_contiguous()
    assert weights is None


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(
    "backend",
    [reference, Without("boolean mask"), Without("boolean mask", "packed")],
    ids=["masked", "packed", "one by one"],
)
def test_each_way_to_leave_out_padding_conforms(backend: Any, padding: str) -> None:
    (name,) = register(backend)
    scenario = Scenario(model="llama-tiny", dtype="fp32", padding=padding)
    verdicts = judge(
        scenario, running.run(scenario, name, "cpu"), running.run(scenario, "eager", "cpu")
    )
    assert {check: v.status for check, v in verdicts.items()} == dict.fromkeys(
        verdicts, Status.CONFORMS
    )


def test_a_function_without_its_mask_is_wrong() -> None:
    """What transformers does with an implementation that is in one of its registries alone."""
    attend = Implementation("without-a-mask", "reference").attention
    transformers.AttentionInterface.register("without-a-mask", attend)
    scenario = Scenario(model="llama-tiny", dtype="fp32", padding="left")
    answer = running.run(scenario, "without-a-mask", "cpu")
    verdicts = judge(scenario, answer, running.run(scenario, "eager", "cpu"))
    assert {v.status for v in verdicts.values()} == {Status.DEVIATES}


def test_a_sliding_window_comes_through_the_mask() -> None:
    config = transformers.MistralConfig(**TINY, sliding_window=5)
    (name,) = register("reference")
    expected = logits(config, "eager", attention_mask=PADDED)[REAL]
    found = logits(config, name, attention_mask=PADDED)[REAL]
    torch.testing.assert_close(found, expected)
    whole = logits(transformers.MistralConfig(**TINY, sliding_window=None), name)[REAL]
    assert (found - whole).abs().max() > 0.01


def test_a_window_without_masks_is_refused() -> None:
    (name,) = register(Without("boolean mask"))
    with pytest.raises(NotImplementedError, match="takes no boolean mask, and more than padding"):
        logits(transformers.MistralConfig(**TINY, sliding_window=5), name)


def test_a_softcap_is_passed_on() -> None:
    config = transformers.Gemma2Config(
        **TINY, attn_logit_softcapping=0.02, query_pre_attn_scalar=16, sliding_window=64
    )
    (name,) = register("reference")
    expected = logits(config, "eager")
    torch.testing.assert_close(logits(config, name), expected)
    config.attn_logit_softcapping = None
    assert (logits(config, name) - expected).abs().max() > 1e-4


def test_sinks_are_passed_on() -> None:
    config = transformers.GptOssConfig(**TINY, num_local_experts=2, num_experts_per_tok=1)
    (name,) = register("reference")
    torch.testing.assert_close(logits(config, name), logits(config, "eager"))


def test_what_a_backend_does_not_support_is_refused() -> None:
    config = transformers.GptOssConfig(**TINY, num_local_experts=2, num_experts_per_tok=1)
    (name,) = register(Without("sinks"))
    with pytest.raises(NotImplementedError, match="without-sinks: sinks is not supported"):
        logits(config, name)


def test_a_static_cache_has_room_that_is_not_looked_at() -> None:
    config = transformers.LlamaConfig(**TINY)
    (name,) = register("reference")
    found = []
    for implementation in ("eager", name):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation
        ).eval()
        cache = transformers.StaticCache(config=config, max_cache_len=40)
        argument = {running._cache_argument(model): cache}
        with torch.no_grad():
            first = model(input_ids=BATCH, attention_mask=PADDED, use_cache=True, **argument)
            mask = torch.cat([PADDED, torch.ones(2, 1, dtype=torch.long)], 1)
            then = model(input_ids=BATCH[:, :1], attention_mask=mask, use_cache=True, **argument)
        found.append(torch.cat([first.logits[REAL], then.logits[:, 0]]))
    torch.testing.assert_close(*found)


def test_dropout_drops_in_training_alone() -> None:
    config = transformers.LlamaConfig(**TINY, attention_dropout=0.5)
    (name,) = register("reference")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)
    with torch.no_grad():
        one, other = (model.train()(input_ids=BATCH).logits for _ in range(2))
        kept, again = (model.eval()(input_ids=BATCH).logits for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(kept, again)
