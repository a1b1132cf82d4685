"""flash_attn's function on top of torch's SDPA, with a bug that many wrappers had.

flash_attn aligns the causal mask to the bottom right, SDPA's ``is_causal`` to the top left.
Both agree while there are as many queries as keys, so the usual tests pass.
"""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def flash_attn_func(
    q: Tensor,  # (B, Sq, H, D)
    k: Tensor,  # (B, Sk, Hkv, D)
    v: Tensor,  # (B, Sk, Hkv, D)
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention, (B, Sq, H, D)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)
