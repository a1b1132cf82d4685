"""V2 in the place of flash_attn: a prompt, then tokens one by one into a cache of pages.

The step of decoding is compiled without a break of the graph. Runs on a GPU, and without one under
the interpreter of ``triton_attention``.
"""

import torch

from triton_attention.flash_attn import flash_attn_func, flash_attn_with_kvcache

B, HEADS, KV_HEADS, D, PROMPT, NEW, PAGE = 2, 8, 2, 64, 50, 4, 16
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
total = PROMPT + NEW
q = torch.randn(B, total, HEADS, D, device=device).half()
k, v = torch.randn(2, B, total, KV_HEADS, D, device=device).half()
expected = flash_attn_func(q, k, v, causal=True)

pages = -(-total // PAGE)
table = torch.randperm(B * pages, device=device).int().view(B, pages)
k_cache, v_cache = torch.zeros(2, B * pages, PAGE, KV_HEADS, D, device=device).half()


def step(q, k, v, lengths):
    """Append k and v to the cache, and attend to all of it."""
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, block_table=table, causal=True
    )


lengths = torch.zeros(B, dtype=torch.int32, device=device)
parts = [step(q[:, :PROMPT], k[:, :PROMPT], v[:, :PROMPT], lengths)]
compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
for token in range(PROMPT, total):
    lengths = torch.full_like(lengths, token)
    new = slice(token, token + 1)
    parts.append(compiled(q[:, new], k[:, new], v[:, new], lengths))
found = torch.cat(parts, 1)
print(f"{NEW} tokens decoded after a prompt of {PROMPT}, in pages of {PAGE}")
print(f"differs from all at once by up to {(found - expected).abs().max():.1e}")
