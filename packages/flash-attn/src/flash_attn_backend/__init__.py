"""The official flash_attn library as an attnproof backend. The wrapper is not published yet."""
