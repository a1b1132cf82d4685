"""From safe softmax to FlashAttention, step by step, in torch. No step is published yet."""
