"""Kernels are interpreted in these tests: to be said before anything imports Triton."""

from triton_attention import interpreter

interpreter.enable()
