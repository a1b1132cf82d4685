"""What a model is given: sequences of tokens, how they are padded, in which dtype."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from attn_reference.problem import DTYPES

from ..inputs.streams import Stream
from .llama import MODELS, Llama, Weights, make_weights

PADDINGS = ("none", "left", "right")
PROMPTS = (9, 24, 17)  # tokens of the prompts of a batch
STEPS = 64  # tokens that are generated
# The last columns of the prompts are a forward pass of their own: some queries, more keys.
CHUNK = 5


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One batch through one model; plain values, which rebuild everything."""

    model: str
    dtype: str
    padding: str
    seed: int = 0

    @property
    def id(self) -> str:
        """Short and readable."""
        return f"{self.model}_{self.dtype}_pad-{self.padding}_seed{self.seed}"

    @property
    def llama(self) -> Llama:
        """The model's sizes."""
        return MODELS[self.model]

    @property
    def prompts(self) -> tuple[int, ...]:
        """Tokens of each prompt: all the same where nothing is padded."""
        return PROMPTS if self.padding != "none" else (max(PROMPTS),) * len(PROMPTS)

    def weights(self) -> Weights:
        """The model's weights in fp32: those of the scenario, rounded to its dtype."""
        made = make_weights(self.llama, self.seed)
        return {name: weight.to(DTYPES[self.dtype]).float() for name, weight in made.items()}

    def sequences(self) -> list[Tensor]:
        """The tokens of each sequence, prompt and generation: int64 (prompt + STEPS,).

        They are drawn: what random weights generate soon repeats itself.
        """
        return [
            self._tokens(f"sequence {n}", prompt + STEPS) for n, prompt in enumerate(self.prompts)
        ]

    def padded(self, sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Sequences as a batch (B, S) int64, and which of it are their tokens, bool (B, S).

        Padding has tokens too, drawn: whatever looks at them shows.
        """
        length = max(map(len, sequences))
        rows, real = [], []
        for n, sequence in enumerate(sequences):
            padding = self._tokens(f"padding {n}", length - len(sequence))
            here = torch.ones(len(sequence), dtype=torch.bool)
            parts = [sequence, padding], [here, torch.zeros(len(padding), dtype=torch.bool)]
            if self.padding == "left":
                parts = parts[0][::-1], parts[1][::-1]
            rows.append(torch.cat(parts[0]))
            real.append(torch.cat(parts[1]))
        return torch.stack(rows), torch.stack(real)

    def _tokens(self, name: str, count: int) -> Tensor:
        drawn = Stream(self.seed, f"{self.model} {name}").integers((count,), 0, self._last_token)
        return torch.from_numpy(drawn)

    @property
    def _last_token(self) -> int:
        return self.llama.vocabulary - 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of ``as_dict``."""
        return cls(**values)
