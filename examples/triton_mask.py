"""Another mask for the Triton kernel: one small device function.

The first PREFIX keys are visible to every query (a prompt that is read in both directions), the
rest is causal. Runs on a GPU, and without one under the interpreter of ``triton_attention``.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

if not torch.cuda.is_available():  # has to be said before Triton is imported
    from triton_attention import interpreter

    interpreter.enable()

import triton
import triton.language as tl

from triton_attention import attention

PREFIX = tl.constexpr(24)


@triton.jit
def prefix_lm(i, j, head, batch):
    """Whether query i sees key j."""
    return (j <= i) | (j < PREFIX)


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
q, k, v = torch.randn(3, 2, 4, 100, 64, device=device).half().requires_grad_().unbind()
out = attention(q, k, v, mask_rule=prefix_lm)

i, j = torch.arange(100, device=device)[:, None], torch.arange(100, device=device)
mask = (j <= i) | (j < PREFIX.value)
expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
print(f"out differs from fp64 by up to {(out - expected).abs().max():.1e}")

grad = torch.randn_like(out)
of_kernel = torch.autograd.grad(out, (q, k, v), grad)
of_formula = torch.autograd.grad(expected, (q, k, v), grad.double())
for name, found, wanted in zip("qkv", of_kernel, of_formula, strict=True):
    print(f"d{name} by up to {(found - wanted).abs().max():.1e}")
