"""A LLaMA: its sizes, weights made from a seed, and what it computes, in fp64, from its definition.

Nothing here comes from transformers: the fp64 model knows no batch, no padding, no cache and no
mask but causality, so that none of them can be wrong in the same way as what it judges. Touvron
et al. 2023 (arXiv 2302.13971): RMSNorm, rotary embeddings in the layout of halves that
transformers has, SwiGLU; grouped heads of Ainslie et al. 2023 (arXiv 2305.13245).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..inputs.streams import Stream

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Llama:
    """The sizes of a model, as LlamaConfig has them."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads_q: int
    heads_kv: int
    head_dim: int
    vocabulary: int = 256
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads_q // self.heads_kv

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, by its name in ``LlamaForCausalLM``."""
        h, i = self.hidden, self.intermediate
        q, kv = self.heads_q * self.head_dim, self.heads_kv * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for layer in range(self.layers):
            shapes |= {
                f"model.layers.{layer}.{name}.weight": shape
                for name, shape in {
                    "self_attn.q_proj": (q, h),
                    "self_attn.k_proj": (kv, h),
                    "self_attn.v_proj": (kv, h),
                    "self_attn.o_proj": (h, q),
                    "mlp.gate_proj": (i, h),
                    "mlp.up_proj": (i, h),
                    "mlp.down_proj": (h, i),
                    "input_layernorm": (h,),
                    "post_attention_layernorm": (h,),
                }.items()
            }
        return shapes | {"model.norm.weight": (h,), "lm_head.weight": (self.vocabulary, h)}


# Three query heads per key/value head, of which there are two: a group that is no power of two,
# and is not their number, so that no wrong mapping of heads is the right one.
MODELS = {
    model.name: model
    for model in (
        Llama(
            name="llama-tiny",
            layers=2,
            hidden=96,
            intermediate=192,
            heads_q=6,
            heads_kv=2,
            head_dim=32,
        ),
        Llama(
            name="llama-tiny-d128",
            layers=2,
            hidden=192,
            intermediate=384,
            heads_q=6,
            heads_kv=2,
            head_dim=128,
        ),
    )
}

# The standard deviation of a product with a weight whose input has an rms of 1. Scores get about
# QK² = 2.25, so that attention is neither flat nor one key; attention is made as large as what
# the residual carries past it, or else the model would hide what goes wrong in it.
GAINS = {"q_proj": 1.5, "k_proj": 1.5, "o_proj": 2.0, "lm_head": 2.0}
NORM_SPREAD = 0.1  # of the weights of RMSNorm about 1


def make_weights(model: Llama, seed: int) -> Weights:
    """Weights in fp32, the same for every machine, by their name in ``LlamaForCausalLM``."""
    made = {}
    for name, shape in model.shapes().items():
        drawn = torch.from_numpy(Stream(seed, f"{model.name} {name}").normal(shape))
        if len(shape) == 1:
            made[name] = 1 + NORM_SPREAD * drawn
        elif "embed" in name:
            made[name] = drawn
        else:
            gain = next((g for part, g in GAINS.items() if part in name), 1.0)
            made[name] = drawn * gain / shape[1] ** 0.5
    return made


def logits(model: Llama, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The logits of one sequence of tokens, (n,) int64, after each of them: (n, vocabulary).

    ``weights`` are fp64; differentiable in them.
    """
    angles = _angles(model, len(tokens))
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(model.layers):
        w = {
            name.rpartition(".")[0].rpartition(".")[2]: weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        normed = _rms_norm(x, w["input_layernorm"], model.eps)
        x = x + _attention(model, w, normed, angles) @ w["o_proj"].T
        normed = _rms_norm(x, w["post_attention_layernorm"], model.eps)
        gate = torch.nn.functional.silu(normed @ w["gate_proj"].T)
        x = x + (gate * (normed @ w["up_proj"].T)) @ w["down_proj"].T
    return _rms_norm(x, weights["model.norm.weight"], model.eps) @ weights["lm_head.weight"].T


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def _angles(model: Llama, length: int) -> Tensor:
    """The angle of each position and pair of columns, (length, head_dim / 2)."""
    pair = torch.arange(model.head_dim // 2, dtype=torch.float64)
    frequency = model.rope_theta ** (-2 * pair / model.head_dim)
    return torch.arange(length, dtype=torch.float64)[:, None] * frequency


def _attention(model: Llama, w: Mapping[str, Tensor], x: Tensor, angles: Tensor) -> Tensor:
    """Causal attention of one sequence, (n, heads_q * head_dim), head by head."""
    queries, keys, values = (
        (x @ w[f"{name}_proj"].T).view(len(x), -1, model.head_dim).unbind(1) for name in "qkv"
    )
    hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    out = []
    for head, query in enumerate(queries):
        kv = head // model.group
        scores = _rotate(query, angles) @ _rotate(keys[kv], angles).T / model.head_dim**0.5
        out.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values[kv])
    return torch.cat(out, -1)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Column i and column i + half turned as the two coordinates of a point."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
