"""Triton FlashAttention V1 and V2 kernels. No kernel is published yet."""
