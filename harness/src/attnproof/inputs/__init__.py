"""The tensors of a problem: distributions, needles, patterns of masks, streams of random bits."""
