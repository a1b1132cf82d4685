"""What kernels compile to, without a GPU: measured, pinned, and compared with what is pinned."""
