"""Whether a device is here, as a sentence when it is not."""

from __future__ import annotations

import torch


def unavailable(device: str, declared: tuple[str, ...]) -> str | None:
    """None when ``device`` ('cpu' or 'cuda') is here and declared, else the reason."""
    if device == "cuda" and not torch.cuda.is_available():
        return f"no CUDA device: torch.cuda.is_available() is False (torch {torch.__version__})"
    if device not in declared:
        return f"does not run on {device}: it declares {', '.join(declared) or 'no device'}"
    return None
