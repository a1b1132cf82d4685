"""A scenario through LlamaForCausalLM of transformers, under one attention implementation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from attn_reference.problem import DTYPES

from .llama import Llama
from .scenario import CHUNK, STEPS, Scenario

IGNORED = -100  # a label that is no token


def run(scenario: Scenario, implementation: str, device: str) -> dict[str, Tensor]:
    """What the model answers, on the CPU, by name.

    forward: logits of whole sequences, (B, S, V), without a cache. decoding: logits of each step
    of a generation with a cache, (B, STEPS, V); the tokens are the scenario's. Then, by the name
    of each weight, the gradient of the summed cross entropy of the next tokens.
    """
    model = build(scenario, implementation, device)
    return {"decoding": _decode(model, scenario)} | _train(model, scenario)


def shapes(scenario: Scenario) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that ``run`` gives."""
    batch, vocabulary = len(scenario.prompts), scenario.llama.vocabulary
    return {
        "decoding": (batch, STEPS, vocabulary),
        "forward": (batch, max(scenario.prompts) + STEPS, vocabulary),
        **scenario.llama.shapes(),
    }


def build(scenario: Scenario, implementation: str, device: str) -> Any:
    """The model of a scenario: a LlamaForCausalLM that attends by ``implementation``."""
    import transformers

    automatic: Any = transformers.AutoModelForCausalLM
    model = automatic.from_config(
        _config(scenario.llama),
        attn_implementation=implementation,
        dtype=DTYPES[scenario.dtype],
    )
    model.load_state_dict(scenario.weights())
    return model.to(device).eval()


def _config(llama: Llama) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=llama.layers,
        hidden_size=llama.hidden,
        intermediate_size=llama.intermediate,
        num_attention_heads=llama.heads_q,
        num_key_value_heads=llama.heads_kv,
        head_dim=llama.head_dim,
        vocab_size=llama.vocabulary,
        rms_norm_eps=llama.eps,
        rope_parameters={"rope_type": "default", "rope_theta": llama.rope_theta},
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=None,
    )


@torch.no_grad()
def _decode(model: Any, scenario: Scenario) -> Tensor:
    """Logits of each step of the generation, (B, STEPS, V): the prompts in two passes, then a
    token at a time."""
    from transformers import DynamicCache

    device = model.device
    sequences = scenario.sequences()
    prompts = [s[:n] for s, n in zip(sequences, scenario.prompts, strict=True)]
    generated = torch.stack([s[n:] for s, n in zip(sequences, scenario.prompts, strict=True)])
    tokens, real = scenario.padded(prompts)
    width = tokens.shape[1]
    tokens = torch.cat([tokens, generated], 1).to(device)
    real = torch.cat([real, torch.ones_like(generated, dtype=torch.bool)], 1).to(device)
    positions = _positions(real)
    cache = {_cache_argument(model): DynamicCache(config=model.config)}
    starts = [0, width - CHUNK, *range(width, width + STEPS - 1)]
    found = []
    for start, end in zip(starts, [*starts[1:], width + STEPS - 1], strict=True):
        answer = model(
            input_ids=tokens[:, start:end],
            attention_mask=real[:, :end].long(),
            position_ids=positions[:, start:end],
            use_cache=True,
            **cache,
        )
        found.append(answer.logits)
    logits = torch.cat(found, 1)
    # The first step is after the last token of the prompt, wherever padding has put it.
    last = torch.where(real[:, :width], torch.arange(width, device=device), 0).amax(1)
    first = logits[torch.arange(len(last), device=device), last]
    return torch.cat([first[:, None], logits[:, width:]], 1).cpu()


def _train(model: Any, scenario: Scenario) -> dict[str, Tensor]:
    """Logits of whole sequences, and the gradients of a loss over them."""
    tokens, real = (t.to(model.device) for t in scenario.padded(scenario.sequences()))
    logits = model(
        input_ids=tokens,
        attention_mask=real.long(),
        position_ids=_positions(real),
        use_cache=False,
    ).logits
    labels = tokens.masked_fill(~real, IGNORED)[:, 1:].masked_fill(~real[:, :-1], IGNORED)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="sum"
    )
    weights = dict(model.named_parameters())
    # A weight that the answer does not depend on has the gradient zero.
    taken = torch.autograd.grad(
        loss, list(weights.values()), allow_unused=True, materialize_grads=True
    )
    gradients = {name: gradient.cpu() for name, gradient in zip(weights, taken, strict=True)}
    return {"forward": logits.detach().cpu()} | gradients


def _positions(real: Tensor) -> Tensor:
    """The position of each token in its sequence, (B, S); 0 for padding before it."""
    return (real.long().cumsum(1) - 1).clamp(min=0)


def _cache_argument(model: Any) -> str:
    """What the cache is called: transformers 5.2x has renamed ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
