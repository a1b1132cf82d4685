"""Judging an attention implementation inside a whole model: logits, greedy tokens, gradients."""
