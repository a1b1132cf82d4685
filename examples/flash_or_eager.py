"""Flash and eager attention differ: save what each says about the same inputs.

``attnproof explain results/flash.safetensors`` then says whether the difference is honest.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention

from attn_reference.problem import Problem

problem = Problem(heads_q=4, seqlen_q=512, head_dim=64, dtype="bf16", causal="top-left")
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 4, 512, 64).bfloat16()
q = 2 * q

scores = q @ k.transpose(-1, -2) * problem.softmax_scale
hidden = torch.ones(512, 512, dtype=torch.bool).triu(1)
answers = {
    "flash": scaled_dot_product_attention(q, k, v, is_causal=True),
    "eager": scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v,
}
difference = (answers["flash"].double() - answers["eager"].double()).abs().max()
print(f"flash and eager differ by up to {difference:.3f}")

Path("results").mkdir(exist_ok=True)
for name, out in answers.items():
    tensors = {"q": q, "k": k.contiguous(), "v": v.contiguous(), "out": out.contiguous()}
    save_file(tensors, f"results/{name}.safetensors", {"problem": problem.id})
